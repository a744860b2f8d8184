"""Earlier tasks' inputs as second moments per distinct input: no example is kept, and the state does not grow
with the tasks."""

import math
from collections.abc import Iterator, Mapping

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from codyra_llm.config.methods.sequential import OldInputsConfig
from codyra_llm.core.products import gram
from codyra_llm.data.batches import Batch
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import sites
from codyra_llm.methods.base import OutsideSteps, Task
from codyra_llm.methods.parts.inputs import distinct_inputs, input_sizes, read_inputs
from codyra_llm.methods.parts.moments import SecondMoment, kept_columns, recovered, sketching
from codyra_llm.methods.parts.samples import TOGETHER, self_sampled, self_sampled_chats
from codyra_llm.runtime import heartbeat

# By an input's first site: Σ Ω (or Σ) and tr Σ, on the CPU; float64, those of a stored sum float32.
Moments = dict[str, tuple[Tensor, Tensor]]


class OldInputs(Mapping[str, SecondMoment]):
    """Σ_old by an input's first site: the mean over the sources' second moments, where a source is a finished
    task or the base's own samples. A moment is recovered when it is used, so that only the sum over sources
    is in memory, in float32 as it is stored.

    Kept per distinct input (q, k and v read one; gate and up one): Σ in float32 where the input is at most
    4·`sketch` wide, else Σ Ω, Ω drawn by the size alone. Both are linear in Σ, so sources and ranks add up.
    """

    def __init__(self, config: OldInputsConfig, state: dict[str, Tensor]):
        self.config = config
        self.sources = int(state["sources"]) if state else 0
        self._sums: Moments = {}
        for key, value in state.items():
            name, _, part = key.rpartition(".")
            if part == "product":
                self._sums[name] = value, state[f"{name}.trace"]

    def __getitem__(self, name: str) -> SecondMoment:
        product, trace = self._sums[name]
        return self.recovered(product.double() / self.sources, trace.double() / self.sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, moments: Moments) -> None:
        """Add one more source; the sum is in float64 until it is stored."""
        self._sums, self.sources = self._with(moments), self.sources + 1

    def recovered(self, product: Tensor, trace: Tensor) -> SecondMoment:
        """The second moment that a sketch's product and trace stand for."""
        return recovered(product, trace, sketching(len(product), self.config.sketch))

    def state_with(self, moments: Moments) -> dict[str, Tensor]:
        """What `__init__` reads, with these as one more source."""
        state = {"sources": torch.tensor(self.sources + 1)}
        for name, (product, trace) in self._with(moments).items():
            state[f"{name}.product"] = product.float()  # summed in float64, stored in float32
            state[f"{name}.trace"] = trace
        return state

    def _with(self, moments: Moments) -> Moments:
        sums = {}
        for name, (product, trace) in moments.items():
            old_product, old_trace = self._sums.get(name, (0.0, 0.0))
            sums[name] = product + old_product, trace + old_trace
        return sums


def kept_numbers(model: nn.Module, sketch: int) -> int:
    """How many numbers are kept of the second moments of the model's inputs; it may be without weights."""
    return sum(size * kept_columns(size, sketch) for size in input_sizes(model))


def kept_bytes(model: nn.Module, sketch: int) -> int:
    """The size of what `OldInputs.state_with` gives: products in float32, traces in float64, a count."""
    return 4 * kept_numbers(model, sketch) + 8 * len(input_sizes(model)) + 8


def pass_bytes(model: nn.Module, sketch: int, tokens: int) -> int:
    """What `moments` holds on the device: sums in float64, Ω in float32 for every size of sketched inputs,
    and of so many tokens at a time what all layers read."""
    sizes = input_sizes(model)
    sketched = sum(size * sketch for size in set(sizes) if kept_columns(size, sketch) < size)
    read = tokens * sum(sizes) * next(iter(sites(model).values())).weight.itemsize
    return 8 * kept_numbers(model, sketch) + 4 * sketched + read


def reading(config: OldInputsConfig, model: nn.Module, texts: float, lengths: list[int]) -> OutsideSteps:
    """`moments` of so many texts, which have these lengths in the mean."""
    share = texts / len(lengths)
    tokens, squares = share * sum(lengths), share * sum(n * n for n in lengths)
    each = 0
    for size in input_sizes(model):
        columns = kept_columns(size, config.sketch)
        each += 2 * size * columns * (1 if columns == size else 2)  # a sketch takes x Ω, and xᵀ with that
    return OutsideSteps(tokens, squares, tokens * each)


def writing(config: OldInputsConfig, model: nn.Module, chats: float = 0.0) -> OutsideSteps:
    """`sampled_moments`, `chats` as there, and 0 for a model without a chat template."""
    chat_count, found = round(chats * config.samples), OutsideSteps()
    for count, length in (
        (config.samples - chat_count, config.sample_tokens),
        (chat_count, 2 * config.sample_tokens),
    ):
        written = OutsideSteps(decoding=math.ceil(count / TOGETHER) * length, rows=min(count, TOGETHER))
        found = found.plus(written).plus(reading(config, model, count, [length]))
    return found


def own_share(examples: list[Encoded]) -> list[Encoded]:
    """This process's part of the examples."""
    process = PartialState()
    return examples[process.process_index :: process.num_processes]


def sampled_moments(
    config: OldInputsConfig,
    model: nn.Module,
    task: Task,
    seed: int,
    chats: float = 0.0,
    answer_share: float | None = None,
) -> Moments:
    """The moments of the inputs of sequences that the model writes by itself. Where it has a chat template,
    the share `chats` of the sequences are chats, twice as long; in the mean they count by their number, not
    by their tokens."""
    ranks = PartialState().process_index, PartialState().num_processes
    frame = task.chat_frame() if chats else None
    chat_count = 0 if frame is None else round(chats * config.samples)
    text_count = config.samples - chat_count
    found = []
    if text_count:
        examples = self_sampled(model, text_count, config.sample_tokens, seed, *ranks)
        found.append((text_count, moments(config, model, task, examples)))
    if frame is not None and chat_count:
        examples = self_sampled_chats(model, frame, chat_count, 2 * config.sample_tokens, seed, *ranks)
        found.append((chat_count, moments(config, model, task, examples, answer_share)))
    return _mean(found)


def _mean(found: list[tuple[int, Moments]]) -> Moments:
    """The weighted mean of the moments, from pairs of weight and moments, which it overwrites: in float64
    they take much memory."""
    total, sums = sum(weight for weight, _ in found), found[0][1]
    for weight, own in found:
        for name, parts in own.items():
            for part, into in zip(parts, sums[name], strict=True):
                part.mul_(weight / total)
                if part is not into:
                    into.add_(part)
    return sums


def task_moments(
    config: OldInputsConfig, model: nn.Module, task: Task, seed: int, answer_share: float | None = None
) -> Moments:
    """The moments of the inputs of up to `max_examples` training examples of the task, with the adapters as
    they are."""
    return moments(config, model, task, own_share(task.sample(config.max_examples, seed)), answer_share)


@torch.no_grad()
def moments(
    config: OldInputsConfig,
    model: nn.Module,
    task: Task,
    examples: list[Encoded],
    answer_share: float | None = None,
) -> Moments:
    """Means over all tokens of all ranks' examples, except the first of each example: it takes BOS's role in
    attention, and its outliers would dominate Σ. Every token has the same weight, or, with `answer_share`,
    those that predict an answer's tokens have this share of the total weight. One pass; the products of
    a batch are summed in float32, batches in float64."""
    names = [group[0] for group in distinct_inputs(model)]
    layers = [sites(model)[name] for name in names]
    device = layers[0].weight.device
    omegas: dict[int, Tensor | None] = {}  # by the input's size, of which a model has two or three
    for size in {layer.in_features for layer in layers}:
        omega = sketching(size, config.sketch)
        omegas[size] = None if omega is None else omega.to(layers[0].lora_A)
    sums = [_zeros(layer.in_features, omegas[layer.in_features], device) for layer in layers]
    # The last entry counts tokens, so that one reduction does for all.
    traces = torch.zeros(len(layers) + 1, dtype=torch.float64, device=device)
    shares = None if answer_share is None else _Shares(examples, answer_share, device)

    def take(i: int, x: Tensor) -> None:
        parts = [(1.0, x)] if shares is None else shares.divided(x)
        for weight, part in parts:
            product, trace = _read(part, omegas[layers[i].in_features])
            sums[i].add_(product, alpha=weight)
            traces[i].add_(trace, alpha=weight)

    traces[-1] += read_inputs(model, layers, task, examples, take, shares and shares.begin)
    with heartbeat.waiting():
        traces = _sum_over_ranks(traces)
        sums = [_sum_over_ranks(total) for total in sums]
    count = traces[-1]
    return {
        name: (total.div_(count).cpu(), (trace / count).cpu())
        for name, total, trace in zip(names, sums, traces[:-1], strict=True)
    }


def _zeros(size: int, omega: Tensor | None, device: torch.device) -> Tensor:
    """Room for the sum of Σ Ω, or of Σ itself, of inputs of this size."""
    width = size if omega is None else omega.shape[1]
    return torch.zeros(size, width, dtype=torch.float64, device=device)


def _read(x: Tensor, omega: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the inputs x [n, in], the sums Σ Ω, or Σ itself, and tr Σ, in float32."""
    if omega is None:
        product = gram(x)
        return product, product.trace()
    x = x.to(omega)
    return x.T @ (x @ omega), x.square().sum()


class _Shares:
    """Weights of the tokens of all ranks' examples: together the tokens that predict a labelled one have the
    given share of the total weight, and all others have the rest. The mean weight over the tokens is 1."""

    def __init__(self, examples: list[Encoded], share: float, device: torch.device):
        self.examples = examples
        tokens = sum(len(example) - 1 for example in examples)
        answers = sum(_answers(example) for example in examples)
        tokens, answers = _sum_over_ranks(torch.tensor([tokens, answers], device=device)).tolist()
        # The last token of an example predicts nothing, so there are always others; answers may be missing.
        self.answer = share * tokens / answers if answers else 1.0
        self.other = (1 - share) * tokens / (tokens - answers) if answers else 1.0
        # Weights and numbers of tokens, of the batch that `begin` was called with last.
        self.parts: list[tuple[float, Tensor]]

    def begin(self, batch: Batch) -> None:
        """Find the batch's tokens that predict a labelled one, in the order of `Batch.content`, and the
        others."""
        read = batch.content([len(self.examples[i]) for i in batch.examples])
        are_answers = torch.isin(read, batch.predictors)
        answers, others = are_answers.nonzero()[:, 0], (~are_answers).nonzero()[:, 0]
        self.parts = [(self.answer, answers), (self.other, others)]

    def divided(self, x: Tensor) -> list[tuple[float, Tensor]]:
        """The batch's inputs x [n, in] in two parts with one weight each: x times the roots of the weights
        would no longer be in half precision, in which products are faster."""
        return [(weight, x.index_select(0, tokens)) for weight, tokens in self.parts]


def _answers(example: Encoded) -> int:
    """How many tokens of the example predict a labelled one, its first token not counted."""
    return sum(place > 1 for place in example.labelled)


def _sum_over_ranks(total: Tensor) -> Tensor:
    return reduce(total, "sum")

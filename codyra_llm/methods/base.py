"""The interface of all methods. The default of every hook is sequential LoRA; a method overrides only what
differs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from codyra_llm.config.methods.base import MethodConfig
from codyra_llm.core.tensors import generator
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.store.archive import Archive

if TYPE_CHECKING:
    from codyra_llm.data.batches import Batch
    from codyra_llm.data.encoding import Encoded, Encoder
    from codyra_llm.data.stream import Stream


@dataclass(frozen=True)
class Task:
    """What a method may use at the beginning and the end of task `index`."""

    index: int
    archive: Archive
    stream: "Stream"
    encode: Callable[[list[dict]], list["Encoded"]]
    # Puts examples into micro-batches, the same ones on every rank.
    batches: Callable[[list["Encoded"]], Iterator["Batch"]]
    state: dict[str, Tensor]  # what `end_task` returned after the previous task
    ends: frozenset[int] = frozenset()  # the tokens that end an answer, in addition to the model's own EOS
    # The tokens that the model's chat template writes before and after a user's text; None: no template.
    chat_frame: Callable[[], tuple[list[int], list[int]] | None] = lambda: None
    newline: tuple[int, ...] = ()  # the tokens of a line break

    def records(self, past: int | None = None) -> list[dict]:
        """Training records of an earlier task, or of this one."""
        return self.stream.records(self.index if past is None else past, "train")

    def sample(self, count: int, seed: int, past: int | None = None) -> list["Encoded"]:
        """`count` of these records, or all if there are fewer; the draw depends only on (seed, task), so it
        is the same at each call."""
        return self._drawn(self.records(past), count, seed, self.index if past is None else past)

    def general(self, name: str, count: int, seed: int) -> list["Encoded"]:
        """`count` training records of a set that is not a task of the stream, or all if there are fewer."""
        return self._drawn(self.stream.extra(name), count, seed, name)

    def _drawn(self, records: list[dict], count: int, *key: int | str) -> list["Encoded"]:
        draw = generator("sample", *key)
        chosen = torch.randperm(len(records), generator=draw)[:count].tolist()
        return self.encode([records[i] for i in chosen])


class OutsideSteps(NamedTuple):
    """What a method does for a task in addition to its steps. `tokens`: that the model reads in forward
    passes, in texts whose squared lengths sum to `squares`; `products`: operations of further products on the
    model's device; `on_host`: operations in float64 on the CPU; `decoding`: steps of generation, of `rows`
    rows each."""

    tokens: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    on_host: float = 0.0
    decoding: int = 0
    rows: int = 0

    def plus(self, other: "OutsideSteps") -> "OutsideSteps":
        """Both of them; decoding is taken to have the larger number of rows."""
        return OutsideSteps(
            self.tokens + other.tokens,
            self.squares + other.squares,
            self.products + other.products,
            self.on_host + other.on_host,
            self.decoding + other.decoding,
            max(self.rows, other.rows),
        )


class Condition:
    """What one batch of prompts needs at inference in addition to the model, for methods that don't merge.

    `prefix` [B, P, h], or None: embeddings in front of each prompt. `select(rows)` is called with the
    remaining rows when others are finished, so that state which the model keeps per row can follow."""

    def __init__(self, prefix: Tensor | None = None, select: Callable[[Tensor], None] = lambda rows: None):
        self.prefix, self.select = prefix, select


class Gradients(Protocol):
    """The step's gradients, and others that a method may ask for; each list of tensors has the order of
    `parameters`. `train.gradients` implements these methods and documents them."""

    model: nn.Module
    parameters: list[nn.Parameter]
    step: list[Tensor]

    def mean(self, examples: list, loss: Callable = ...) -> list[Tensor]: ...
    def each(self, examples: list, loss: Callable = ...) -> Iterator[list[Tensor]]: ...
    def own(self, examples: list) -> list: ...
    def total(self, tensors: list[Tensor]) -> list[Tensor]: ...


class Method:
    """Sequential LoRA with a fresh adapter per task, merged after it. `codyra-llm methods` lists the class
    attributes; the contract tests check them against what the method does."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    trains: ClassVar[str] = "adapters"  # "" for nothing
    archives_weights: ClassVar[bool] = False  # whole parameters in place of adapters
    old_data: ClassVar[bool] = False  # reads earlier tasks' training examples
    task_id: ClassVar[bool] = False  # needs to know an example's task at test
    merges: ClassVar[bool] = True  # is a plain model after every task
    grows: ClassVar[bool] = False  # apart from updates, state or the cost of inference grows with every task
    joint: ClassVar[bool] = False  # trains once, at the last task, and is evaluated only there
    separable: ClassVar[bool] = True  # one task's part can be left out of the merged model
    averages: ClassVar[bool] = False  # the update is an average over the task's steps
    max_zero_stage: int = 3  # settings may lower it
    mode: ClassVar[Literal["add", "replace", "apart"]] = "add"  # how updates combine: see `Update`
    packs: ClassVar[bool] = True  # its loss accepts packed batches
    carries_optimizer: ClassVar[bool] = False  # Adam's moments go on into the next task
    merge_factor: ClassVar[float] = 1.0  # by which an update is multiplied when it is merged

    def __init__(self, config: MethodConfig, seed: int):
        self.config, self.seed = config, seed

    @classmethod
    def declared(cls) -> dict[str, str | bool | int]:
        """The row of `codyra-llm methods`."""
        return {
            "name": cls.name,
            "summary": cls.summary,
            "trains": cls.trains,
            "old_data": cls.old_data,
            "task_id": cls.task_id,
            "merges": cls.merges,
            "grows": cls.grows,
            "max_zero_stage": cls.zero_stages(),
        }

    @classmethod
    def zero_stages(cls) -> int:
        """The highest ZeRO stage with default settings; 0: one process or data parallel."""
        return cls(cls.Config(), 0).max_zero_stage

    @property
    def shrinks(self) -> bool:
        """Whether the method drives ranks to zero during a task, some of them only in its last steps."""
        return False

    @property
    def has_usual_loss(self) -> bool:
        """Whether `loss` is the batch's cross entropy and nothing else, so that a GPU may replay a recorded
        forward and backward of it."""
        return type(self).loss is Method.loss

    def check(self, config: "PreTrainedConfig", attention: str | None) -> list[str]:
        """Faults: settings that a base model of this config does not support, one sentence each."""
        return []

    def prompt_positions(self, tasks: int) -> int:
        """How many positions the method's own prompts take before a text, after so many tasks."""
        return 0

    def remarks(self, model: nn.Module, steps: list[int], schedule: str) -> list[str]:
        """Remarks for the user on these settings before a run, in sentences. `model` has its adapters but no
        weights (meta device), `steps` are each task's, `schedule` is the learning rate's."""
        return []

    def state_bytes(self, model: nn.Module, tasks: int) -> int:
        """At most how many bytes `end_task` gives after so many tasks; `model` as in `remarks`. The state of
        every task stays on disk."""
        return 0

    def held_bytes(self, model: nn.Module, tasks: int) -> int:
        """How many bytes are on the device in the steps of the task after so many tasks, in addition to the
        weights, to what trains with its moments, and to activations; `model` as in `remarks`."""
        return 0

    def pass_bytes(self, model: nn.Module, tokens: int) -> int:
        """How many bytes the method's passes over data, of so many tokens at a time, take on the device in
        addition to the weights and to what trains with its moments; `model` as in `remarks`."""
        return 0

    def outside_steps(self, model: nn.Module, index: int, lengths: list[int], chats: bool) -> OutsideSteps:
        """What the method does before and after the steps of task `index`, estimated; `model` as in
        `remarks`. `lengths`: the tokens of each of its training examples; `chats`: whether the model has a
        chat template."""
        return OutsideSteps()

    def spec(self) -> AdapterSpec:
        """The adapter at every site."""
        raise TypeError(f"{self.name} has no adapter")

    def attach(self, model: nn.Module) -> None:
        """Add the trained parameters to the model; called on a fresh model at the start of every task."""
        attach(model, self.config.targets, self.spec(), layers=self.config.layers)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Prepare a task. The engine does not exist yet, so this may write weights and make passes over
        data."""
        for name, layer in sites(model).items():
            layer.reset(self.seed, task.index, name)

    def param_groups(self, model: nn.Module, lr: float) -> list[dict]:
        """The parameters that train, each group with its learning rate."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]

    def train_data(self, stream: "Stream", index: int) -> tuple[list[dict], list[range]]:
        """The records of task `index` (and of the memory), and which of them each epoch visits."""
        records = stream.records(index, "train")
        return records, [range(len(records))] * stream.epochs[index]

    def epochs_apart(self, stream: "Stream", index: int) -> int:
        """How many of the last epochs of `train_data` have a learning-rate schedule of their own."""
        return 0

    def own_data(self, stream: "Stream") -> dict[str, str]:
        """By name, the hashes of what the method reads in addition to the tasks' own data; a resumed run must
        find the same."""
        return {}

    def loss(self, model: nn.Module, batch: "Batch") -> dict[str, Tensor]:
        """Named loss terms; the loop sums them and logs each, and validation measures `loss`. `batch.weights`
        already contains the global average.
        """
        return {"loss": batch.cross_entropy(model)}

    def penalty(self, model: nn.Module) -> dict[str, Tensor]:
        """Named loss terms that depend only on the parameters; the loop adds them once per optimizer step."""
        return {}

    def before_step(self, groups: list[dict], step: int, steps: int, schedule: str) -> None:
        """Set values of optimizer groups for step `step` of `steps`, e.g. a threshold; `schedule` is the
        learning rate's.
        """

    def edit_gradients(self, gradients: "Gradients") -> None:
        """Change the step's gradients, which are summed over ranks and not yet clipped. Not under ZeRO. They
        may be non-finite: losses are checked only afterwards, so that the host waits once for them and for
        the norm of the changed gradients."""

    def after_step(self, gradients: "Gradients") -> None:
        """Change the parameters after the optimizer's step. Not under ZeRO."""

    def rewrite(self, step: int, steps: int) -> Callable[[dict[str, Adapter]], dict[str, Adapter]] | None:
        """A function that maps all adapters by site to their replacements before step `step`; None: keep
        them."""

    def progress(self) -> dict[str, Tensor]:
        """State to save in a checkpoint inside a task: what the method has accumulated since `begin_task`,
        without the parameters that train.
        """
        return {}

    def resume(self, progress: dict[str, Tensor]) -> None:
        """Put back what `progress` gave, after `begin_task`."""

    def end_task(self, model: nn.Module, task: Task, gradients: "Gradients") -> dict[str, Tensor]:
        """What later tasks need in addition to the update, e.g. a Fisher matrix; saved, and given back as
        `Task.state`.
        """
        return {}

    def forget(self) -> None:
        """After `consolidate`, delete the attributes with an underscore that this task's hooks set: some of
        them refer to the model, which would stay in memory while the next one is loaded."""
        for name in [name for name in vars(self) if name.startswith("_")]:
            delattr(self, name)

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """The update of task `index`."""
        return Update(adapters, self.spec().scale * self.merge_factor, self.mode)

    def install(self, model: nn.Module, task: Task) -> None:
        """Add to the base model what inference after `task` needs; `task.archive` and `task.state` are those
        after `task`. Only for methods that don't merge."""

    def condition(self, model: nn.Module, prompts: list[list[int]], task: int | None) -> Condition:
        """Prepare the model for one batch of prompts. `task` is None unless the method has declared
        `task_id`.
        """
        return Condition()

    def prompts_at_test(
        self, stream: "Stream", encoder: "Encoder", task: int, prompts: list[str]
    ) -> list[str]:
        """The prompts that the model gets instead of task `task`'s test prompts."""
        return prompts

    def parse_answer(self, task: str, prediction: str) -> str:
        """The part of the model's output that is the answer; called only for tasks, not for general-ability
        probes."""
        return prediction


@torch.no_grad()
def restore(model: nn.Module, update: Update) -> None:
    """Put the factors of `update` back into the model's adapters, or whole parameters into the model, to
    continue training them."""
    layers = sites(model)
    for site, adapter in update.adapters.items():
        layers[site].lora_A.copy_(adapter.a)
        layers[site].lora_B.copy_(adapter.b)
    for name, whole in update.dense.items():
        model.get_parameter(name).copy_(whole)


def trained_factors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all adapters' factors by parameter name, for methods whose archive holds something else."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def factor_bytes(model: nn.Module) -> int:
    """The size of what `trained_factors` gives, in bytes."""
    factors = [p for name, p in model.named_parameters() if ".lora_" in name]
    return sum(p.nbytes for p in factors)


def trained_bytes(model: nn.Module) -> int:
    """The size of all that trains, in bytes."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def load_factors(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trained_factors` gave."""
    for name, tensor in state.items():
        model.get_parameter(name).copy_(tensor)


def survivors(adapter: Adapter) -> Adapter:
    """The same ΔW without the ranks whose weight is zero."""
    if adapter.w is None:
        return adapter
    kept = adapter.w != 0
    return Adapter(adapter.a[kept], adapter.b[:, kept], adapter.w[kept])

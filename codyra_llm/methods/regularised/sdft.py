"""SDFT: on its own answers, the model learns from itself with the right answer shown in the prompt."""

import torch
from torch import Tensor, nn

from codyra_llm.config.methods.regularised import SdftConfig
from codyra_llm.core.errors import Fault
from codyra_llm.core.tensors import generator
from codyra_llm.data.batches import Batch, collate
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import snapshot, stand_in
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.samples import answered, first_token
from codyra_llm.methods.sequential.seqlora import SeqLora
from codyra_llm.models import families
from codyra_llm.models.head_loss import distillation

PARTS = ("A", "w", "B")


class Sdft(SeqLora):
    """Σ_examples share · mean over the tokens of y of KL(p_φ(·|c(x, a), y_<) ‖ p_θ(·|x, y_<)), with y drawn
    by the student from p_θ(·|x) at temperature 1, c(x, a) the prompt that shows the gold answer a as a
    demonstration, and φ an exponential average of the student's adapter, restarted with every task. The sum
    over the vocabulary is exact; no gradient flows through the draw or to the teacher.

    Source: Shenfeld et al. (2601.19897), who train on the model's own answers since this changes the model
    least. The wording of the demonstration is theirs, without "including the thinking process"; the paper
    writes the reverse divergence, KL(student ‖ teacher), but its results were made with the forward one, says
    its author (issue 5 of github.com/idanshen/Self-Distillation), and that is the default there and here
    (`divergence`). Their code (read in copies of it) leaves out the first 3 tokens of every answer (`skip`),
    so that nothing is left of a letter, uses α = 0.01 (the paper tries 0.01, 0.02 and 0.05), and averages
    over examples, which here is `optim.loss_average: sample` (by tokens, an example's share is that of its
    gold answer). Ours: an adapter instead of all weights, and `probe`: the method can't work where the base
    does not use a demonstration, so before the first task the cross entropy of `probe` gold answers is
    measured with and without it. A demonstration that doesn't fit into `data.max_prompt_tokens` loses the
    beginning of its prompt; in a chat, only the last answer is learnt, and it is shown in the user's last
    turn. Validation losses (optim.validate_every) are the cross entropy of the gold answers, without
    demonstration. Cost per step: up to `answer_tokens` forwards of one token per micro-batch, and the
    teacher's forward; one more copy of the adapter."""

    name, Config = "sdft", SdftConfig
    summary = "seqlora that learns, on its own answers, from itself with the right answer in the prompt"
    config: SdftConfig
    max_zero_stage = 2  # the teacher is a copy of whole parameters
    packs = False  # it decodes in training, with padding

    def begin_task(self, model, task: Task) -> None:
        """Encode the teacher's prompts and copy its factors. Raises Fault, before the first task, where the
        base makes no use of a demonstration."""
        super().begin_task(model, task)
        records = task.records()
        self._examples = task.encode(records)
        closing = task.stream.render.closing
        self._demonstrated = task.encode([self._with_demonstration(record, closing) for record in records])
        self._index, self._step, self._due = task.index, 0, False
        self._ends = task.ends
        self._teacher = snapshot(model)
        if task.index == 0:
            self._require_in_context_learning(model, task)

    def before_step(self, groups, step: int, steps: int, schedule: str) -> None:
        """Remember the step, by which answers are drawn."""
        self._step = step
        # The adapter has changed since the last average, which is due with this step's first forward.
        self._due = step > 0

    def loss(self, model, batch: Batch) -> dict[str, Tensor]:
        """The divergence on a training batch; in validation, whose examples are others, cross entropy."""
        if not model.training:
            return super().loss(model, batch)
        self._average(model)
        # The model needs at least one token to continue from.
        prompts = [self._examples[i].prompt or [first_token(model)] for i in batch.examples]
        draws = [generator("sdft", self.seed, self._index, self._step, i) for i in batch.examples]
        answers = answered(model, prompts, self.config.answer_tokens, self._ends, draws)
        weights = self._token_weights(batch, answers)
        student = _states(model, prompts, answers)
        demonstrated = [self._demonstrated[i].prompt for i in batch.examples]
        with torch.no_grad(), stand_in(model, self._teacher):
            taught = _states(model, demonstrated, answers)
        loss = distillation(
            families.head(model),
            student,
            taught,
            weights,
            temperature=1.0,
            cap=families.softcap(model),
            reverse=self.config.divergence == "reverse",
        )
        return {"loss": loss}

    def progress(self) -> dict[str, Tensor]:
        """The teacher's factors."""
        return {
            f"{site}.{part}": factor
            for site, factors in self._teacher.items()
            for part, factor in zip(PARTS, factors, strict=True)
            if factor is not None
        }

    def resume(self, progress: dict[str, Tensor]) -> None:
        """Put them back."""
        for site, factors in self._teacher.items():
            for part, factor in zip(PARTS, factors, strict=True):
                if factor is not None:
                    factor.copy_(progress[f"{site}.{part}"])

    def _with_demonstration(self, record: dict, closing: str) -> dict:
        """The record with the teacher's prompt. Braces in a prompt or an answer are plain text. `closing`:
        what a chat's template writes after the user's text; the demonstration comes before it, in the user's
        turn."""
        asked, end = record["prompt"], ""
        if "learnt" in record and asked.endswith(closing):
            asked, end = asked.removesuffix(closing), closing
        wording = self.config.demonstration.split("{prompt}")
        parts = [part.replace("{answer}", record["answer"]) for part in wording]
        earlier = {"learnt": []} if "learnt" in record else {}  # the prompt's length changes their positions
        return {**record, **earlier, "prompt": asked.join(parts) + end}

    @torch.no_grad()
    def _average(self, model: nn.Module) -> None:
        """φ ← α θ + (1 - α) φ, once for every step of the optimizer."""
        if not self._due:
            return
        self._due = False
        for site, now in snapshot(model).items():
            for old, new in zip(self._teacher[site], now, strict=True):
                if old is not None and new is not None:
                    old.lerp_(new, self.config.teacher_rate)

    def _token_weights(self, batch: Batch, answers: list[list[int]]) -> Tensor:
        """The weight of every drawn token: the example's share of the global batch, divided by the number of
        tokens of its answer that count."""
        counts = [len(self._examples[i].labelled) for i in batch.examples]
        shares = [part.sum() for part in batch.weights.split(counts)]
        found = []
        for share, answer in zip(shares, answers, strict=True):
            skipped = min(self.config.skip, len(answer))
            kept = len(answer) - skipped
            found += [share.new_zeros(skipped), (share / max(kept, 1)).expand(kept)]
        return torch.cat(found)

    def _require_in_context_learning(self, model: nn.Module, task: Task) -> None:
        """Raises Fault where showing the base the gold answers does not lower their cross entropy enough."""
        count = min(self.config.probe, len(self._examples))
        if not count:
            return
        answers = [example.answer for example in self._examples[:count]]
        alone = _cross_entropy(model, [example.prompt for example in self._examples[:count]], answers)
        shown = _cross_entropy(model, [example.prompt for example in self._demonstrated[:count]], answers)
        most = (1 - self.config.gain) * alone
        if shown > most:
            raise Fault(
                f"method: sdft needs a base that makes use of a demonstration in its prompt. Over {count} "
                f"answers of {task.stream.tasks[0]} this one's cross entropy is {shown:.2f} nats per token "
                f"when it is shown them and {alone:.2f} when it is not, where {most:.2f} or less was "
                "expected; take a larger or an instruction-tuned base, write method.demonstration in the "
                "words that the base was tuned on, or lower method.gain"
            )


def _states(model: nn.Module, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """The last hidden states [M, h] from which each token of each answer is predicted after its prompt."""
    examples = [Encoded(p, a, cut=False) for p, a in zip(prompts, answers, strict=True)]
    weights = [0.0] * len(examples)  # of the loss, which is not computed
    batch = collate(examples, range(len(examples)), weights, pad=0)
    return batch.to(families.pretrained(model).device).hidden(model)


@torch.no_grad()
def _cross_entropy(model: nn.Module, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """The mean cross entropy over all tokens of the answers, in nats."""
    total = tokens = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        example = Encoded(prompt or [first_token(model)], answer, cut=False)
        batch = collate([example], [0], [1.0], pad=0).to(families.pretrained(model).device)
        total += batch.cross_entropy(model).item()
        tokens += len(answer)
    return total / tokens

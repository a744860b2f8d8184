"""The only training loop: it trains on one task, from encoded examples to the finished adapters."""

import logging
import math
import time
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from codyra_llm.config.sections import OptimSection
from codyra_llm.core.errors import Fault
from codyra_llm.core.tensors import generator
from codyra_llm.core.terminal import one_line
from codyra_llm.data.batches import (
    Batch,
    batch_tokens,
    collate,
    default_tokens,
    example_weights,
    micro_batches,
)
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.proximal import ProximalAdamW, rate_factor
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.base import Method
from codyra_llm.models.attention import packed_attention
from codyra_llm.runtime import heartbeat, signals
from codyra_llm.runtime.launch import everywhere, wait
from codyra_llm.runtime.memory import if_it_fits
from codyra_llm.store import checkpoint, observer
from codyra_llm.store.checkpoint import Progress
from codyra_llm.store.rows import LogRow
from codyra_llm.train.engine import Engine
from codyra_llm.train.finite import require_finite_gradients, require_finite_losses
from codyra_llm.train.gradients import Gradients
from codyra_llm.train.task_data import TaskData

log = logging.getLogger(__name__)


class Objective(nn.Module):
    """The method's loss as a module, so that ZeRO's hooks run when it is called."""

    def __init__(self, model: nn.Module, method: Method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, batch: Batch, penalty: float = 0.0) -> dict[str, Tensor]:
        """The method's loss terms and its penalty terms times `penalty`; with 0 these are not computed."""
        return dict(self.method.loss(self.model, batch)) | self.penalties(penalty)

    def penalties(self, factor: float) -> dict[str, Tensor]:
        """The method's penalty terms times `factor`; none with 0."""
        terms = self.method.penalty(self.model) if factor else {}
        return {name: factor * value for name, value in terms.items()}


def _saved(path: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint whose names begin with `prefix`, under their names without it."""
    for key, tensor in checkpoint.tensors(path, prefix):
        yield key.removeprefix(prefix), tensor


class _MethodTensors(dict[str, Tensor]):
    """The tensors of a method in a checkpoint. Asking for one that an earlier version did not save raises
    Fault."""

    def __init__(self, path: Path):
        super().__init__(_saved(path, "method."))
        self.path = path

    def __missing__(self, name: str) -> Tensor:
        raise Fault(
            f"{self.path} lacks '{name}', which the method saves inside a task since a later version; resume "
            "with the version that wrote it, or begin again in another output"
        )


class _Ahead(NamedTuple):
    """Micro-batches that were collated before their step begins: of which examples, and under which limit of
    tokens."""

    chosen: list[int] | None
    tokens: int
    batches: list[Batch]


def _refuse_views(groups: list[dict]) -> None:
    """Raises Fault for a parameter with gaps in memory, which the fused optimizer would read as if it had
    none."""
    for p in (p for group in groups for p in group["params"]):
        if not p.is_contiguous():
            raise Fault(
                f"a trained parameter of shape {tuple(p.shape)} of the method is a view with gaps in "
                "memory, expected a contiguous one; train a contiguous copy: nn.Parameter(x.contiguous())"
            )


class Trainer:
    """Trains the adapters of `model` on one task, its micro-batches padded or packed as `batching` says."""

    def __init__(
        self,
        acc: Accelerator,
        method: Method,
        model: nn.Module,
        optim: OptimSection,
        pad: int,
        batching: str = "auto",
    ):
        self.acc, self.method, self.optim, self.pad = acc, method, optim, pad
        self.tokens = optim.micro_batch_tokens or default_tokens(acc.device)
        self.began = time.perf_counter()
        self.earlier = 0.0  # seconds that this task took in processes before this one
        self.best = math.inf  # the lowest validation loss so far
        self.kept: dict[str, Tensor] | None = None  # the trained parameters that had it
        pays = batching == "auto" and method.packs and packed_attention.pays(model, acc.device)
        # The same on all GPUs, of whatever kinds: it decides on the number of micro-batches.
        self.packed = batching == "packed" or everywhere(pays)
        if self.packed:
            packed_attention.use(model)
        groups = method.param_groups(model, optim.lr)
        _refuse_views(groups)
        self.trained = sum(p.numel() for group in groups for p in group["params"])
        # Fused: one pass over each parameter and no temporary tensors, which for all weights would take as
        # much memory as these.
        self.optimizer = ProximalAdamW(groups, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
        self._ahead = _Ahead(None, 0, [])  # for the next step
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.engine = Engine(acc, Objective(model, method), self.optimizer, optim.max_grad_norm)
        self.gradients = Gradients(
            self.engine,
            self._micro,
            lambda one: collate([one], [0], [1 / max(one.targets, 1)], pad, self.packed).to(acc.device),
        )

    def fit(
        self, task: TaskData, seed: int, saves: Progress | None = None, start: int = 0
    ) -> Iterator[LogRow]:
        """Train on `task` from step `start` on, and yield a row after each optimizer step, before the next
        one begins. Afterwards `adapters` are those of the last step, or of the best where `keep_best` is set.

        A checkpoint that is due is written to `saves` after its step's row. Raises Fault when a loss is not
        finite, before it updates anything, and Stopped, after a checkpoint, when any process was asked to
        stop.
        """
        steps = task.steps(self.optim.batch_size)
        self.engine.module.train()
        # Each batch with the one after it, which is collated while the device runs this one.
        batches = pairwise(chain(task.batches(seed, self.optim.batch_size), [None]))
        for step, (chosen, following) in islice(enumerate(batches), start, None):
            began = time.perf_counter()
            observer.at(f"task {task.name}, step {step + 1}")
            self._begin_step(task, step, steps)
            terms, norm, asked, due = self._step(task, chosen, step, seed, saves, following)
            if step == 0:
                self._check_that_all_move()
            eval_loss = self._validated(task, step + 1, steps)
            kappas = [group.get("kappa", 0.0) for group in self.engine.groups]
            yield LogRow(
                task=task.name,
                step=step + 1,
                steps=steps,
                terms=terms,
                grad_norm=norm,
                eval_loss=eval_loss,
                lr=self.engine.groups[0]["lr"],
                kappa=max(kappas, default=0.0),
                tokens=sum(len(task.examples[i]) for i in chosen),
                micro_batch_tokens=self.tokens,
                seconds=round(time.perf_counter() - began, 4),
            )
            if saves and (due or asked):
                self.save(saves, step + 1)
            if asked:
                signals.ask("another process was")
                raise signals.Stopped(f"task {task.name}, step {step + 1} of {steps}")
        self.engine.free_recordings()  # what comes after the last step needs the memory
        if self.kept:
            self.engine.load_state(self.kept.items())

    def _begin_step(self, task: TaskData, step: int, steps: int) -> None:
        """Set the learning rates of step `step`, and let the method rewrite the adapters and set its own
        values."""
        phase = task.phase(step, self.optim.batch_size)
        factor = rate_factor(self.optim.schedule, *phase, self.optim.warmup)
        for group, rate in zip(self.engine.groups, self.rates, strict=True):
            group["lr"] = rate * factor
        rewritten = self.method.rewrite(step, steps)
        if rewritten:
            self.engine.rewrite(rewritten)
        self.method.before_step(self.engine.groups, step, steps, self.optim.schedule)

    def adapters(self) -> dict[str, Adapter]:
        """The adapters as they are now, gathered (collective under ZeRO 3)."""
        return self.engine.adapters()

    def _validated(self, task: TaskData, step: int, steps: int) -> float | None:
        """The loss on the eval split after `step` of `steps`, None where no validation is due. Where it is
        the best so far and `keep_best` is set, the trained parameters are kept."""
        every = self.optim.validate_every
        if not every or (step % every and step < steps):
            return None
        loss = self.validate(task.validation)
        if self.optim.keep_best and loss < self.best:
            self.best = loss
            self.kept = {key: value.detach().cpu().clone() for key, value in self.engine.values()}
        return loss

    def free(self) -> None:
        """Free the model and everything that was made for it; the trainer can't be used afterwards."""
        self.engine.free()
        self.method.forget()
        self.optimizer = self.gradients = self.kept = None

    def save(self, saves: Progress, step: int) -> None:
        """Save a checkpoint after `step` (collective); the first process writes it."""
        tensors = self._progress()
        if self.acc.is_main_process:
            best = None if self.best == math.inf else self.best
            saves.save(
                step,
                tensors,
                {
                    "tokens": self.tokens,
                    "best": best,
                    "seconds": self.earlier + time.perf_counter() - self.began,
                },
            )
        elif self.engine.deepspeed:
            for _ in tensors:  # ZeRO gathers each tensor from all ranks, so all must go through them
                pass
        wait()  # else a process might end first, and the launcher would end the one that still writes

    def resume(self, path: Path) -> int:
        """Put back what `save` wrote, and return the step to continue from."""
        small = checkpoint.small(path)
        self.earlier = small["seconds"]
        self.tokens = min(self.tokens, small["tokens"])
        self.best = math.inf if small["best"] is None else small["best"]
        self.engine.load_state(_saved(path, "engine."))
        self.method.resume(_MethodTensors(path))
        self.kept = dict(_saved(path, "best.")) or None
        return small["step"]

    def _progress(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a checkpoint, by name (collective under ZeRO)."""
        yield from ((f"engine.{key}", tensor) for key, tensor in self.engine.state())
        yield from ((f"method.{key}", tensor) for key, tensor in self.method.progress().items())
        yield from ((f"best.{key}", tensor) for key, tensor in (self.kept or {}).items())

    def state(self) -> dict[str, Tensor]:
        """Adam's moments and step counts by position of the parameter, for methods that carry them between
        tasks.
        """
        held = self.optimizer.state_dict()["state"]
        return {
            f"{i}.{key}": value.cpu().clone() for i, values in held.items() for key, value in values.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Begin with the moments and step counts that `state` gave after the previous task."""
        own = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            i, _, key = name.partition(".")
            own["state"].setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict(own)

    def _step(
        self,
        task: TaskData,
        chosen: list[int],
        step: int,
        seed: int,
        saves: Progress | None,
        following: list[int] | None = None,
    ) -> tuple[dict[str, float], float | None, bool, bool]:
        """One optimizer step: its loss terms and the gradients' norm; whether any process was asked to stop,
        and whether a checkpoint is due. `following`: the examples of the next step.
        """
        batches, losses = self._accumulated(task, chosen, step, seed, following)
        sums = []
        for name in losses[0]:  # the first micro-batch has the penalty terms too
            sums.append(sum(terms.get(name, 0.0) for terms in losses))
        own = torch.stack(sums)
        due = (
            saves is not None
            and self.acc.is_main_process
            and saves.due(step + 1 == task.steps(self.optim.batch_size))
        )
        # What all ranks must agree on is reduced together with the losses. A NaN on any rank is a NaN on all.
        flags = [float(signals.asked()), float(due)]
        reduced = self.engine.reduce(own, flags)
        self.method.edit_gradients(self.gradients)
        totals, (asked, due), norm = self.engine.read(reduced, flags)
        where = f"task {task.name}, step {step + 1}"
        require_finite_losses(where, totals, batches, losses)
        require_finite_gradients(where, totals, norm)
        norm_of_step = self.engine.step()
        require_finite_gradients(where, totals, norm_of_step)  # ZeRO knows the norm only now
        norm = norm_of_step if norm is None else norm
        self.method.after_step(self.gradients)
        return dict(zip(losses[0], totals, strict=True)), norm, bool(asked), bool(due)

    def _accumulated(
        self, task: TaskData, chosen: list[int], step: int, seed: int, following: list[int] | None
    ) -> tuple[list[Batch], list[dict]]:
        """Accumulate the step's gradients, in smaller micro-batches until those of all ranks fit into memory.
        Returns this rank's micro-batches and their losses."""
        while True:
            torch.manual_seed(
                generator("dropout", seed, task.index, step, self.acc.process_index).initial_seed()
            )
            batches, losses = self._attempt(task.examples, chosen)
            if following and losses is not None:
                # Collated while the device still runs this step: among several ranks `anywhere` waits for it.
                self._ahead = _Ahead(following, self.tokens, list(self._collated(task.examples, following)))
            if not self.engine.anywhere(losses is None):
                assert losses is not None, "memory ran out on no rank"
                return batches, losses
            if not self.engine.discard():  # else there is now the memory that recordings held
                self._shrink([len(task.examples[i]) for i in chosen], f"task {task.name}, step {step + 1}")

    def _attempt(self, examples: list[Encoded], chosen: list[int]) -> tuple[list[Batch], list[dict] | None]:
        """Forward and backward of this rank's share: the micro-batches and their losses, None where memory
        ran out.
        """
        batches = self._next(examples, chosen)
        work = self.engine.accumulate
        return batches, if_it_fits(
            lambda: [work(each, first=each is batches[0], last=each is batches[-1]) for each in batches]
        )

    def _shrink(self, lengths: list[int], where: str) -> None:
        """Halve the tokens of a micro-batch, but not below the longest example. All ranks have the same
        numbers, and so get the same result."""
        cut = micro_batches(lengths, self.acc.num_processes, self.tokens, self.packed)
        largest = 0
        for positions in chain.from_iterable(cut):
            held = batch_tokens([lengths[i] for i in positions], self.packed)
            largest = max(largest, held)
        longest = max(lengths)
        if largest <= longest:
            raise Fault(
                f"{where}: one training example of {longest} tokens alone does not fit into the device's "
                f"memory, so optim.micro_batch_tokens ({self.tokens} now) can't be lowered any further; turn "
                "on model.gradient_checkpointing or lower data.max_prompt_tokens"
            )
        self.tokens = max(longest, largest // 2)
        if self.acc.is_main_process:
            log.info(
                "%s: out of memory, going on with optim.micro_batch_tokens at %d",
                one_line(where),
                self.tokens,
            )

    def _micro(self, examples: list[Encoded], chosen: list[int]) -> Iterator[Batch]:
        """This rank's micro-batches of a global batch, on the device."""
        for batch in self._collated(examples, chosen):
            yield batch.to(self.acc.device)

    def _next(self, examples: list[Encoded], chosen: list[int]) -> list[Batch]:
        """This rank's micro-batches on the host: those collated ahead if they are of these examples, else new
        ones."""
        ahead, self._ahead = self._ahead, _Ahead(None, 0, [])
        if (ahead.chosen, ahead.tokens) == (chosen, self.tokens):
            return ahead.batches
        return list(self._collated(examples, chosen))

    def _collated(self, examples: list[Encoded], chosen: list[int]) -> Iterator[Batch]:
        """This rank's micro-batches of a global batch; an empty one becomes a filler of weight 0."""
        weights = example_weights(examples, chosen, self.optim.loss_average)
        lengths = [len(examples[i]) for i in chosen]
        filler = min(range(len(chosen)), key=lambda i: lengths[i])
        ranks = micro_batches(lengths, self.acc.num_processes, self.tokens, self.packed)
        for positions in ranks[self.acc.process_index]:
            own = [chosen[i] for i in positions] or [chosen[filler]]
            shares = [weights[i] for i in positions] or [0.0]
            yield collate(examples, own, shares, self.pad, self.packed)

    @torch.no_grad()
    def validate(self, examples: list[Encoded]) -> float:
        """Mean loss over the examples, averaged as in training: the method's term named `loss`, or the sum of
        all terms where none has that name."""
        self.engine.module.eval()
        total = 0.0
        for batch in self._micro(examples, list(range(len(examples)))):
            terms = self.engine.module(batch)
            total = total + (terms["loss"] if "loss" in terms else sum(terms.values()))
        self.engine.module.train()
        with heartbeat.waiting():
            return self.acc.reduce(total, "sum").item()

    def _check_that_all_move(self) -> None:
        """Raises Fault where an adapter got no gradient in the first step. B starts at zero and Adam moves
        whatever has a gradient, so a B that is still zero had none."""
        still = [site for site, adapter in self.engine.adapters().items() if not adapter.b.any()]
        if still:
            raise Fault(
                f"{len(still)} adapters got no gradient in the first step, {still[0]} among them; this "
                "happens with a learning rate of 0 or where gradient checkpointing cuts the graph"
            )

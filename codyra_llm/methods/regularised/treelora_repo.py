"""TreeLoRA as its repository runs it: A is held along an earlier task's A, drawn by a bandit that prefers
dissimilar ones.
"""

import math

import torch
from torch import Tensor

from codyra_llm.config.methods.regularised import TreeLoraRepoConfig
from codyra_llm.core.tensors import generator
from codyra_llm.data.batches import in_one_copy
from codyra_llm.lora.layer import LoraLinear, by_shape, sites
from codyra_llm.methods.base import Task
from codyra_llm.methods.sequential.seqlora import SeqLora


class TreeLoraRepo(SeqLora):
    """L - w_τ·[L]·s/[s] with s = Σ_sites ⟨A, A_k⟩, where [·] is a value without gradient; w_τ = weight·τ/S in
    step τ of the S of an epoch; A_k the signature of an earlier task k that `Draw` draws for every site and
    step.

    Source: TreeLoRA's released code, for comparison with its numbers. As run there: rank 8, alpha 32, dropout
    0.1, targets q_proj and v_proj, epochs 2,1,3,2,1,2,2,3. It differs from the paper: signatures are A
    itself, not gradients; the draw favours the least similar task; of the tree only the first split is read.
    Ours: τ and S count optimizer steps, not micro-steps, with one draw for each; the draw comes from (seed,
    task, step), the same on all ranks; sites are stacked within groups of one shape, depth being the place
    within the group; |s| is at least 1e-3 in the division. Cost per step: one pass over the signatures,
    [tasks, sites, r·in] float32 in memory and in the state. With weight 0, or on the first task, it is
    seqlora."""

    name, Config = "treelora_repo", TreeLoraRepoConfig
    summary = "seqlora with A held along an earlier task's, as TreeLoRA's repository runs it"
    config: TreeLoraRepoConfig
    grows = True
    max_zero_stage = 2  # whole parameters are read

    def begin_task(self, model, task: Task) -> None:
        """Group the sites by shape, and read what the earlier tasks left."""
        super().begin_task(model, task)
        self._index, self._epochs = task.index, task.stream.epochs[task.index]
        self._groups = by_shape(sites(model))
        self._saved: list[Tensor | None] = [None] * len(self._groups)  # each [t, D, F]
        if task.index:
            self._saved = [_stored(task.state, group) for group in self._groups]

    def before_step(self, groups: list[dict], step: int, steps: int, schedule: str) -> None:
        """Take the step's A into the running mean, and draw a task for it."""
        per_epoch = steps // self._epochs
        if step % per_epoch == 0:
            self._draws = [Draw(saved, per_epoch) for saved in self._saved]
        self._ramp, self._previous = self.config.weight * (step % per_epoch) / per_epoch, []
        for i, (group, draw) in enumerate(zip(self._groups, self._draws, strict=True)):
            with torch.no_grad():
                draw.add(stacked(group))
            if self._index:
                random = generator("treelora", self.seed, self._index, step, i)
                self._previous.append(draw.signatures(random))

    def loss(self, model, batch) -> dict[str, Tensor]:
        """Cross entropy, and the release's regulariser at the step's place in the ramp."""
        terms = super().loss(model, batch)
        if self._index and self._ramp and model.training:
            s = sum(
                (stacked(group) * previous).sum()
                for group, previous in zip(self._groups, self._previous, strict=True)
            )
            terms["treelora"] = -self._ramp * terms["loss"].detach() * s / away_from_zero(s.detach())
        return terms

    def progress(self) -> dict[str, Tensor]:
        """What the draws have counted in this epoch."""
        return {
            f"{i}.{key}": torch.as_tensor(getattr(draw, key))
            for i, draw in enumerate(self._draws)
            for key in draw.counted
        }

    def resume(self, progress: dict[str, Tensor]) -> None:
        """Put it back."""
        self._draws = [Draw(saved, int(progress[f"{i}.steps"])) for i, saved in enumerate(self._saved)]
        for i, draw in enumerate(self._draws):
            for key in draw.counted:
                value = progress[f"{i}.{key}"]
                device = _first(self._groups[i]).lora_A.device
                setattr(draw, key, value.to(device) if value.dim() else value.item())

    def state_bytes(self, model, tasks: int) -> int:
        """A of each task."""
        return tasks * sum(layer.lora_A.nbytes for layer in sites(model).values())

    def held_bytes(self, model, tasks: int) -> int:
        """The signatures again."""
        return self.state_bytes(model, tasks)

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """The mean A of all tasks by site, [tasks, F]."""
        state = {}
        for group, draw, saved in zip(self._groups, self._draws, self._saved, strict=True):
            now = draw.current[None] if saved is None else torch.cat([saved, draw.current[None]])
            state |= {site: now[:, d] for d, site in enumerate(group)}
        return state


def _stored(state: dict[str, Tensor], group: dict[str, LoraLinear]) -> Tensor:
    return torch.stack([state[site] for site in group], 1).to(_first(group).lora_A)


def _first(group: dict[str, LoraLinear]) -> LoraLinear:
    return next(iter(group.values()))


class Draw:
    """One epoch of `steps` steps of the released bandit. `saved` [t, D, F]: the signatures of t earlier tasks
    at D sites, None where there is no earlier task."""

    def __init__(self, saved: Tensor | None, steps: int):
        self.saved, self.steps = saved, steps
        self.tau = -1  # the step of the epoch that was added last
        self.current: Tensor | float = 0.0
        self.counted = ["steps", "tau", "current"]  # the attributes that a checkpoint holds
        if saved is not None:
            self.counted += ["pulls", "similarity"]
            self.pulls, self.similarity = torch.zeros(2, *saved.shape[:2], device=saved.device)
            self.children = first_split(saved)

    def add(self, v: Tensor) -> None:
        """The next step's A [D, F]: cur += D·V/S, as the released loop has it."""
        self.tau += 1
        self.current = self.current + len(v) * v / self.steps

    def signatures(self, random: torch.Generator) -> Tensor:
        """Draw a task for every site, count what it costs, and return its signatures [D, F]."""
        s = self._scores()
        (uniform,) = in_one_copy([torch.rand(1 + s.shape[1], generator=random).to(s.dtype)], s.device)
        first = pick(s.sum(1, keepdim=True).softmax(0), uniform[:1]).item()
        for tasks, median in self.children:
            if first in tasks:
                s[tasks] *= min(median or 1.0, 1.5)
        s = s / (s.max() - s.min() + 1e-5)
        chosen, site = pick(s.softmax(0), uniform[1:]), torch.arange(s.shape[1], device=s.device)
        previous = self.saved[chosen, site]
        self.pulls[chosen, site] += 1
        self.similarity[chosen, site] -= (self.current - previous).abs().sum(1)
        return previous

    def _scores(self) -> Tensor:
        """Mean ℓ1 distance plus exploration, [t, D]: large for what is dissimilar or unexplored."""
        bonus = math.sqrt(math.log(2 * self.steps * (self.tau + 1) * (self.tau + 2)))
        s = bonus / (2 * self.pulls + 1e-5).sqrt() - self.similarity / self.pulls.clamp_min(1)
        return s + s.min()


def stacked(group: dict[str, LoraLinear]) -> Tensor:
    """[D, F]: A of every site of the group, flattened."""
    return torch.stack([layer.lora_A.flatten() for layer in group.values()])


def pick(p: Tensor, uniform: Tensor) -> Tensor:
    """For each column of probabilities p [t, D], the row to which the column's number in [0, 1) falls:
    [D]."""
    return (p.cumsum(0) <= uniform).sum(0).clamp_max(len(p) - 1)


def away_from_zero(x: Tensor) -> Tensor:
    """x with |x| at least 1e-3, where the released division can blow up."""
    return torch.where(x < 0, x.clamp_max(-1e-3), x.clamp_min(1e-3))


def first_split(saved: Tensor) -> list[tuple[list[int], float | None]]:
    """The children of the tree's root: (tasks, median similarity, None for a leaf). Vectors are the
    differences between successive tasks; similarity is the dot product with the node's mean at the node's
    depth. The left child has the tasks at or above the (lower) median, the right one those below it; where
    one of them would be empty, halves in the order of the tasks."""
    differences = torch.cat([saved[:1], saved.diff(dim=0)])

    def similarities(tasks: list[int], depth: int) -> Tensor:
        vectors = differences[tasks, depth]
        return vectors @ vectors.mean(0)

    tasks = list(range(len(saved)))
    if len(tasks) < 2:
        return []
    at_root = similarities(tasks, 0)
    high = (at_root >= at_root.median()).tolist()
    similar = [k for k in tasks if high[k]]
    others = [k for k in tasks if not high[k]]
    parts = [similar, others]
    if not all(parts):
        parts = [tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :]]
    inner = [saved.shape[1] > 1 and len(part) > 1 for part in parts]
    medians = [
        similarities(part, 1).median().item() if split else None
        for part, split in zip(parts, inner, strict=True)
    ]
    return list(zip(parts, medians, strict=True))

"""codyra_drift, ours: a fresh LoRA per task that is held, while it trains and when it merges, to what old
inputs do not see.
"""

import torch
from torch import Tensor

from codyra_llm.config.methods.sequential import CodyraDriftConfig
from codyra_llm.lora.layer import sites
from codyra_llm.lora.proximal import vanishing_rate
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.drift import DriftPenalty, share
from codyra_llm.methods.parts.inputs import distinct_inputs
from codyra_llm.methods.parts.moments import kept_numbers
from codyra_llm.methods.parts.old_inputs import Moments, OldInputs, sampled_moments, task_moments
from codyra_llm.methods.parts.pricing import dropped, joint
from codyra_llm.methods.parts.sparing import spared
from codyra_llm.methods.sequential.codyra import Codyra


class CodyraDrift(Codyra):
    """L + μ Σ_sites E_old|ΔW x|² / E_old|W x|² per step; at the end A* = A Σ_new (Σ_new + μ_m Σ_old + εI)⁻¹.

    Ours; no paper is reproduced. Σ_old: the mean of the second moments of finished tasks' inputs and of
    sequences that the base wrote by itself before the first task (`OldInputs`): no examples, no task ids, one
    model, nothing that grows. Half of a task's moment (`answer_share`) are the tokens at which answers are
    predicted, one of 160 where a prompt is long and its answer a letter. Where the base has a chat template
    half of its sequences (`chats`) are chats: texts alone have next to no beginnings of answers in them, and
    those are what short answers change. Near it: OWM, GPM and InfLoRA project where this weighs; RegMean
    (2212.09849) merges so; Ritter et al.'s Kronecker-factored Laplace (1805.07810) has the output side in the
    penalty too.
    `selection` ratio: when the dense phase ends, every ΔW is rewritten by parts that have a cost and a gain
    each (`pricing.joint`), and those of all layers with the least gain per cost go until the predicted drift
    is within `keep_drift`. It is off: what the penalty and the merge do did not need it (docs/codyra.md).

    Cost per step: r·in·k per site, k the columns of Σ (`DriftPenalty`). Per task: a forward pass over
    `max_examples` (with ratio two), a solve of size `in` where in ≤ 4·`sketch`, else of 2·`sketch`, per
    distinct input. Before the first task: `samples` sequences. Memory and state: `in` · min(in, `sketch`)
    float32 per distinct input.
    """

    name, Config = "codyra_drift", CodyraDriftConfig
    summary = "fresh LoRA per task that spares old inputs, in training and in the merge (ours)"
    config: CodyraDriftConfig

    @property
    def max_zero_stage(self) -> int:
        """Passes over data and the penalty need whole parameters; masks need them in one piece."""
        return 0 if self.config.selection in ("ratio", "random") else 2

    def foresee(self, model, steps: list[int], schedule: str) -> list[str]:
        """In addition, what the second moments take in memory, and the penalty in operations."""
        sizes = {
            name: kept_numbers(layer.in_features, self.config.sketch) for name, layer in sites(model).items()
        }
        inputs = [names[0] for names in distinct_inputs(model)]
        kept = sum(sizes[name] for name in inputs)
        # Forward, and backward to the rows; the products of r x r are small compared with these.
        drift = 4 * self.config.rank * sum(sizes.values()) if self.config.drift_weight else 0
        return [
            *super().foresee(model, steps, schedule),
            f"second moments of {len(inputs)} inputs: {4 * kept / 1e9:.2f} GB of state and of device memory; "
            f"the drift penalty: {drift:.2g} operations of matrix products per step",
        ]

    def begin_task(self, model, task: Task) -> None:
        """Read the old inputs' second moments, and set up the penalty on them."""
        super().begin_task(model, task)  # ΔW = 0: inputs are those of the model as it stands
        self._model, self._masks = model, None
        self._inputs = {names[0]: names for names in distinct_inputs(model)}
        self._old = OldInputs(self.config, task.state)
        if not task.index and self.config.samples:
            chats, share = self.config.chats, self.config.answer_share
            self._old.begin(sampled_moments(self.config, model, task, self.seed, chats, share))
        penalised = self.config.drift_weight and self._old
        self._drift = DriftPenalty(model, self._old) if penalised else None
        priced = self.config.selection == "ratio" and self._old
        self._found = self._moments(model, task) if priced else {}

    def penalty(self, model) -> dict[str, Tensor]:
        """μ times the relative drift of old outputs."""
        return {"drift": self.config.drift_weight * self._drift()} if self._drift else {}

    def before_step(self, groups: list[dict], step: int, steps: int, schedule: str) -> None:
        """Set κ of this step; with `ratio` of the ranks that the prices have condemned."""
        if self.config.selection != "ratio":
            super().before_step(groups, step, steps, schedule)
        elif self._masks:
            for group in groups:
                if "kappa" in group:
                    group["drop"] = [mask.to(group["params"][0]) for mask in self._masks.values()]
                    group["kappa"] = vanishing_rate(step, steps, self.config.threshold.dense)

    def rewrite(self, step: int, steps: int):
        """Price the ranks when the sparse phase begins, or align them as codyra does."""
        if self.config.selection != "ratio":
            return super().rewrite(step, steps)
        return self._priced if self._old and step == int(self.config.threshold.dense * steps) else None

    def progress(self) -> dict[str, Tensor]:
        """The masks of the ranks that go."""
        return dict(self._masks or {})

    def resume(self, progress: dict[str, Tensor]) -> None:
        """Put them back."""
        self._masks = {site: progress[site] for site in sites(self._model)} if progress else None

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """The old inputs' second moments with this task's in addition."""
        self._drift, self._found = None, {}  # their memory is that of what comes now
        self._found = self._moments(model, task)
        return self._old.state_with(self._found)

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """The update, merged in closed form against old inputs (`spared`)."""
        update = super().consolidate(adapters, index)
        if not (self.config.merge_weight and self._old):
            return update
        merged = {}
        for name, names in self._inputs.items():
            own = [update.adapters[site] for site in names]
            new = self._old.recovered(*self._found[name])
            found = spared(own, new, self._old[name], self.config.merge_weight, self.config.ridge)
            merged |= dict(zip(names, found, strict=True))
        in_order = {site: merged[site] for site in update.adapters}
        return Update(in_order, update.scale, update.mode)

    def _moments(self, model, task: Task) -> Moments:
        return task_moments(self.config, model, task, self.seed, self.config.answer_share)

    @torch.no_grad()
    def _priced(self, adapters: dict[str, Adapter]) -> dict[str, Adapter]:
        """The adapters by their priced parts; what is to go is kept in the masks."""
        layers, priced = sites(self._model), {}
        for name, names in self._inputs.items():
            new, old = self._old.recovered(*self._found[name]), self._old[name]
            on_device = old.to(layers[name].lora_A)
            for site in names:
                relative = share(layers[site], on_device).item()
                priced[site] = joint(adapters[site], new, old, relative, self.config.ridge)
        self._masks = dropped({site: priced[site] for site in adapters}, self.config.keep_drift)
        return {site: priced[site][0] for site in adapters}

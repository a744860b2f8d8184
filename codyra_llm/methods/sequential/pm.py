"""Perturb and merge: a fresh LoRA per task, trained at perturbed sizes and merged with the coefficient that
costs all tasks least."""

from dataclasses import replace

import torch
from torch import Tensor

from codyra_llm.config.methods.sequential import PmConfig
from codyra_llm.core.tensors import generator
from codyra_llm.lora.layer import LoraLinear, sites
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.drift import share
from codyra_llm.methods.parts.inputs import distinct_inputs
from codyra_llm.methods.parts.moments import SecondMoment
from codyra_llm.methods.parts.old_inputs import OldInputs, kept_bytes, sampled_moments, task_moments
from codyra_llm.methods.parts.weight_gradients import weight_fisher, weight_numbers
from codyra_llm.methods.sequential.seqlora import SeqLora


class PerturbMerge(SeqLora):
    """W_t = W_{t-1} + α_t ΔW_t, where α_t in [0, 1] minimises Σ_{i≤t} ½ ‖W_{t-1} + α ΔW_t - W*_i‖²_{H_i} and
    W*_i are the weights at the end of task i's training. Each training step takes its gradient at (1 ± ε) ΔW
    with a drawn sign, which on average minimises L + ε²/2 ΔWᵀ H ΔW.

    Source: P&M (2505.22389), by its abstract, reviews and summaries; its code (github.com/qhmiao) could not
    be read. As published: one α for all layers, ε = 0.5, and `curvature` fisher: H_i the diagonal empirical
    Fisher of W, so that

        α = (⟨F_t, ΔW²⟩ - ⟨Σ_{i<t} F_i ⊙ (W_{t-1} - W*_i), ΔW⟩) / ⟨Σ_{i≤t} F_i, ΔW²⟩.

    Ours: that only the sign is drawn, where the paper leaves a third of the steps at ΔW, so that its term is
    2/3 of this one; the Fisher information of the sites' whole W instead of the factors'; and `curvature`
    inputs, which needs no gradients: H is the second moment of a site's inputs, relative to the energy of the
    site's output, and W*_i is taken to be W_{t-1}, so α = q_t/(q_t + μ q_old) with q = Σ_sites c tr(ΔW Σ
    ΔWᵀ). This is the scalar case of codyra_drift's merge, which chooses a matrix. A task that is learnt so
    well that its gradients vanish has almost no Fisher information, and so gets an α near 0, which `inputs`
    avoids. Cost: none per step; per task `max_examples` backward passes (fisher), or a forward pass. State:
    two numbers per weight of the sites in float32 (fisher), or codyra_drift's. Training takes 1.3 times as
    long as seqlora's on the quickstart (`inputs`: 1.1 times)."""

    name, Config = "pm", PmConfig
    summary = "fresh LoRA per task, merged by the coefficient that costs all tasks least"
    config: PmConfig
    max_zero_stage = 2  # passes over data need whole parameters

    def begin_task(self, model, task: Task) -> None:
        """Read the old inputs' second moments where they measure the curvature."""
        super().begin_task(model, task)
        self._index = task.index
        self._layers = list(sites(model).values())
        self._plain = self.spec()  # whose scale is not perturbed
        if self.config.curvature == "inputs":
            self._kept = OldInputs(self.config, task.state)
            if not task.index and self.config.samples:
                self._kept.add(sampled_moments(self.config, model, task, self.seed))

    def before_step(self, groups, step: int, steps: int, schedule: str) -> None:
        """Scale the adapters by 1 + ε or 1 - ε, drawn by (seed, task, step)."""
        draw = generator("perturbation", self.seed, self._index, step)
        sign = 2 * int(torch.randint(2, (), generator=draw)) - 1
        self._resize(1 + sign * self.config.perturbation)

    def after_step(self, gradients) -> None:
        """Back to the plain scale."""
        self._resize(1.0)

    def state_bytes(self, model, tasks: int) -> int:
        """Old inputs' moments, or two numbers per weight of the sites; and α."""
        if self.config.curvature == "inputs":
            return kept_bytes(model, self.config.sketch) + 4
        return 8 * weight_numbers(model) + 4

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """Find α, and keep what later tasks need to find theirs."""
        find = self._by_inputs if self.config.curvature == "inputs" else self._by_fisher
        self._alpha, state = find(model, task)
        return {**state, "alpha": torch.tensor(self._alpha)}

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """α times the trained update."""
        merged = {site: adapter._replace(b=self._alpha * adapter.b) for site, adapter in adapters.items()}
        return super().consolidate(merged, index)

    def _resize(self, factor: float) -> None:
        """Let all adapters compute with `factor` times their ΔW."""
        spec = self._plain if factor == 1 else replace(self._plain, scale=factor * self._plain.scale)
        for layer in self._layers:
            layer.spec = spec

    @torch.no_grad()
    def _by_fisher(self, model, task: Task) -> tuple[float, dict[str, Tensor]]:
        """α, and by site the sums that `optimum_terms` reads at later tasks."""
        found = weight_fisher(model, task, task.sample(self.config.max_examples, self.seed))
        past = [task.archive.load(k) for k in range(task.index)]
        terms, state = torch.zeros(2, dtype=torch.float64), {}
        for site, layer in sites(model).items():
            fisher, delta = found.pop(site), trained_delta(layer)
            old = task.state.get(f"{site}.fisher", torch.zeros(())).to(delta)
            aimed = task.state.get(f"{site}.aimed", torch.zeros(())).to(delta)
            moved = sum((u.adapters[site].delta(u.scale) for u in past), torch.zeros(())).to(delta)
            terms += torch.stack(optimum_terms(fisher, delta, old, aimed, moved)).cpu()
            # On the host: for all sites together they take twice the memory of the weights in float32.
            state[f"{site}.fisher"] = (old + fisher).cpu()
            state[f"{site}.aimed"] = (aimed + fisher * (moved + delta)).cpu()
        return coefficient(*terms.tolist()), state

    @torch.no_grad()
    def _by_inputs(self, model, task: Task) -> tuple[float, dict[str, Tensor]]:
        """α, and the second moments of old inputs for later tasks."""
        found, layers = task_moments(self.config, model, task, self.seed), sites(model)
        groups = distinct_inputs(model) if self._kept.sources else []
        new = old = 0.0
        for names in groups:
            first = names[0]
            ours, theirs = self._kept.recovered(*found[first]), self._kept[first]
            for site in names:
                q_new, q_old = relative_energies(layers[site], ours, theirs)
                new += q_new
                old += self._kept.sources * q_old
        return coefficient(new, new + self.config.weight * old), self._kept.state_with(found)


def trained_delta(layer: LoraLinear) -> Tensor:
    """ΔW [out, in] of the layer's adapter."""
    return layer.spec.scale * layer.lora_B @ layer.lora_A


def optimum_terms(
    fisher: Tensor, delta: Tensor, old: Tensor, aimed: Tensor, moved: Tensor
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of α at one site, float64 scalars: ⟨F_t Δ - (P D - T), Δ⟩ and ⟨P + F_t, Δ²⟩.

    Δ = `delta`, F_t = `fisher`, P = `old` = Σ_{i<t} F_i, D = `moved` = W_{t-1} - W₀ and T = `aimed` = Σ_{i<t}
    F_i ⊙ (W*_i - W₀), so that P D - T is the gradient of the earlier tasks' quadratic loss at W_{t-1}."""
    pull = fisher * delta - (old * moved - aimed)
    return (pull * delta).double().sum(), ((old + fisher) * delta.square()).double().sum()


def relative_energies(layer: LoraLinear, new: SecondMoment, old: SecondMoment) -> tuple[float, float]:
    """E_new|ΔW x|² and E_old|ΔW x|², both as shares of E_old|W x|²; zeros where that is 0."""
    new, old = new.to(layer.lora_A), old.to(layer.lora_A)
    gram, relative = layer.lora_B.T @ layer.lora_B, share(layer, old)  # [r, r]
    of_new = relative * (gram * new.between(layer.lora_A)).sum()
    of_old = relative * (gram * old.between(layer.lora_A)).sum()
    return of_new.item(), of_old.item()


def coefficient(numerator: float, denominator: float) -> float:
    """α within [0, 1]; 1 where no task has a cost."""
    return 1.0 if denominator <= 0 else min(max(numerator / denominator, 0.0), 1.0)

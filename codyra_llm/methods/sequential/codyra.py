"""CoDyRA: LoRA whose rank-one parts carry weights, shrunk by a soft threshold while training; survivors are
merged.
"""

import torch
from torch.nn import functional

from codyra_llm.config.methods.sequential import CodyraConfig, RankWeightsConfig, Threshold
from codyra_llm.core.tensors import generator
from codyra_llm.lora.layer import AdapterSpec, sites
from codyra_llm.lora.proximal import budget_kappa, published_kappa, vanishing_rate
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.base import Method, survivors

NORMAL_MAX = 4.0  # standard deviations within which all of thousands of normal draws lie
DEFAULT_TOTAL = 0.6
PUBLISHED_TOTAL = 0.65  # Σκ of the released setting: 500 steps, half of them sparse, κ up to 0.005


def shrink(threshold: Threshold, step: int, steps: int, schedule: str) -> float:
    """κ of step `step` of `steps`; `schedule` is the learning rate's, which the budget follows."""
    if threshold.schedule == "budget":
        budget = DEFAULT_TOTAL if threshold.budget is None else threshold.budget
        return budget_kappa(step, steps, threshold.dense, budget, schedule)
    if threshold.schedule == "published-ramp":
        budget = PUBLISHED_TOTAL if threshold.budget is None else threshold.budget
        return budget_kappa(step, steps, threshold.dense, budget, "constant")
    kappa_max = 0.005 if threshold.kappa_max is None else threshold.kappa_max
    return published_kappa(step, steps, threshold.dense, kappa_max)


class Codyra(Method):
    """ΔW = s·B diag(w) A per task; w ← prox_κ(w) after every AdamW step of the sparse phase; parts at w = 0
    are dropped.

    Source: CoDyRA (2412.01004), objective L + λ Σ‖w‖₁ by proximal gradient, κ ramping up after a dense phase.
    As published (released code, CLIP): scale 1, rank 16, the six projections of its blocks, importance_init
    normal, align false, schedule published, operator released, importance_lr null; and of the optimizer lr
    5e-4, cosine, betas (0.9, 0.9999), no clipping, 500 steps of 64 examples per task, so that its κ sum to
    0.65. In fewer than 50 sparse steps that schedule prunes nothing; published-ramp has its total at any
    length. Nothing is published of rank, rate, epochs or κ on TRACE.

    Ours, and the default: the constant start; the threshold budget that does not depend on the number of
    steps; and `align`. Without it the ranks share the update about equally, and the initial values of w
    decide which of them survive the threshold (docs/codyra.md has the figures). Cost: r more parameters per
    site, an element-wise pass over them per step, one QR and SVD of rank r per site and task; nothing after
    the merge."""

    name, summary, Config = (
        "codyra",
        "LoRA with learned rank weights, thresholded, pruned and merged",
        CodyraConfig,
    )
    config: RankWeightsConfig

    @property
    def max_zero_stage(self) -> int:
        """0 with random masks, which have the parameters' shapes and not those of ZeRO's shards."""
        return 0 if self.config.selection == "random" else 3

    @property
    def shrinks(self) -> bool:
        """Where ranks are selected."""
        return self.config.selection != "none"

    @property
    def merge_factor(self) -> float:
        """`merge_scale`: the control that shrinks every update."""
        return self.config.merge_scale

    def remarks(self, model, steps: list[int], schedule: str) -> list[str]:
        """Warn where the threshold will prune nothing, or everything."""
        if self.config.selection != "threshold":
            return []
        found = (self._pruned(n, schedule) for n in sorted(set(steps)))
        return [sentence for sentence in found if sentence]

    def _pruned(self, steps: int, schedule: str) -> str | None:
        """A warning where the threshold would prune nothing in a task of `steps` steps, or everything that
        training does not raise again; else None."""
        c = self.config
        total = sum(shrink(c.threshold, step, steps, schedule) for step in range(steps))
        largest = c.importance_value  # the largest value that an importance w starts at
        if c.align:
            largest = 1.0
        elif c.importance_init == "normal":
            largest *= NORMAL_MAX
        if not total:
            return f"the threshold will prune nothing in {steps} steps: all its κ are 0"
        if total < largest:
            return None
        return (
            f"the threshold will prune everything in {steps} steps that training does not raise again: its κ "
            f"sum to {total:.2g}, and the largest w starts at about {largest:.2g}"
        )

    def spec(self) -> AdapterSpec:
        """An adapter with an importance w per rank, or plain LoRA without selection."""
        c = self.config
        if c.selection == "none":
            return AdapterSpec(c.rank, c.scale, c.dropout)
        return AdapterSpec(c.rank, c.scale, c.dropout, c.importance_init, c.importance_value)

    def param_groups(self, model, lr: float) -> list[dict]:
        """A and B, and w as a group that carries its threshold κ, or the masks of the random control."""
        if self.config.selection == "none":
            return super().param_groups(model, lr)
        layers = sites(model).values()
        weights = [layer.lora_w for layer in layers]
        own = self.config.importance_lr
        group = {
            "params": weights,
            "lr": lr if own is None else own,
            "kappa": 0.0,
            "operator": self.config.threshold.operator,
            "weight_decay": 0.0,
        }
        if self.config.selection == "random":
            group["drop"] = self._random_masks(weights)
        return [{"params": [p for layer in layers for p in (layer.lora_A, layer.lora_B)], "lr": lr}, group]

    def before_step(self, groups: list[dict], step: int, steps: int, schedule: str) -> None:
        """Set κ of this step."""
        threshold = self.config.threshold
        for group in groups:
            if "drop" in group:  # the random control
                group["kappa"] = vanishing_rate(step, steps, threshold.dense)
            elif "kappa" in group:
                group["kappa"] = shrink(threshold, step, steps, schedule)

    def rewrite(self, step: int, steps: int):
        """Align all adapters when the sparse phase begins."""
        aligns = self.config.align and self.config.selection != "none"
        return all_aligned if aligns and step == int(self.config.threshold.dense * steps) else None

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """The ranks whose w is not zero."""
        return super().consolidate({site: survivors(x) for site, x in adapters.items()}, index)

    def _random_masks(self, weights: list) -> list:
        """Masks [r] drawn over all sites together, 1 where a rank is to be dropped; the share `keep` of all
        ranks stays, to the nearest rank. They are the same for every task: before a task the ranks of a site
        are alike, so all that tasks share is how many of a site's ranks stay."""
        sizes = [w.numel() for w in weights]
        order = torch.randperm(sum(sizes), generator=generator("lots", self.seed))
        dropped = (order >= round(self.config.keep * sum(sizes))).to(weights[0])
        return list(dropped.split(sizes))


def all_aligned(adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    """`aligned` at every site."""
    return {site: aligned(adapter) for site, adapter in adapters.items()}


def aligned(adapter: Adapter) -> Adapter:
    """The same ΔW by its singular directions: with B diag(w) A = U diag(σ) Vᵀ, rows of A along V, columns of
    B along U, w = σ/σ₁. A's rows get the norm 1/√3 of fresh ones, so that a step of the optimizer changes
    them as much as it did before. Ranks beyond those that a matrix of W's shape can have are zero in all
    three."""
    q_b, r_b = torch.linalg.qr(adapter.b * adapter.w)
    q_a, r_a = torch.linalg.qr(adapter.a.T)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    if not sigma[0] > 0:
        return adapter
    norm = 3**-0.5
    rows = norm * vt @ q_a.T
    columns = q_b @ u * (sigma[0] / norm)
    weights = sigma / sigma[0]
    beyond = len(adapter.a) - len(sigma)
    return Adapter(
        functional.pad(rows, (0, 0, 0, beyond)),
        functional.pad(columns, (0, beyond)),
        functional.pad(weights, (0, beyond)),
    )

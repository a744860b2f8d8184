"""SoRA: one adapter for the stream whose ranks carry gates, driven to exact zeros by a threshold after every
step.
"""

from torch import Tensor

from codyra_llm.config.methods.sequential import SoraConfig
from codyra_llm.lora.layer import AdapterSpec, sites
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.base import Task, factor_bytes, load_factors, survivors, trained_factors
from codyra_llm.methods.sequential.seqlora import SeqLora


class Sora(SeqLora):
    """y = W x + s·B (g ⊙ A x); after each AdamW step on g: shrink by κ, then zero what is below κ (dead zone
    2κ).

    Source: Ding et al. (2311.11696), its released rule; there is no published setting for TRACE. Ours: a
    constant κ (the release can raise it in stages) of 5e-4, AdamW instead of its own copy of it for the
    gates, no weight decay on them. A zero gate keeps its gradient and may come back in a later task, so
    training continues from all ranks (the task's state), while the archive (mode "replace") leaves out those
    at zero. Cost: r parameters more per site and an element-wise pass over them. With κ 0, gates of 1 and
    gate_lr 0 it is seqlora."""

    name, summary, Config = "sora", "one LoRA for all tasks with thresholded rank gates", SoraConfig
    config: SoraConfig

    @property
    def max_zero_stage(self) -> int:
        """`end_task` reads whole parameters; DeepSpeed fails on gates that have no gradient."""
        return 0 if self.config.gate_lr == 0 else 2

    @property
    def shrinks(self) -> bool:
        """Gates are, by the threshold."""
        return True

    def spec(self) -> AdapterSpec:
        """An adapter with a gate per rank."""
        plain = super().spec()
        return AdapterSpec(plain.rank, plain.scale, plain.dropout, self.config.gate_init)

    def begin_task(self, model, task: Task) -> None:
        """Go on with the previous task's factors and gates."""
        if task.index:
            load_factors(model, task.state)
        else:
            super().begin_task(model, task)

    def param_groups(self, model, lr: float) -> list[dict]:
        """A and B, and the gates as a group that carries its threshold κ."""
        layers, own = sites(model).values(), self.config.gate_lr
        # Without a gradient at rate 0, or they would count in the norm that is clipped.
        gates = [layer.lora_w.requires_grad_(own != 0) for layer in layers]
        return [
            {"params": [p for layer in layers for p in (layer.lora_A, layer.lora_B)], "lr": lr},
            {
                "params": gates,
                "lr": lr if own is None else own,
                "kappa": self.config.kappa,
                "operator": "released",
                "weight_decay": 0.0,
            },
        ]

    def state_bytes(self, model, tasks: int) -> int:
        """All factors."""
        return factor_bytes(model)

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """All ranks, since the archive leaves out those whose gate is zero."""
        return trained_factors(model)

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """The ranks whose gate is not zero."""
        kept = {site: survivors(adapter) for site, adapter in adapters.items()}
        return Update(kept, self.spec().scale, self.mode)

"""OSFT's constraint on LoRA: a fresh adapter per task that leaves W's leading directions alone."""

import torch
from torch import Tensor

from codyra_llm.config.methods.projection import OsftLoraConfig
from codyra_llm.lora.layer import LoraLinear, sites
from codyra_llm.methods.base import Task
from codyra_llm.methods.projection.osft import AwayFromKept, Kept, preserved_rank, split_weight
from codyra_llm.methods.sequential.seqlora import SeqLora


class OsftLora(AwayFromKept, SeqLora):
    """ΔW_t = s·B A with A V_hi = 0 and U_hiᵀ B = 0, U_hi and V_hi the leading singular directions of W_{t-1};
    gradients are projected, and A and B again after each step.

    Ours, after OSFT (2504.07097): the same constraint as `osft`, so U_hiᵀ W_t V_hi, U_hiᵀ W_t and W_t V_hi
    stay as they are, at the cost of an adapter. A starts as in seqlora, projected, and is shorter for it.
    Cost per step: 8·k·r·(in + out) per site. Per task: an SVD of W per site on the device. Memory: U_hi, V_hi
    in float32, with a share of half as large as a square W, and once more in checkpoints inside a task.
    Training takes as long as seqlora's on the quickstart.
    """

    name, Config = "osft_lora", OsftLoraConfig
    summary = "fresh LoRA per task off W's leading singular directions, on both sides"
    config: OsftLoraConfig

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """Take A off the leading directions of each W."""
        super().begin_task(model, task)
        self._model = model
        self._kept: dict[LoraLinear, Kept] = {}
        for layer in sites(model).values():
            weight = layer.frozen(layer.lora_B.dtype)
            count = preserved_rank(min(weight.shape), self.config.preserved)
            kept = split_weight(weight, count).kept
            self._kept[layer] = kept
            layer.lora_A.copy_(kept.rows(layer.lora_A))

    def progress(self) -> dict[str, Tensor]:
        """U_hi and V_hi of every site."""
        state = {}
        for name, layer in sites(self._model).items():
            state |= {f"{name}.{part}": value for part, value in self._kept[layer]._asdict().items()}
        return state

    def resume(self, progress: dict[str, Tensor]) -> None:
        """Take the directions that the saved factors are off. Where singular values are equal, or nearly so,
        an SVD with other threads or on another device takes others for the leading ones, and projecting the
        factors off these too would cut away what they have learnt."""
        for name, layer in sites(self._model).items():
            saved = Kept(progress[f"{name}.u"], progress[f"{name}.v"])
            self._kept[layer] = Kept(saved.u.to(layer.lora_B), saved.v.to(layer.lora_A))

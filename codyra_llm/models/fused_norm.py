"""RMSNorm in one kernel each way, where transformers' families write it as about ten operations."""

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from codyra_llm.models import families


class FusedRMSNorm(nn.Module):
    """y = w · x / √(mean(x²) + ε) over the last dimension, rounded once."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """x / √(mean x² + ε) · weight over the last dimension, in one kernel."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class FusedShiftedRMSNorm(nn.Module):
    """y = (1 + w) · x / √(mean(x²) + ε) over the last dimension, in float32 and rounded once, as Gemma's."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(1 + weight) · x / √(mean x² + ε) over the last dimension: one kernel between two casts."""
        factor = 1.0 + self.weight.float()
        return functional.rms_norm(x.float(), factor.shape, factor, self.eps).type_as(x)


FUSED = {"w": FusedRMSNorm, "1+w": FusedShiftedRMSNorm}


def use(model: PreTrainedModel) -> None:
    """Let the model's norms be one kernel on a GPU. On a CPU it gains nothing and would change bits."""
    if model.device.type == "cuda":
        replace(model)


def replace(model: nn.Module) -> None:
    """Turn every norm that the family allows to be fused into a fused one, which keeps its weight; the state
    dict does not change."""
    family = families.of(model.config)
    for module in model.modules():
        if type(module).__name__ in family.fused_norms:
            module.__class__ = FUSED[family.norm]

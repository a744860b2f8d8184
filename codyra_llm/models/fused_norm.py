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


def use(model: PreTrainedModel) -> None:
    """Let the model's norms be one kernel on a GPU. On a CPU nothing is gained, and their last bits stay."""
    if model.device.type == "cuda":
        replace(model)


def replace(model: nn.Module) -> None:
    """Every norm that the family says may be fused becomes so around the same weight; the state dict stays.
    Gemma's, (1 + w) · x / rms(x), are not among them."""
    kinds = families.of(model.config).fused_norms
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.__class__ = FusedRMSNorm

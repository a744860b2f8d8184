"""RMSNorm in one kernel each way, where transformers' families write it as about ten operations."""

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

# All compute w · x / rms(x) with x in float32. Gemma's is (1 + w) · x / rms(x), and stays.
KINDS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)


class FusedRMSNorm(nn.Module):
    """y = w · x / √(mean(x²) + ε) over the last dimension, rounded once."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def use(model: PreTrainedModel) -> None:
    """Let the model's norms be one kernel on a GPU. On a CPU nothing is gained, and their last bits stay."""
    if model.device.type == "cuda":
        replace(model)


def replace(model: nn.Module) -> None:
    """Every norm of the known kinds becomes a fused one around the same weight; the state dict stays."""
    for module in model.modules():
        if type(module) in KINDS:
            module.__class__ = FusedRMSNorm

"""No Triton and no inductor on the training path: in the sources, and on a GPU in the kernels that a training
step starts.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from codyra_llm.config.methods.base import PROJECTIONS
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.lora.shared import share_inputs


def adapted(fused: bool, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            vocab_size=512,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).requires_grad_(False)
    attach(model, list(PROJECTIONS), AdapterSpec(16, 1.0, 0.0, "normal"))
    for name, layer in sites(model).items():
        layer.reset(0, name)
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    model = model.to(device)
    for name, parameter in model.named_parameters():
        if "lora_" not in name or dtype == torch.float64:  # masters stay float32
            parameter.data = parameter.data.to(dtype)
    share_inputs(model, fused)
    return model


def step(model: LlamaForCausalLM, device: str) -> list[torch.Tensor]:
    ids = torch.arange(64, device=device).view(2, 32)
    model(ids).logits.float().square().mean().backward()
    return [p.grad.double() for p in model.parameters() if p.requires_grad]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_starts_no_triton_kernel_and_is_as_exact_as_autograd():
    exact = step(adapted(False, torch.float64, "cuda"), "cuda")
    found = {fused: step(adapted(fused, torch.bfloat16, "cuda"), "cuda") for fused in (True, False)}
    distance = {
        fused: sum((a - b).norm() / b.norm() for a, b in zip(grads, exact, strict=True))
        for fused, grads in found.items()
    }
    assert distance[True] < 1.1 * distance[False]
    model = adapted(True, torch.bfloat16, "cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step(model, "cuda")
    names = [event.key for event in seen.key_averages()]
    assert names and not [name for name in names if "triton" in name.lower()]

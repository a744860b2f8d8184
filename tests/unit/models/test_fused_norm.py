"""The fused norm against the formula in float64, and where it is put."""

import pytest
import torch
from fused import CONFIGS, IDS, SIZES
from torch import nn
from transformers import AutoModelForCausalLM

from codyra_llm.models import families, fused_norm
from codyra_llm.models.fused_norm import FUSED as KINDS

WIDTH = SIZES["hidden_size"]
FUSED = [name for name, config in CONFIGS.items() if families.of(config).fused_norms]


def replaced(model: nn.Module) -> bool:
    """Whether the model has fused norms."""
    return any(type(module) in KINDS.values() for module in model.modules())


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_it_is_the_formula(family, dtype, most):
    """Output and gradient, and no further from float64 than what it replaces."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    norm = model.model.norm.requires_grad_(False).to(dtype)
    norm.weight.copy_(torch.randn(WIDTH))
    x, dy = (3 * torch.randn(2, 7, WIDTH)).to(dtype).requires_grad_(), torch.randn(2, 7, WIDTH).to(dtype)
    exact_x = x.detach().double().requires_grad_()
    shifted = families.of(model.config).norm == "1+w"
    epsilon = norm.eps if shifted else norm.variance_epsilon
    rms = (exact_x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    exact = (norm.weight.double() + shifted) * exact_x / rms
    expected = (exact, *torch.autograd.grad(exact, exact_x, dy.double()))

    def off() -> list[float]:
        y = norm(x)
        found = (y, *torch.autograd.grad(y, x, dy))
        pairs = zip(found, expected, strict=True)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

    before = off()
    fused_norm.replace(model)
    assert type(norm) in KINDS.values()
    assert all(mine < most and mine < 1.5 * theirs + 1e-7 for mine, theirs in zip(off(), before, strict=True))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_stays_what_it_is(family):
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    logits, names = model(IDS).logits, list(model.state_dict())
    fused_norm.use(model)
    assert not replaced(model)  # on a CPU
    fused_norm.replace(model)
    assert replaced(model) == (family in FUSED)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names and isinstance(model, nn.Module)

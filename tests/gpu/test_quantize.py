"""Packed bases: what a packed weight stands for, training on it against the same weights unpacked, and whole
runs.
"""

import pytest
import torch
from fused import CONFIGS, IDS, quantised_pair

from codyra_llm.models.quantize import KINDS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_on_the_cpu_read_on_the_gpu(kind):
    packed, plain = (
        model.cuda() for model in quantised_pair(CONFIGS["llama"], kind, targets=["q_proj", "v_proj"])
    )
    assert {p.device.type for p in packed.parameters()} == {"cuda"}
    x = IDS.cuda()
    found, expected = packed(x).logits, plain(x).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    parameters = [[p for p in model.parameters() if p.requires_grad] for model in (packed, plain)]
    for a, b in zip(
        *(
            torch.autograd.grad(y.square().mean(), ps)
            for y, ps in zip((found, expected), parameters, strict=True)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

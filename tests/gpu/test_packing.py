"""Packed rows equal padded ones, to the gradient; examples of a pack do not see one another; no T x T mask is
built.
"""

import pytest
import torch
from packed import batch, examples, loaded, loss_and_gradients

from codyra_llm.models.attention import packed_attention


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma3"])
def test_the_kernel_itself(name, request):
    """bfloat16 on a GPU, through the kernel, against float64 on the CPU: as near as padding is, to a
    factor.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder, device, at = (
        request.getfixturevalue(name),
        torch.device("cuda"),
        "model.layers.0.self_attn.k_proj.weight",
    )
    exact = loss_and_gradients(loaded(folder), batch(examples(), False))[1][at]
    model, errors = loaded(folder, torch.bfloat16).to(device), []
    for packed in (False, True):
        if packed:
            assert packed_attention.pays(model, device)
            packed_attention.use(model)
        own = loss_and_gradients(model, batch(examples(), packed).to(device))[1][at]
        errors.append((own.cpu().double() - exact).norm() / exact.norm())
    assert errors[1] < max(2 * errors[0], 0.05), errors

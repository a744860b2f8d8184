"""Products in half precision with sums in float32."""

import pytest
import torch

from codyra_llm.core.products import gram


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_gram_matrix_loses_nothing_to_the_inputs_dtype(dtype):
    # With a mean, as inputs have: sums of rounded products would then be off by up to 1/256.
    x = (torch.randn(700, 48, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    exact = x.double().T @ x.double()
    found = gram(x)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=1e-4)


def test_other_products_in_float32_stay_as_they_are():
    before = torch.backends.mkldnn.matmul.fp32_precision
    gram(torch.ones(4, 4, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before

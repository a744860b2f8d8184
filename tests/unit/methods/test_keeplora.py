"""KeepLoRA: the root of a covariance stands for the inputs themselves."""

import torch

from codyra_llm.methods.parts.subspace import Subspace, symmetric_root


def test_the_root_grows_the_space_as_the_inputs_themselves_do():
    """Of 40 inputs as columns: the fewest left singular vectors that hold 0.8 of their energy."""
    draw = torch.Generator().manual_seed(1)
    scales = torch.tensor([5.0, 3, 2, 1, 1, 0.5, 0.2], dtype=torch.float64)
    inputs = scales[:, None] * torch.randn(7, 40, dtype=torch.float64, generator=draw)
    vectors, values, _ = torch.linalg.svd(inputs)
    count = int((values.square().cumsum(0) / values.square().sum() < 0.8).sum()) + 1
    found = Subspace.nothing(7).grown(symmetric_root(inputs @ inputs.T / 40), 0.8)
    expected = vectors[:, :count] @ vectors[:, :count].T
    used = torch.eye(7, dtype=torch.float64) - found.free(torch.eye(7, dtype=torch.float64))
    assert 1 < count < 4
    torch.testing.assert_close(used, expected, rtol=0, atol=1e-9)

"""SLAO: the start from an orthonormal basis, and the merge that is a weighted mean of all tasks' B."""

import math

import pytest
import torch

from codyra_llm.methods.sequential.slao import merged_columns, orthonormal_rows


def test_the_start_is_gram_schmidt_of_the_rows():
    a = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = []
    for row in a:
        for earlier in expected:
            row = row - (row @ earlier) * earlier
        expected.append(row / row.norm())
    found = orthonormal_rows(a)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(orthonormal_rows(found), found, rtol=1e-12, atol=1e-12)
    assert orthonormal_rows(a.float()).dtype == torch.float32


def test_the_merge_in_closed_form():
    """After three tasks B^m = (1-l3)(1-l2) B_1 + (1-l3) l2 B_2 + l3 B_3, l_t = 1/√t; weights sum to 1."""
    one, two, three = torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    merged = merged_columns(merged_columns(merged_columns(None, one, 1), two, 2), three, 3)
    l2, l3 = 1 / math.sqrt(2), 1 / math.sqrt(3)
    weights = (1 - l3) * (1 - l2), (1 - l3) * l2, l3
    assert sum(weights) == pytest.approx(1)
    expected = weights[0] * one + weights[1] * two + weights[2] * three
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)

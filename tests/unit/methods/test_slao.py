"""SLAO: the start from an orthonormal basis, and the merge that is a weighted mean of all tasks' B."""

import math

import pytest
import torch
from adapters import SIZES, TASKS, a_task, attached

from codyra_llm.lora.layer import sites
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.sequential.slao import merged_columns, orthonormal_rows
from codyra_llm.store.archive import Archive


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


def test_a_third_task_starts_from_what_was_trained_and_merges_into_what_was_merged(tmp_path):
    """After two tasks the archived B^m is no longer the B that training left."""
    draw = torch.Generator().manual_seed(3)
    archive, merged, trained, rows = Archive(tmp_path, "base"), {}, {}, {}
    for site, (wide, out) in SIZES.items():
        rows[site] = torch.randn(3, wide, generator=draw)
        merged[site], trained[site] = torch.randn(2, out, 3, generator=draw)
    for task in TASKS[:2]:
        adapters = {site: Adapter(rows[site], merged[site], None) for site in SIZES}
        archive.append(task, Update(adapters, 1.0, "replace"))
    method, model = attached("slao")
    method.begin_task(model, a_task(2, archive, trained))
    for site, layer in sites(model).items():
        torch.testing.assert_close(layer.lora_A.detach(), orthonormal_rows(rows[site]))
        assert torch.equal(layer.lora_B.detach(), trained[site])
    left = {site: Adapter(rows[site], trained[site] + 1, None) for site in SIZES}
    for site, found in method.consolidate(left, 2).adapters.items():
        share = 1 / math.sqrt(3)
        torch.testing.assert_close(found.b, (1 - share) * merged[site] + share * (trained[site] + 1))
        assert torch.equal(found.a, rows[site])

"""Methods of 2025 and 2026: what whole runs of them must keep to."""

import torch
from safetensors.torch import load_file

from codyra_llm.methods.sequential.slao import merged_columns, orthonormal_rows


def test_slao_merges_what_it_trained(run):
    """B^m is the merge of the archived one and of the B that training left; A starts from its own basis."""
    folder = run({"name": "slao"})
    archive = folder.archive()
    one, two = archive.load(0).adapters, archive.load(1).adapters
    trained = load_file(folder.state(1))
    assert archive.load(0).mode == "replace" and trained.keys() == one.keys()
    for site, adapter in two.items():
        assert torch.equal(adapter.b, merged_columns(one[site].b, trained[site], 2))
        start = orthonormal_rows(one[site].a)
        assert (adapter.a - start).norm() < 0.5 * start.norm(), "training went on from the start"
        assert not torch.equal(adapter.b, trained[site])

"""Where A begins: rows off what was read, and W's least directions, by hand."""

import pytest
import torch

from codyra_llm.config.methods.sequential import SeqLoraConfig
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.methods.parts.starts import least_rows, rows_off
from codyra_llm.methods.parts.subspace import Subspace


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_off_read_nothing_of_what_was_used_and_keep_their_norms():
    basis = torch.linalg.qr(drawn(6, 2, seed=1).double())[0]
    rows = drawn(3, 6, seed=2)
    found = rows_off(Subspace(basis), rows)
    torch.testing.assert_close(found.double() @ basis, torch.zeros(3, 2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), rows.norm(dim=1))


def test_least_rows_are_those_that_w_says_least_to():
    """|W a| is the least singular value for the first row, the next for the second; a wide W has only out."""
    weight, rows = drawn(5, 4, seed=1), drawn(2, 4, seed=2)
    found = least_rows(weight, rows)
    values = torch.linalg.eigvalsh(weight.T.double() @ weight.double()).sqrt()
    said = (weight @ found.T).norm(dim=0) / rows.norm(dim=1)
    torch.testing.assert_close(said.double(), values[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), rows.norm(dim=1))
    narrow = least_rows(weight[:1], rows)
    assert torch.equal(narrow[1], rows[1])
    along = (narrow[0] / rows[0].norm()) @ (weight[0] / weight[0].norm())
    assert along.abs().item() == pytest.approx(1, rel=1e-5)


def test_a_setting_without_effect_is_refused():
    with pytest.raises(Fault, match="'start_energy' has no effect with start 'weights'"):
        SeqLoraConfig(start="weights", start_energy=0.5)
    seqlora = METHODS["seqlora"]
    stages = [
        seqlora(SeqLoraConfig(start=start), 0).max_zero_stage for start in ("random", "inputs", "weights")
    ]
    assert stages == [3, 2, 2]

"""Second moments of inputs against sums over the inputs themselves, in float64."""

import pytest
import torch
from moments_cases import dense, inputs, moment, normal

from codyra_llm.methods.parts.moments import SecondMoment, recovered, sketching, stacked


@pytest.mark.parametrize("width", [20, 4])  # whole, sketched
def test_readings_are_those_of_the_matrix(width):
    found, whole = moment(inputs(300, 40), width)
    sigma = whole if found.weights is None else dense(found)
    rows, matrix = normal(3, 40, seed=5), normal(7, 40, seed=6)
    torch.testing.assert_close(found.times(rows), rows @ sigma)
    torch.testing.assert_close(found.between(rows), rows @ sigma @ rows.T)
    torch.testing.assert_close(found.energy(matrix), (matrix @ sigma @ matrix.T).trace())
    assert found.mean == pytest.approx(whole.trace().item() / 40)
    batch = stacked([found, found])
    torch.testing.assert_close(batch.between(torch.stack([rows, -rows]))[1], rows @ sigma @ rows.T)


@pytest.mark.parametrize("width", [20, 4])  # whole, sketched
def test_the_gradient_of_a_reading(width):
    """Against finite differences. Where Σ is whole, X Σ alone is kept for backward, which does not multiply
    by Σ again."""
    found, _ = moment(inputs(300, 40), width)
    rows = normal(2, 3, 40, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(found.between, rows)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda _: None):
        found.between(rows)
    if found.weights is None:
        assert saved == [rows.numel()]


def test_a_sketch_of_low_rank_is_exact():
    x = normal(200, 5, seed=1) @ normal(5, 60, seed=2)
    found, whole = moment(x, 8)
    assert found.factor.shape == (60, 8)
    torch.testing.assert_close(dense(found), whole, rtol=0, atol=1e-5 * whole.norm().item())


@pytest.mark.parametrize("tokens", [1, 7, 31, 32, 200])
def test_a_sketch_of_fewer_tokens_than_columns(tokens):
    """Products in float32, as inputs are read: Ωᵀ Σ Ω is then singular up to their rounding."""
    x = inputs(tokens, 256).float()
    omega = sketching(256, 32)
    product = (x.T @ (x @ omega.float())).double()
    found = recovered(product, x.double().square().sum(), omega)
    whole = x.double().T @ x.double()
    assert dense(found).trace().item() == pytest.approx(whole.trace().item(), rel=1e-4)
    if tokens < 32:
        torch.testing.assert_close(dense(found), whole, rtol=0, atol=1e-3 * whole.norm().item())


def test_the_sketch_s_error_is_within_its_bound():
    """What Nyström's approximation leaves of the trace is in the mean at most (1 + k/(p - 1)) Σ_{i>k} λ_i for
    every split k + p of its columns; the rest makes the trace exact. Measured: the error against ‖Σ‖_F."""
    x, errors = inputs(500, 120, decay=0.93), []
    for width in (6, 12, 24):
        found, whole = moment(x, width)
        values = torch.linalg.eigvalsh(whole).flip(0)
        left = found.rest.item() * (120 - width)
        bounds = [(1 + k / (width - k - 1)) * values[k:].sum().item() for k in range(width - 1)]
        assert left < min(bounds)
        assert dense(found).trace() == pytest.approx(whole.trace().item())
        assert torch.linalg.eigvalsh(dense(found)).min() > -1e-12 * values[0]
        errors.append(((dense(found) - whole).norm() / whole.norm()).item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.15, errors


def test_sketches_of_parts_add_up_to_that_of_all():
    """Over ranks and over tasks: sums of Σ Ω are the Σ Ω of sums."""
    one, two = inputs(200, 60, seed=1), inputs(300, 60, seed=2)
    omega = sketching(60, 8)
    sketches = [x.T @ (x @ omega) for x in (one, two)]
    both = torch.cat([one, two])
    whole = both.T @ both
    parts = recovered(sum(sketches) / 500, whole.trace() / 500, omega)
    found, _ = moment(both, 8)
    torch.testing.assert_close(dense(parts), dense(found))


def test_a_sketch_of_nothing_is_nothing():
    omega = sketching(60, 8)
    found = recovered(torch.zeros(60, 8, dtype=torch.float64), torch.zeros((), dtype=torch.float64), omega)
    assert not dense(found).any()


def test_a_batch_of_whole_moments():
    found = [SecondMoment(normal(4, 4, seed=i)) for i in range(3)]
    assert stacked(found).factor.shape == (3, 4, 4)

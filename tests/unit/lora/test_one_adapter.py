"""The sum of updates as one adapter: of one rank everywhere, and cut where asked with the error reported."""

import pytest
import torch

from codyra_llm.lora.one_adapter import one_adapter
from codyra_llm.lora.update import Adapter, Update

SHAPES = {"a.q_proj": (12, 9), "a.v_proj": (5, 9), "b.q_proj": (12, 9)}  # (out, in)


def updates(ranks, seed=0):
    """One update per dict of ranks by site, scaled 0.5, with weights on the ranks."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    out = []
    for by_site in ranks:
        adapters = {}
        for site, rank in by_site.items():
            rows, columns = SHAPES[site]
            adapters[site] = Adapter(normal(rank, columns), normal(rows, rank), normal(rank))
        out.append(Update(adapters, 0.5))
    return out


def whole(terms, site):
    parts = [u.adapters[site]._replace() for u in terms if site in u.adapters]
    return sum(0.5 * (p.b.double() * p.w.double()) @ p.a.double() for p in parts)


def test_ranks_are_filled_up_to_one(tmp_path):
    terms = updates([{"a.q_proj": 1, "a.v_proj": 3, "b.q_proj": 0}, {"a.q_proj": 4, "a.v_proj": 1}])
    one = one_adapter(terms)
    assert (one.rank, one.whole, one.errors, one.error) == (5, 5, {}, 0.0)
    assert set(one.factors) == {"a.q_proj", "a.v_proj"}  # a site without a rank has nothing to scale
    for site, (a, b) in one.factors.items():
        assert a.shape == (5, SHAPES[site][1]) and b.shape == (SHAPES[site][0], 5)
        torch.testing.assert_close((b @ a).double(), whole(terms, site), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_cut_is_the_best_of_its_rank_and_its_error_is_told(rank):
    terms = updates([{"a.q_proj": 3, "a.v_proj": 2}, {"a.q_proj": 4, "a.v_proj": 2}])
    one = one_adapter(terms, rank)
    assert (one.rank, one.whole) == (rank, 7)
    squares = {}
    for site, (a, b) in one.factors.items():
        delta = whole(terms, site)
        values = torch.linalg.svdvals(delta)
        lost = (b.double() @ a.double() - delta).norm().item()
        best = values[rank:].norm().item()
        assert a.shape[0] == b.shape[1] == rank
        assert lost == pytest.approx(best, rel=1e-4, abs=1e-5)
        assert one.errors[site] == pytest.approx(best, rel=1e-6, abs=1e-6)
        assert one.norms[site] == pytest.approx(delta.norm().item(), rel=1e-6)
        squares[site] = (best**2, delta.norm().item() ** 2)
    lost, held = (sum(pair[i] for pair in squares.values()) for i in (0, 1))
    assert one.error == pytest.approx((lost / held) ** 0.5, rel=1e-6)
    assert list(one.relative().values()) == sorted(one.relative().values(), reverse=True)


def test_a_rank_that_is_enough_cuts_nothing():
    terms = updates([{"a.q_proj": 3}])
    assert one_adapter(terms, 8).rank == 3 and one_adapter(terms, 8).errors == {}


def test_without_ranks_there_is_none():
    assert one_adapter(updates([{"a.q_proj": 0}])) is None and one_adapter([]) is None

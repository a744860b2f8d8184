"""The loss that lwf distils by, against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import Largest, chunks_of, distillation_by_definition, problem

from codyra_llm.models.head_loss import Distillation, distillation


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 6),
    st.integers(2, 11),
    st.integers(1, 10),
    st.sampled_from([None, 0.7, 30.0]),
    st.booleans(),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.booleans(),
)
def test_distillation_is_its_definition(m, h, v, rows, cap, bias, temperature, reverse):
    hidden, head, _, share = problem(m, h, v, bias, seed=m + 31 * v)
    taught = torch.randn_like(hidden)
    z, other = head(hidden), head(taught)
    z, other = (cap * torch.tanh(x / cap) if cap else x for x in (z, other))
    expected = distillation_by_definition(z, other.detach(), share, temperature, reverse)
    with chunks_of(2 * rows, v):
        got = distillation(head.requires_grad_(False), hidden, taught, share, temperature, cap, reverse)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for own, exact in zip(
        torch.autograd.grad(got, hidden), torch.autograd.grad(expected, hidden), strict=True
    ):
        torch.testing.assert_close(own, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_distillation_gradcheck_and_nothing_to_the_teacher(cap, reverse):
    hidden, head, _, share = problem(7, 4, 5, bias=True)
    taught = torch.randn_like(hidden, requires_grad=True)
    frozen = [p.detach() for p in head.parameters()]
    with chunks_of(4, 5):
        assert torch.autograd.gradcheck(
            lambda x: Distillation.apply(x, taught.detach(), *frozen, share, 2.0, cap, reverse), hidden
        )
        Distillation.apply(hidden, taught, *frozen, share, 2.0, cap, reverse).backward()
    assert taught.grad is None and hidden.grad.any()


def test_distillation_in_chunks():
    m, h, v, rows = 96, 8, 1000, 16
    hidden, head, _, share = problem(m, h, v, dtype=torch.bfloat16)
    with chunks_of(2 * rows, v), Largest() as largest:
        distillation(
            head.requires_grad_(False), hidden, torch.randn_like(hidden), share, 2.0, 30.0
        ).backward()
    assert largest.elements == rows * v

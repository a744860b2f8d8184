"""The loss in chunks against PyTorch's and transformers' own, to the gradient; no tensor of all logits is
made.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import Largest, chunks_of, problem
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.data.batches import collate, example_weights
from codyra_llm.data.encoding import Encoded
from codyra_llm.models import head_loss as loss
from codyra_llm.models.head_loss import WeightedCrossEntropy, head_loss
from codyra_llm.runtime.memory import Meter


def plain(hidden, head, targets, weights, cap):
    """The definition, with all logits at once."""
    z = head(hidden)
    z = cap * torch.tanh(z / cap) if cap else z
    return (functional.cross_entropy(z, targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("cap", [None, 3.0])
def test_gradcheck(cap):
    hidden, head, targets, weights = problem(7, 4, 5, bias=True)
    with chunks_of(2, 5):
        assert torch.autograd.gradcheck(
            lambda x, w, b: WeightedCrossEntropy.apply(x, w, b, targets, weights, cap),
            (hidden, head.weight, head.bias),
        )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 6),
    st.integers(2, 11),
    st.integers(1, 10),
    st.sampled_from([None, 0.7, 30.0]),
    st.booleans(),
    st.booleans(),
)
def test_it_is_the_weighted_sum_of_cross_entropy(m, h, v, rows, cap, bias, trains_head):
    hidden, head, targets, weights = problem(m, h, v, bias, seed=m + 31 * v)
    head.requires_grad_(trains_head)
    wanted = [hidden, *(head.parameters() if trains_head else ())]
    expected = plain(hidden, head, targets, weights, cap)
    gradients = torch.autograd.grad(expected, wanted)
    with chunks_of(rows, v):
        got = head_loss(head, hidden, targets, weights, cap)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for own, other in zip(torch.autograd.grad(got, wanted), gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_bfloat16_is_summed_in_float32():
    """On the same rounded logits the loss is that of float32, and gradients keep bfloat16's relative
    precision.
    """
    hidden, head, targets, weights = problem(40, 16, 50, dtype=torch.bfloat16)
    with chunks_of(7, 50):
        got = head_loss(head, hidden, targets, weights)
    z = functional.linear(hidden, head.weight).float().detach().requires_grad_()
    expected = (functional.cross_entropy(z, targets, reduction="none") * weights).sum()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    (dz,) = torch.autograd.grad(expected, z)
    got.backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    for own, exact in ((hidden.grad, dz @ head.weight.float()), (head.weight.grad, dz.T @ hidden.float())):
        assert (own.float() - exact).norm() < 2**-7 * exact.norm()


def test_backward_twice_adds_twice():
    hidden, head, targets, weights = problem(5, 3, 4)
    got = head_loss(head.requires_grad_(False), hidden, targets, weights)
    (2.5 * got).backward(retain_graph=True)
    once = hidden.grad.clone()
    (2.5 * got).backward()
    assert torch.equal(hidden.grad, 2 * once) and once.abs().sum() > 0
    (expected,) = torch.autograd.grad(plain(hidden, head, targets, weights, None), hidden)
    torch.testing.assert_close(once, 2.5 * expected)


def test_nothing_labelled_still_carries_a_graph():
    hidden, head, targets, weights = problem(0, 3, 4)
    got = head_loss(head, hidden, targets, weights)
    got.backward()
    assert got.item() == 0 and hidden.grad.shape == (0, 3) and not head.weight.grad.any()


def test_without_gradients_none_are_made(monkeypatch):
    hidden, head, targets, weights = problem(5, 3, 4)
    monkeypatch.setattr(loss, "_logit_gradient", lambda *_: pytest.fail("a gradient was made"))
    with torch.no_grad():
        got = head_loss(head, hidden, targets, weights)
    torch.testing.assert_close(got, plain(hidden, head, targets, weights, None).detach())


@pytest.mark.parametrize("cap", [None, 30.0])
def test_no_tensor_of_all_logits_is_made(cap):
    m, h, v, rows = 96, 8, 1000, 16
    hidden, head, targets, weights = problem(m, h, v, dtype=torch.bfloat16)
    head.requires_grad_(False)
    with Largest() as largest:
        plain(hidden, head, targets, weights, cap).backward()
    assert largest.elements == m * v, "the measure sees what the definition makes"
    with chunks_of(rows, v), Largest() as largest:
        head_loss(head, hidden, targets, weights, cap).backward()
    assert largest.elements == rows * v


@pytest.mark.parametrize(("cap", "chunks"), [(None, 1), (30.0, 2)])
def test_memory_of_a_chunk(cap, chunks):
    """Logits in float32 are overwritten by their log softmax and by the gradient. With a cap they are kept.
    Nothing of a chunk is left when the next one is made."""
    m, h, v = 64, 4, 4000
    hidden, head, targets, weights = problem(m, h, v, dtype=torch.float32)
    head.requires_grad_(False)
    with chunks_of(16, v), Meter() as meter:
        head_loss(head, hidden, targets, weights, cap)
    assert chunks <= meter.peak / (16 * v * 4) < chunks + 0.2


def test_chunks_are_whole_tiles():
    assert [loss._rows(v, loss.CHUNK) for v in (32_000, 49_152, 128_256, 262_144)] == [1024, 640, 256, 128]
    assert loss._rows(300_000, loss.CHUNK) == 111 and loss._rows(10**7, loss.CHUNK) == loss.MIN_ROWS


EXAMPLES = [
    Encoded(list(range(5, 15)), [20, 21, 2], False),  # three labels
    Encoded([3, 4], [2], False),  # one
    Encoded([], [2], False),  # none, since nothing predicts the first token
    Encoded([], [9, 7], False),
]


@pytest.mark.parametrize("chosen", [[0, 1], [1], [0, 1, 2, 3], [2], [3]])
def test_it_is_the_models_own_loss(chosen, tiny_llama, tiny_gemma2, tiny_gemma3):
    """Against transformers' logits, softcap included, and its label shift."""
    for folder in (tiny_llama, tiny_gemma2, tiny_gemma3):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        batch = collate(EXAMPLES, chosen, example_weights(EXAMPLES, chosen, "token"), pad=0)
        labels = torch.full_like(batch.ids, -100)
        for row, i in enumerate(chosen):
            labels[row, len(EXAMPLES[i].prompt) : len(EXAMPLES[i])] = torch.tensor(EXAMPLES[i].answer)
        count = max(int((labels[:, 1:] != -100).sum()), 1)
        expected = (
            functional.cross_entropy(
                model(input_ids=batch.ids).logits[:, :-1].flatten(0, 1),
                labels[:, 1:].flatten(),
                reduction="sum",
            )
            / count
        )
        got = batch.cross_entropy(model)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
        got.backward()
        for average in ("token", "sample") if chosen != [2] else ():
            weights = collate(EXAMPLES, chosen, example_weights(EXAMPLES, chosen, average), pad=0).weights
            learnt = sum(len(EXAMPLES[i].labelled) > 0 for i in chosen)
            whole = 1.0 if average == "token" else learnt / len(chosen)
            torch.testing.assert_close(weights.sum(), torch.tensor(whole))


def test_average_by_sample_is_the_mean_of_each_alone(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    together = collate(EXAMPLES, [0, 1], example_weights(EXAMPLES, [0, 1], "sample"), pad=0).cross_entropy(
        model
    )
    alone = [
        collate(EXAMPLES, [i], example_weights(EXAMPLES, [i], "token"), pad=0).cross_entropy(model)
        for i in (0, 1)
    ]
    torch.testing.assert_close(together, sum(alone) / 2, rtol=1e-6, atol=1e-9)

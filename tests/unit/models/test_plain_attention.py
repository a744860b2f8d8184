"""Attention by plain products on a CPU, against float64 and against PyTorch's kernel."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.models.attention import packed_attention, plain_attention
from codyra_llm.models.attention.plain_attention import PlainAttention, causal
from codyra_llm.models.loading import checkpoint_layers


def drawn(rows: int, heads: int, key_heads: int, tokens: int, size: int, dtype: torch.dtype) -> list:
    """Query, key and value as projections leave them, transposed views, and a gradient of the output."""
    torch.manual_seed(tokens)
    made = []
    for count in (heads, key_heads, key_heads, heads):
        made.append(torch.randn(rows, tokens, count, size, dtype=dtype).transpose(1, 2))
    return [tensor.requires_grad_() for tensor in made[:3]] + made[3:]


def by_pytorch(query, key, value, scale):
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


def outcome(function, query, key, value, grad, scale) -> list[torch.Tensor]:
    """The output and the three gradients."""
    out = function(query, key, value, scale)
    return [out, *torch.autograd.grad(out, (query, key, value), grad)]


@pytest.mark.parametrize("shape", [(2, 6, 2, 7), (1, 4, 4, 1), (3, 3, 1, 40), (1, 2, 1, 300)])
def test_it_is_attention_with_its_derivative(shape, monkeypatch):
    """In float64, with one query head or several to a key head, in one block and portion and in many."""
    query, key, value, grad = drawn(*shape, 8, torch.float64)
    expected = outcome(by_pytorch, query, key, value, grad, 0.3)
    for portion, block in ((plain_attention.IN_CACHE, 512), (1, 3)):
        monkeypatch.setattr(plain_attention, "IN_CACHE", portion)
        monkeypatch.setattr(plain_attention, "BLOCK", block)
        for found, right in zip(
            outcome(PlainAttention.apply, query, key, value, grad, 0.3), expected, strict=True
        ):
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize("tokens", [16, 64, 200, 700])
def test_its_errors_in_bfloat16_are_those_of_pytorchs_kernel(tokens):
    """Against float64, relative, of the output and of every gradient."""
    given = drawn(2, 9, 3, tokens, 64, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in given[:3]] + [given[3].double()]
    expected = outcome(by_pytorch, *exact, 64**-0.5)
    ours = outcome(PlainAttention.apply, *given, 64**-0.5)
    theirs = outcome(by_pytorch, *given, 64**-0.5)
    for own, other, right in zip(ours, theirs, expected, strict=True):
        error = (own.double() - right).norm() / right.norm()
        assert error < 6e-3 and error < 2 * (other.double() - right).norm() / right.norm()


def test_what_it_saves_is_what_it_reads():
    """Query, key and value: no scores, no probabilities, no output."""
    query, key, value, _ = drawn(2, 4, 2, 32, 16, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        PlainAttention.apply(query, key, value, 0.25)
    assert sorted(saved) == sorted(tensor.numel() for tensor in (query, key, value))


@pytest.mark.parametrize(
    ("tokens", "dtype", "given", "ours"),
    [
        (16, torch.bfloat16, {}, True),
        (3000, torch.bfloat16, {}, True),
        (1, torch.bfloat16, {}, False),
        (16, torch.float32, {}, False),
        (16, torch.bfloat16, {"dropout": 0.5}, False),
        (16, torch.bfloat16, {"attention_mask": torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()}, False),
    ],
)
def test_all_else_is_left_to_pytorch(tokens, dtype, given, ours, monkeypatch):
    seen = []
    monkeypatch.setattr(PlainAttention, "apply", lambda q, *rest: seen.append(1) or q.detach())
    query, key, value, _ = drawn(1, 2, 2, tokens, 8, dtype)
    module = torch.nn.Module()
    module.is_causal = True
    mask = given.pop("attention_mask", None)
    out, _ = causal(module, query, key, value, mask, scaling=0.3, **given)
    assert out.shape == (1, tokens, 2, 8) and bool(seen) == ours


def test_a_models_rows_take_it(tiny_llama, monkeypatch):
    """Padded rows of a model in bfloat16 have states as before to rounding, in every layer by it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 40, (3, 11))
    before = model.model(input_ids=ids, use_cache=False).last_hidden_state
    calls, apply = [], PlainAttention.apply
    monkeypatch.setattr(PlainAttention, "apply", lambda *given: calls.append(1) or apply(*given))
    after = packed_attention.states(model, input_ids=ids)
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)


def test_what_is_computed_again_in_backward_takes_it_too(tiny_llama):
    """With gradient checkpointing, whose second forward comes after `states` has ended: the same gradients as
    with everything kept, to the last bit."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).train()
    ids = torch.randint(3, 40, (3, 11))

    def gradients():
        model.zero_grad()
        states = packed_attention.states(model, input_ids=ids)
        states.float().square().sum().backward()
        return [p.grad for p in model.model.parameters()]

    expected = gradients()
    checkpoint_layers(model)
    for found, right in zip(gradients(), expected, strict=True):
        assert torch.equal(found, right)
    assert model.config._attn_implementation == "sdpa"

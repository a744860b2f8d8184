"""Logits without gradients: attention by plain products, and a head that reads rows without gaps."""

import pytest
import torch
from fused import CONFIGS
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

from codyra_llm.models import inference
from codyra_llm.models.attention import plain_attention
from codyra_llm.models.attention.cache import CACHE
from codyra_llm.models.inference import attend, last_logits, single, whole


def made(name: str = "llama", dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval()


def drawn(rows: int, heads: int, shared: int, tokens: int, length: int, dtype=torch.float64) -> tuple:
    """Query, key, value, and a mask [R, 1, T, S] that hides the first keys of every row but the first."""
    torch.manual_seed(length)
    query = torch.randn(rows, tokens, heads, 8, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(rows, length, shared, 8, dtype=dtype).transpose(1, 2) for _ in range(2))
    mask = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens).repeat(rows, 1, 1, 1)
    for row in range(rows):
        mask[row, :, :, :row] = False
    return query, key, value, mask


def by_pytorch(query, key, value, mask, scale):
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )


@pytest.mark.parametrize("shape", [(3, 6, 2, 7, 7), (2, 4, 4, 5, 9), (2, 3, 1, 40, 40), (1, 2, 1, 300, 300)])
def test_whole_prompts_attend_as_in_pytorch(shape, monkeypatch):
    """In float64, after a cache or not, in one block and portion and in many. Where a token may attend to
    nothing, PyTorch gives 0 and we an average of the values: both are finite, and nothing reads them."""
    query, key, value, mask = drawn(*shape)
    expected = by_pytorch(query, key, value, mask, 0.3)
    some = mask.any(-1)[:, 0, :, None]  # [R, T, 1]
    for portion, block in ((plain_attention.IN_CACHE, 512), (1, 3)):
        monkeypatch.setattr(plain_attention, "IN_CACHE", portion)
        monkeypatch.setattr(plain_attention, "BLOCK", block)
        found = whole(query, key, value, mask, 0.3)
        assert found.isfinite().all()
        read = some[:, None].expand_as(found)
        torch.testing.assert_close(found[read], expected[read])


def test_without_a_mask_whole_prompts_are_causal():
    query, key, value, _ = drawn(2, 4, 2, 9, 9)
    expected = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(whole(query, key, value, None, 0.3), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_single_tokens_attend_as_in_pytorch(masked):
    query, key, value, mask = drawn(3, 6, 2, 1, 11)
    mask = mask if masked else None
    torch.testing.assert_close(single(query, key, value, mask, 0.3), by_pytorch(query, key, value, mask, 0.3))


@pytest.mark.parametrize(
    ("tokens", "length", "dtype", "mask", "ours"),
    [
        (1, 4000, torch.bfloat16, "bool", True),
        (64, 64, torch.bfloat16, "bool", True),
        (64, 64, torch.bfloat16, None, True),
        (64, 65, torch.bfloat16, None, False),  # PyTorch would align such a triangle at the first key
        (64, 64, torch.bfloat16, "float", False),
        (64, 64, torch.float32, "bool", False),
        (1, 64, torch.float16, "bool", False),
    ],
)
def test_where_pytorchs_kernel_stays(tokens, length, dtype, mask, ours, monkeypatch):
    called = []
    monkeypatch.setattr(inference, "sdpa_attention_forward", lambda *given, **_: called.append(given))
    query, key, value, allowed = drawn(1, 2, 1, tokens, length, dtype)
    masks = {None: None, "bool": allowed, "float": allowed.to(dtype)}
    attend(torch.nn.Module(), query, key, value, masks[mask], scaling=0.3)
    assert bool(called) != ours


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_in_bfloat16_are_as_exact_as_transformers(name):
    """Of padded prompts and of the tokens after them, against the same weights in float64."""
    model, exact = made(name), made(name, torch.float64)
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(3, 50, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :9] = 0, 0

    def run(model, forward) -> torch.Tensor:
        cache, found = DynamicCache(config=model.config), []
        for part in (slice(0, 18), slice(18, 19), slice(19, 20)):
            upto = mask[:, : part.stop]
            given = {"input_ids": ids[:, part], "attention_mask": upto, CACHE: cache}
            positions = (upto.cumsum(1) - 1).clamp(min=0)[:, part]
            found.append(forward(model, **given, position_ids=positions, use_cache=True)[:, -1].double())
        return torch.stack(found)

    @torch.no_grad()
    def theirs(model, **given):
        return model(**given, logits_to_keep=1).logits

    right = run(exact, theirs)
    error, usual = ((run(model, way) - right).norm() for way in (last_logits, theirs))
    assert error <= 1.5 * usual
    assert model.config._attn_implementation == "sdpa"


def test_the_head_reads_rows_without_gaps():
    """With gaps, in bfloat16 on a CPU, PyTorch would copy the head's weight for each row."""
    model = made()
    ids, seen = torch.randint(3, 50, (5, 6)), []
    model.lm_head.register_forward_hook(lambda _, given, out: seen.append(given[0].is_contiguous()))
    with torch.no_grad():
        model(input_ids=ids, logits_to_keep=1)
        last_logits(model, 2, input_ids=ids)
        model(input_ids=ids, logits_to_keep=1)
    assert seen == [False, True, False]


def test_a_failure_leaves_the_model_as_it_was():
    model = made()
    with pytest.raises(IndexError):
        last_logits(model, input_ids=torch.full((2, 3), 10**6))
    assert model.config._attn_implementation == "sdpa"
    assert not model.lm_head._forward_pre_hooks

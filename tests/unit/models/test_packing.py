"""Packed rows equal padded ones, to the gradient; examples of a pack do not see one another; no T x T mask is
built.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from losses import Largest
from packed import LENGTHS, batch, examples, loaded, loss_and_gradients
from tiny_families import make
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, masking_utils

from codyra_llm.data.batches import collate
from codyra_llm.models import families, loading
from codyra_llm.models.attention import packed_attention, prefix_attention

SHORT = [(9, 3), (1, 2), (5, 7)]  # rows shorter than the window


def assert_same(got, expected, rtol=1e-5, atol=1e-8):
    torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=atol)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_padded(folder, checkpointing):
    """All parameters' gradients, embeddings and a tied head included. Gemma 2's eager softmax is float32 in
    float64.
    """
    model = loaded(folder)
    expected = loss_and_gradients(model, batch(examples(), packed=False))
    packed_attention.use(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(loss_and_gradients(model, batch(examples(), packed=True)), expected, 2e-5, 1e-7)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, SHORT])
def test_padded_rows_are_given_masks_without_asking(folder, prefixed, checkpointing, lengths, monkeypatch):
    """They are the same to the last bit. And transformers does not ask whether their positions restart, for
    which the host would wait."""
    model, padded = loaded(folder), batch(examples(lengths), packed=False)
    if prefixed:
        prefix_attention.use(model)
    if checkpointing:
        loading.checkpoint_layers(model)
    assert_asks_no_more(model, padded, monkeypatch)


@pytest.mark.parametrize("name", ["mistral", "llama", "qwen3"])
@pytest.mark.parametrize("lengths", [LENGTHS, SHORT])
def test_whatever_form_a_model_takes_masks_in(name, lengths, tmp_path, monkeypatch):
    """One for all layers or one for each kind of layer, to be added or true where a token looks."""
    folder, padded = make(name, tmp_path), batch(examples(lengths), packed=False)
    for attention in ("sdpa", "eager"):
        model = loaded(folder, attn_implementation=attention)
        with monkeypatch.context() as patch:
            assert_asks_no_more(model, padded, patch)


def assert_asks_no_more(model, padded, patch):
    name = model.config._attn_implementation
    with pytest.MonkeyPatch.context() as without:
        without.setattr(packed_attention, "own_masks", lambda model, given: nullcontext({}))
        expected = loss_and_gradients(model, padded)
    asked = []
    ask = masking_utils.find_packed_sequence_indices
    patch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: asked.append(ids) or ask(ids))
    found = loss_and_gradients(model, padded)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][key], value) for key, value in expected[1].items())
    assert not asked and model.config._attn_implementation == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [LENGTHS, SHORT])
def test_padded_rows_are_those_that_transformers_computes_one_by_one(folder, lengths, dtype):
    """With its own masks and no pads: in float64 it makes NaN of a pad whose window holds only pads."""
    model, own = loaded(folder, dtype), examples(lengths)
    padded = batch(own, packed=False)
    found = loss_and_gradients(model, padded)
    model.zero_grad()
    rows = zip(padded.ids, map(len, own), strict=True)
    alone = [families.backbone(model)(input_ids=ids[None, :n]).last_hidden_state[0] for ids, n in rows]
    hidden = nn.utils.rnn.pad_sequence(alone, batch_first=True)
    loss = padded.cross_entropy_of(model, hidden.flatten(0, 1)[padded.predictors])
    loss.backward()
    expected = loss.detach(), {name: p.grad for name, p in model.named_parameters()}
    rtol = 1e-4 if dtype == torch.float32 else 1e-6  # norms and a capped softmax are float32 in float64 too
    assert_same(found, expected, rtol, rtol * 1e-2)


def test_kinds_of_layers_that_have_other_masks_are_left_to_transformers(tiny_gemma3):
    model = loaded(tiny_gemma3)
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with packed_attention.own_masks(model, {"input_ids": torch.ones(1, 5, dtype=torch.long)}) as given:
        assert given == {} and model.config._attn_implementation == "sdpa"


def test_no_kernel_without_shared_heads_is_given_any(tiny_llama, monkeypatch):
    """As in float32 on a GPU, where PyTorch would keep all scores. The loss and its gradients stay."""
    model, padded, heads = loaded(tiny_llama), batch(examples(), packed=False), []
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    expected = loss_and_gradients(model, padded)
    attention = functional.scaled_dot_product_attention

    def seen(query, key, value, *given, **settings):
        heads.append((query.shape[1], key.shape[1], value.shape[1], settings.get("enable_gqa", False)))
        return attention(query, key, value, *given, **settings)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", seen)
    monkeypatch.setattr(packed_attention, "_lacks_shared_heads", lambda query: True)
    assert_same(loss_and_gradients(model, padded), expected)
    count = model.config.num_attention_heads
    assert heads == [(count, count, count, False)] * model.config.num_hidden_layers


@pytest.mark.parametrize(
    "device, dtype, lacks",
    [
        ("cuda", torch.float32, True),
        ("cuda", torch.bfloat16, False),
        ("cpu", torch.float32, False),
    ],
)
def test_which_kernels_read_shared_heads(device, dtype, lacks):
    query = SimpleNamespace(is_cuda=device == "cuda", dtype=dtype)
    assert packed_attention._lacks_shared_heads(query) == lacks


def test_the_window_matters(tiny_gemma3):
    """Else the test above would pass without one."""
    model = loaded(tiny_gemma3)
    expected = batch(examples(), False).cross_entropy(model)
    packed_attention.use(model)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert abs(batch(examples(), True).cross_entropy(model) / expected - 1) > 1e-4


def test_an_example_does_not_see_its_neighbours(folder):
    """The loss of the others is the same, bit by bit, whatever stands between them, and no gradient reaches
    it.
    """
    model, own = loaded(folder), examples()
    packed_attention.use(model)
    weights = [1.0, 1.0, 0.0, 1.0, 1.0]
    changed = [*own[:2], examples(LENGTHS, 1)[2], *own[3:]]
    losses = [collate(e, range(5), weights, 0, True).cross_entropy(model) for e in (own, changed)]
    assert torch.equal(*losses)
    embedded = {}
    model.model.embed_tokens.register_forward_hook(
        lambda _, __, out: embedded.update(x=out) or out.retain_grad()
    )
    collate(own, range(5), weights, 0, True).cross_entropy(model).backward()
    start, rows = sum(map(sum, LENGTHS[:2])), embedded["x"].grad[0].abs().sum(1)
    assert (
        not rows[start : start + sum(LENGTHS[2])].any()
        and rows.count_nonzero() == len(rows) - sum(LENGTHS[2]) - 4
    )
    own[1].answer[0] += 1
    assert collate(own, range(5), weights, 0, True).cross_entropy(model) != losses[0]


def test_no_mask_over_the_whole_row(folder):
    model = loaded(folder, torch.float32)
    packed_attention.use(model)
    many = batch(examples([(20, 4)] * 40), True)
    with Largest() as largest:
        many.cross_entropy(model).backward()
    assert largest.elements < many.ids.numel() ** 2 / 4


def varlen_by_its_documentation(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):
    """What torch.nn.attention.varlen documents, with one mask over everything: query [T, H, d], key [T, H_kv,
    d].
    """
    assert cu_seq_q.dtype == torch.int32 and max_q == cu_seq_q.diff().max()
    assert enable_gqa == (key.shape[1] < query.shape[1])
    at = torch.arange(len(query))
    owner = torch.bucketize(at, cu_seq_q[1:], right=True)
    distance = at[:, None] - at
    left, right = window_size
    seen = (owner[:, None] == owner) & (distance >= -right) & ((distance <= left) if left >= 0 else True)
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = torch.einsum("thd,shd->hts", query, key) * scale
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma3"])
def test_the_kernels_arguments(name, request, monkeypatch):
    model = loaded(request.getfixturevalue(name))
    packed_attention.use(model)
    expected = loss_and_gradients(model, batch(examples(), True))
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", varlen_by_its_documentation)
    assert_same(loss_and_gradients(model, batch(examples(), True)), expected)


def test_flash_attention_gets_transformers_own_arguments(tiny_llama, monkeypatch):
    model, seen = loaded(tiny_llama), []
    expected = batch(examples(), False).cross_entropy(model)

    def flash(*args, **kwargs):
        seen.append(
            {
                name: kwargs[name]
                for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
            }
        )
        return packed_attention.packed(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, packed_attention.FLASH, flash)
    model.config._attn_implementation_internal = packed_attention.FLASH
    assert packed_attention.pays(model, torch.device("cuda"))
    packed_attention.use(model)
    torch.testing.assert_close(batch(examples(), True).cross_entropy(model), expected)
    ends = [sum(map(sum, LENGTHS[:i])) for i in range(6)]
    assert len(seen) == 2
    assert all(call["cu_seq_lens_q"].tolist() == call["cu_seq_lens_k"].tolist() == ends for call in seen)
    assert all(call["max_length_q"] == call["max_length_k"] == 41 for call in seen)


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "head", "expected"),
    [
        ("tiny_llama", torch.bfloat16, (9, 0), None, True),
        ("tiny_gemma3", torch.bfloat16, (8, 9), None, True),
        ("tiny_llama", torch.float32, (9, 0), None, False),
        ("tiny_llama", torch.bfloat16, (7, 5), None, False),
        ("tiny_gemma2", torch.bfloat16, (9, 0), None, False),
        ("tiny_gemma3", torch.bfloat16, (9, 0), 256, True),
        ("tiny_gemma3", torch.bfloat16, (8, 9), 256, False),
    ],
)
def test_auto_packs_where_one_kernel_does_it(name, dtype, capability, head, expected, request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = loaded(request.getfixturevalue(name), dtype)
    if head:
        model.config.head_dim = head
    assert packed_attention.pays(model, torch.device("cuda")) == expected
    assert not packed_attention.pays(model, torch.device("cpu"))


@pytest.fixture(params=["llama", "gemma2", "gemma3"])
def folder(request):
    return request.getfixturevalue(f"tiny_{request.param}")

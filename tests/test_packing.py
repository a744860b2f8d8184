"""Packed rows equal padded ones, to the gradient; examples of a pack do not see one another; no T x T mask is
built.
"""

import pytest
import torch
from safetensors.torch import load_file
from test_loss import Largest
from test_run import recipe
from transformers import AttentionInterface, AutoModelForCausalLM

from codyra_llm.core.files import read_jsonl
from codyra_llm.data.batches import collate, example_weights
from codyra_llm.data.encoding import Encoded
from codyra_llm.experiment import run
from codyra_llm.models import packed_attention

LENGTHS = [(37, 4), (1, 2), (20, 3), (8, 9), (13, 3)]  # three of five are longer than the window of 16


def examples(lengths=LENGTHS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        Encoded(*(torch.randint(4, 300, (n,), generator=draw).tolist() for n in pair), False)
        for pair in lengths
    ]


def loaded(folder, dtype=torch.float64, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).train()


def batch(own, packed):
    chosen = list(range(len(own)))
    return collate(own, chosen, example_weights(own, chosen, "sample"), 0, packed)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = batch.cross_entropy(model)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(got, expected, rtol=1e-5, atol=1e-8):
    torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=atol)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=rtol, atol=atol)


@pytest.fixture(params=["llama", "gemma2", "gemma3"])
def folder(request):
    return request.getfixturevalue(f"tiny_{request.param}")


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


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma2"])
def test_a_packed_run_is_the_padded_run(name, request, toy_stream, tmp_path, monkeypatch):
    """Training, validation, the archived update and the answers. 150 tokens hold four examples or fewer."""
    model, logs, tensors, scores, calls = request.getfixturevalue(name), [], [], [], []
    packed = packed_attention.packed

    def counting(*args, **kwargs):
        calls.append(kwargs["segments"])
        return packed(*args, **kwargs)

    monkeypatch.setattr(packed_attention, "packed", counting)
    for kind in ("buckets", "packed"):
        assert not calls
        folder = run.run(
            recipe(
                model,
                toy_stream,
                tmp_path / kind,
                data__tasks=["THREE"],
                data__batching=kind,
                optim__micro_batch_tokens=150,
                optim__validate_every=3,
                checkpoint=False,
            )
        )
        logs.append(read_jsonl(folder.path / "log.jsonl"))
        tensors.append(load_file(folder.path / "updates" / "00-THREE.safetensors"))
        scores.append([row["score"] for row in folder.scores])
    assert max(map(len, calls)) > 1 and all(sum(segments) <= 150 for segments in calls)
    for key, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][key], tensor, rtol=2e-3, atol=2e-4)
    for key in ("loss", "grad_norm", "eval_loss"):
        one, two = ([row[key] for row in log if key in row] for log in logs)
        assert two == pytest.approx(one, rel=1e-4) and len(one) in (2, 6)
    assert scores[0] == scores[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma3"])
def test_the_kernel_itself(name, request):
    """bfloat16 on a GPU, through the kernel, against float64 on the CPU: as near as padding is, to a
    factor.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder, device, at = (
        request.getfixturevalue(name),
        torch.device("cuda"),
        "model.layers.0.self_attn.k_proj.weight",
    )
    exact = loss_and_gradients(loaded(folder), batch(examples(), False))[1][at]
    model, errors = loaded(folder, torch.bfloat16).to(device), []
    for packed in (False, True):
        if packed:
            assert packed_attention.pays(model, device)
            packed_attention.use(model)
        own = loss_and_gradients(model, batch(examples(), packed).to(device))[1][at]
        errors.append((own.cpu().double() - exact).norm() / exact.norm())
    assert errors[1] < max(2 * errors[0], 0.05), errors

"""The layer against the dense formula in float64, its archive, its merge."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from codyra_llm.core.errors import Fault
from codyra_llm.lora.function import Group, SharedLinears, shadow
from codyra_llm.lora.layer import AdapterSpec, LoraLinear, attach, sites
from codyra_llm.lora.merge import merged_weight, report
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.store.archive import Archive


def tensors(n=5, i=7, o=6, r=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=g, dtype=dtype) for s in ((n, i), (o, i), (o,)))
    a, w, b = (torch.randn(*s, generator=g, dtype=dtype) for s in ((r, i), (r,), (o, r)))
    return x, weight, bias, a, w, b


def ours(x, dropped, weight, bias, a, w, b, scale):
    """One layer through the function."""
    factors = [(a, w, b)]
    group = Group((lambda: weight,), (bias,), scale, shadow(factors, scale, x.dtype))
    return SharedLinears.apply(x, dropped, group, a, w, b)[0]


def dense(x, dropped, weight, bias, a, w, b, scale):
    """The definition, by autograd."""
    delta = scale * (b if w is None else b @ torch.diag(w)) @ a
    y = x @ weight.T + (x if dropped is None else dropped) @ delta.T
    return y if bias is None else y + bias


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_function_equals_the_dense_formula(weighted, dropout, biased):
    x, weight, bias, a, w, b = tensors()
    bias, w = bias if biased else None, w if weighted else None
    dropped = functional.dropout(x, 0.5) if dropout else None
    leaves = [t for t in (x, dropped, a, w, b) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    mine, theirs = (f(x, dropped, weight, bias, a, w, b, 1.7) for f in (ours, dense))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(mine)
    for left, right in zip(
        torch.autograd.grad(mine, leaves, seed), torch.autograd.grad(theirs, leaves, seed), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    x, weight, bias, a, w, b = tensors()
    for t in (x, a, w, b):
        t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, w, b: ours(x, None, weight, bias, a, w, b, 0.9), (x, a, w, b)
    )
    assert torch.autograd.gradcheck(
        lambda x, a, b: ours(x, x * 0.5, weight, None, a, None, b, 2.0), (x, a, b)
    )


def test_a_weight_of_zero_still_gets_gradient():
    x, weight, bias, a, w, b = tensors()
    w = torch.zeros_like(w).requires_grad_()
    ours(x, None, weight, None, a, w, b, 1.0).sum().backward()
    expected = ((x @ a.T) * (torch.ones(5, 6, dtype=torch.float64) @ b)).sum(0)
    torch.testing.assert_close(w.grad, expected)
    assert w.grad.abs().min() > 0


def test_backward_twice_and_double_use_of_an_input():
    x, weight, _, a, w, b = tensors()
    x.requires_grad_()

    def f(x):
        return ours(x, None, weight, None, a, w, b, 1.0)

    y = (f(x) * f(x)).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    reference = (dense(x, None, weight, None, a, w, b, 1.0) ** 2).sum()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, torch.autograd.grad(reference, x)[0])


def surviving(device: torch.device, ratio: float, n: int = 64, size: int = 256) -> float:
    """⟨y - y₀, exact⟩ / ‖exact‖² in bfloat16: the share of an update, `ratio` of W in norm, that is in y."""
    x, weight, _, a, w, b = tensors(n=n, i=size, o=size, r=8, dtype=torch.float32)
    b *= ratio * weight.norm() / ((b * w) @ a).norm()
    x, weight, a, w, b = (
        x.bfloat16().to(device),
        weight.bfloat16().to(device),
        *(t.to(device) for t in (a, w, b)),
    )

    def run(b):
        return ours(x, None, weight, None, a, w, b, 1.0).double()

    exact = x.double() @ ((b * w) @ a).double().T
    moved = run(b) - run(torch.zeros_like(b))
    return ((moved * exact).sum() / exact.square().sum()).item()


@pytest.mark.parametrize("ratio", [1e-4, 1e-3])
def test_small_updates_survive_in_bfloat16(ratio):
    """The adapter's product is rounded on its own grid, not on that of the frozen output: each element of the
    output is rounded, but over all of them the update must be there."""
    assert 0.95 < surviving(torch.device("cpu"), ratio) < 1.05


def test_layer_starts_as_the_plain_layer_and_keeps_its_state_dict_key():
    linear = nn.Linear(12, 10)
    model = nn.ModuleDict({"q_proj": linear})
    x = torch.randn(2, 3, 12)
    expected = linear(x)
    attach(model, ["q_proj"], AdapterSpec(rank=4, importance="normal"))
    layer = sites(model)["q_proj"]
    layer.reset(0, "q_proj")
    assert {"q_proj.weight", "q_proj.bias"} <= model.state_dict().keys()
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"q_proj.lora_{k}" for k in "ABw"]


def test_initialisation():
    layer = LoraLinear(nn.Linear(400, 300), AdapterSpec(rank=64, importance="normal", importance_value=2.0))
    layer.reset(7, 0, "site")
    a, w = layer.lora_A.detach().clone(), layer.lora_w.detach().clone()
    assert a.abs().max() <= 1 / 20 and a.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert w.std().item() == pytest.approx(2.0, rel=0.3) and not layer.lora_B.any()
    layer.reset(7, 0, "site")
    assert torch.equal(layer.lora_A, a)
    layer.reset(7, 1, "site")
    assert not torch.equal(layer.lora_A, a)


def test_unknown_target_is_named():
    with pytest.raises(Fault, match="no projection 'q_prj'.*q_proj"):
        attach(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}), ["q_prj"], AdapterSpec(1))


def update(seed, mode="add", scale=0.5):
    _, _, _, a, w, b = tensors(dtype=torch.float32, seed=seed)
    return Update({"s": Adapter(a, b, w if mode == "add" else None)}, scale, mode)


def test_archive_round_trip_lineage_and_merge(tmp_path):
    archive = Archive(tmp_path, "base")
    for seed in range(3):
        archive.append(f"T{seed}", update(seed))
    again = Archive(tmp_path, "base")
    assert again.tasks == ["T0", "T1", "T2"] and again.lineage == archive.lineage
    base = torch.randn(6, 7)

    def dense_sum(kept):
        return (
            base.double()
            + sum(
                0.5
                * (update(k).adapters["s"].b.double() * update(k).adapters["s"].w.double())
                @ update(k).adapters["s"].a.double()
                for k in kept
            )
        ).float()

    torch.testing.assert_close(merged_weight(base, again.terms(2), "s"), dense_sum([0, 1, 2]))
    torch.testing.assert_close(merged_weight(base, again.terms(1), "s"), dense_sum([0, 1]))
    torch.testing.assert_close(merged_weight(base, again.terms(2, without=1), "s"), dense_sum([0, 2]))
    torch.testing.assert_close(merged_weight(base, again.terms(2, without=2), "s"), dense_sum([0, 1]))
    assert torch.equal(merged_weight(base, again.terms(-1), "s"), base)


def test_factors_of_another_dtype_are_refused(tmp_path):
    """Before they are written: a merge would fail only when the next task loads the model."""
    wrong = Update({"s": Adapter(torch.ones(2, 7), torch.ones(6, 2).bfloat16(), None)}, 1.0)
    with pytest.raises(Fault, match="factor b of s is torch.bfloat16, expected torch.float32"):
        Archive(tmp_path, "base").append("T", wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("without", [0, 1, 2])
def test_without_a_task_of_one_growing_adapter(tmp_path, without):
    archive = Archive(tmp_path, "base")
    for seed in range(3):
        archive.append(f"T{seed}", update(seed, "replace"))

    def snapshot(k):
        return update(k, "replace").adapters["s"].delta(0.5) if k >= 0 else 0

    expected = snapshot(2) - (snapshot(without) - snapshot(without - 1))
    torch.testing.assert_close(merged_weight(torch.zeros(6, 7), archive.terms(2, without), "s"), expected)


def test_archive_refuses_another_base_a_missing_task_and_a_changed_file(tmp_path):
    archive = Archive(tmp_path, "base")
    archive.append("T0", update(0))
    path = archive.append("T1", update(1))
    with pytest.raises(Fault, match="this update was made on"):
        Archive(tmp_path, "other")
    with pytest.raises(Fault, match="'T9' is not a finished task"):
        archive.index("T9")
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Fault, match="does not match its hash"):
        Archive(tmp_path, "base").load(1)
    (tmp_path / "00-T0.safetensors").unlink()
    with pytest.raises(Fault, match="this update was made on"):
        Archive(tmp_path, "base")


@pytest.mark.parametrize("key, value", [("scale", "0.25"), ("mode", "replace"), ("sites", '["t"]')])
def test_what_an_update_s_header_says_is_part_of_its_hash(key, value, tmp_path):
    """Each of these changes what the tensors mean, and none of them the tensors."""
    path = Archive(tmp_path, "base").append("T0", update(0))
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header[key] != value
    save_file(load_file(path), path, {**header, key: value})
    with pytest.raises(Fault, match="does not match its hash"):
        Archive(tmp_path, "base").load(0)


@pytest.mark.parametrize("step, share", [(1.0, 1), (0.125, 0), (1.5, 4 / 3)])
def test_what_survives_a_cast_by_hand(step, share):
    """W = 1, above which the grid of bfloat16 has steps of 2⁻⁷: a change of a step stays, of an eighth of one
    is lost, and of one and a half becomes two. In front of it an update of two steps, which only drift
    counts."""

    def constant(value):
        factors = torch.full((1, 3), value), torch.ones(4, 1), None
        return Update({"s": Adapter(*factors)}, 2**-7)

    reader = SimpleNamespace(get=lambda name: torch.ones(4, 3) if name == "s.weight" else None)
    first, second = constant(2.0), constant(step)
    (row,) = report(reader, [first], [first, second], 5, torch.bfloat16, torch.device("cpu"))
    root = 12**0.5 * 2**-7
    assert (row.site, row.rank, row.kept) == ("s", 5, 1)
    assert row.update_norm == pytest.approx(step * root, rel=1e-5)
    assert row.drift == pytest.approx((2 + step) * root, rel=1e-5)
    assert row.surviving == pytest.approx(share, abs=1e-5)

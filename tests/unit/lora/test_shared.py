"""Layers that share an input, and the MLP as one function: against plain autograd, in operations, and in
bytes saved.
"""

import copy

import pytest
import torch
from fused import CONFIGS, IDS, adapted, distances, loss_and_gradients, saved_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from codyra_llm.lora.function import GatedMlp, Group, SharedLinears, shadow
from codyra_llm.lora.layer import sites
from codyra_llm.lora.shared import shared_inputs


@pytest.mark.parametrize("family", CONFIGS)
def test_fused_equals_plain_autograd(family):
    fused, eager = (adapted(CONFIGS[family], value) for value in (True, False))
    assert all("forward" in vars(layer.mlp) for layer in fused.model.layers)
    assert max(distances(loss_and_gradients(fused), loss_and_gradients(eager))) < 1e-12


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.3},
        {"importance": None},
        {"checkpointing": True},
        {"dropout": 0.3, "checkpointing": True},
        {"targets": ["q_proj", "v_proj"]},
        {"targets": ["gate_proj", "up_proj"]},
        {"targets": ["k_proj", "down_proj"]},
    ],
)
def test_fused_equals_plain_autograd_with(settings):
    fused, eager = (adapted(CONFIGS["llama"], value, **settings) for value in (True, False))
    assert max(distances(loss_and_gradients(fused), loss_and_gradients(eager))) < 1e-12


def test_grouping_changes_nothing_without_dropout():
    assert (
        max(
            distances(
                loss_and_gradients(adapted(CONFIGS["llama"], True)),
                loss_and_gradients(adapted(CONFIGS["llama"], None)),
            )
        )
        < 1e-12
    )


@pytest.mark.parametrize("kind", [{"dtype": torch.bfloat16}, {"dtype": torch.float32, "autocast": True}])
def test_low_precision_is_no_worse_than_plain_autograd(kind):
    """Distances to float64 of the fused and of the eager path, over all gradients together."""
    autocast = kind.get("autocast", False)
    exact = loss_and_gradients(adapted(CONFIGS["llama"], False))
    fused, eager = (
        sum(
            distances(
                loss_and_gradients(adapted(CONFIGS["llama"], value, dtype=kind["dtype"]), autocast), exact
            )
        )
        for value in (True, False)
    )
    assert 0 < fused < 1.1 * eager


def test_backward_twice_gives_the_same_and_shares_of_one_input_do_not_mix():
    model = adapted(CONFIGS["llama"], True)
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(2, 1, 5, 32, dtype=torch.float64)
    plain = copy.deepcopy(attention)
    for shared in shared_inputs(plain):
        for layer in shared.layers:
            type(shared)([layer])
    q, k = (
        attention.q_proj(x),
        attention.k_proj(other),
    )  # k is asked for another input, then v for the first again
    v, again = attention.v_proj(x), attention.q_proj(x)
    for mine, theirs in ((q, plain.q_proj(x)), (k, plain.k_proj(other)), (v, plain.v_proj(x)), (again, q)):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    x.mul_(2)  # changed in place between two calls: what was kept for it is stale
    torch.testing.assert_close(attention.k_proj(x), plain.k_proj(x), rtol=1e-12, atol=1e-12)
    loss = (attention.q_proj(x) * attention.q_proj(x)).sum()
    parameters = [attention.q_proj.lora_A, attention.q_proj.lora_w]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(a, b)


def test_a_copy_computes_with_its_own_weights():
    """Layers and their groups refer to each other, some weakly; a copy's are its own."""
    model = adapted(CONFIGS["llama"], True)
    copied = copy.deepcopy(model)
    assert torch.equal(model(IDS).logits, copied(IDS).logits)
    with torch.no_grad():
        for p in copied.model.layers.parameters():
            p.zero_()
    changed = copied(IDS).logits
    assert not torch.equal(model(IDS).logits, changed)
    del model
    assert torch.equal(copied(IDS).logits, changed)
    alone = copy.deepcopy(copied.model.layers[0].self_attn.q_proj)
    assert torch.equal(alone(torch.ones(1, 32, dtype=torch.float64)), torch.zeros(1, 32, dtype=torch.float64))


def test_shadows_follow_the_masters():
    model = adapted(CONFIGS["llama"], True, dtype=torch.float32)
    before = model(IDS).logits
    shared = shared_inputs(model)
    made = [dict(s._shadows) for s in shared]
    model(IDS)
    assert all(made) and all(
        s._shadows[key] is old[key] for s, old in zip(shared, made, strict=True) for key in old
    )  # not made again
    with torch.no_grad():
        for layer in sites(model).values():
            layer.lora_B.zero_()
    assert (model(IDS).logits - before).abs().max() > 1e-3
    zeroed = model(IDS).logits
    for layer in sites(model).values():
        layer.lora_B.data.fill_(0.1)  # past the version counters, as DeepSpeed does
    for s in shared:
        s.forget()
    assert (model(IDS).logits - zeroed).abs().max() > 1e-3


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shapes(n, width, outs, ranks, weighted, dropout, seed):
    """Any number of layers of any widths and ranks (k and v narrower than q; a rank of none), against the
    dense formula.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    x, scale = draw(n, width), 0.7
    dropped = (x * 1.5).detach().requires_grad_() if dropout else None
    weights = [draw(out, width).detach() for out in outs]
    factors = [
        (draw(r, width), draw(r) if weighted else None, draw(out, r))
        for out, r in zip(outs, ranks, strict=False)  # as many ranks as projections
    ]
    group = Group(
        tuple(lambda weight=weight: weight for weight in weights),
        (None,) * len(outs),
        scale,
        shadow(factors, scale, torch.float64),
    )
    flat = [t for triple in factors for t in triple]
    mine = SharedLinears.apply(x, dropped, group, *flat)
    source = x if dropped is None else dropped
    theirs = [
        x @ weight.T + scale * (source @ a.T * (1 if w is None else w)) @ b.T
        for weight, (a, w, b) in zip(weights, factors, strict=True)
    ]
    leaves = [t for t in (x, dropped, *flat) if t is not None]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)

    def total(ys):
        return sum((y * y).sum() for y in ys)

    for a, b in zip(
        torch.autograd.grad(total(mine), leaves), torch.autograd.grad(total(theirs), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradcheck_of_the_mlp():
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weights = [draw(5, 4), draw(5, 4), draw(4, 5)]
    factors = [
        t.requires_grad_() for w in weights for t in (draw(2, w.shape[1]), draw(2), draw(w.shape[0], 2))
    ]

    def run(x, *factors):
        triples = list(zip(factors[::3], factors[1::3], factors[2::3], strict=True))

        def make(at):
            return Group(
                tuple(lambda i=i: weights[i] for i in at),
                (None,) * len(at),
                0.8,
                shadow([triples[i] for i in at], 0.8, x.dtype),
            )

        return GatedMlp.apply(x, make([0, 1]), make([2]), nn.SiLU(), *factors)

    assert torch.autograd.gradcheck(run, (draw(3, 4).requires_grad_(), *factors))


class Operations(TorchDispatchMode):
    """Counts ATen calls by name while it is on."""

    def __enter__(self):
        self.counts = {}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self):
        return {name: self.counts.get(name, 0) for name in ("mm", "addmm", "addmm_")}


def test_products_per_block():
    """Forward: one product for H of each group, then two per layer. Backward: G, P and the frozen product per
    layer, Q and the adapters' part of dx per group. Nothing else multiplies matrices, and nothing is cast
    again."""
    model = adapted(CONFIGS["llama"], True, dtype=torch.bfloat16)
    block = model.model.layers[0]
    x = torch.randn(1, 6, 32, dtype=torch.bfloat16, requires_grad=True)

    def q_k_v():
        return [block.self_attn.q_proj(x), block.self_attn.k_proj(x), block.self_attn.v_proj(x)]

    q_k_v()  # shadows are made on the first call
    with Operations() as forward:
        outputs = q_k_v()
    assert forward.products == {"mm": 1 + 3, "addmm": 0, "addmm_": 3} and "_to_copy" not in forward.counts
    with Operations() as backward:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert backward.products == {"mm": 3 + 3 + 1 + 1, "addmm": 0, "addmm_": 3}
    block.mlp(x)
    with Operations() as forward:
        y = block.mlp(x)
    assert (
        forward.products == {"mm": (1 + 2) + (1 + 1), "addmm": 0, "addmm_": 3}
        and "_to_copy" not in forward.counts
    )
    with Operations() as backward:
        y.backward(torch.ones_like(y))
    assert backward.products == {"mm": (1 + 1 + 1 + 1) + (2 + 2 + 1 + 1), "addmm": 0, "addmm_": 3}


@pytest.mark.parametrize("rows", [6, 50])
def test_saved_bytes(rows):
    """q, k, v leave x and H [N, 3r]; the MLP leaves x, gate, up, H [N, 2r] and H of down [N, r]."""
    model = adapted(CONFIGS["llama"], True, dtype=torch.float32)
    block = model.model.layers[0]
    x = torch.randn(1, rows, 32, requires_grad=True)
    parameters = list(model.parameters())
    projections = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    attention = saved_bytes(lambda: [projection(x) for projection in projections], *parameters)
    assert attention == rows * (32 + 3 * 4) * 4
    assert saved_bytes(lambda: block.mlp(x), *parameters) == rows * (32 + 2 * 48 + 3 * 4) * 4
    eager = adapted(CONFIGS["llama"], False, dtype=torch.float32).model.layers[0]
    assert saved_bytes(lambda: eager.mlp(x), *parameters) > rows * (32 + 4 * 48) * 4

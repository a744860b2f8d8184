"""OSFT against PEFT's implementation of it, and what stays of W in both variants."""

import math
from types import SimpleNamespace

import pytest
import torch
from adapters import SIZES, attached
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.config.registry import METHODS
from codyra_llm.lora.layer import sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.projection.osft import Kept, preserved_rank, split_weight

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[1, 5, 9, 4, 7, 2], [1, 8, 3, 6, 11, 2]])
FIRST = SimpleNamespace(index=0)
START = SimpleNamespace(index=0, archive=None, state={})


def loss(model) -> torch.Tensor:
    logits = model(input_ids=IDS).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())


def peft_weights(path, share: float, steps: int) -> dict[str, torch.Tensor]:
    """W of every projection after `steps` of plain gradient descent by PEFT's OSF."""
    peft = pytest.importorskip("peft")
    plain = AutoModelForCausalLM.from_pretrained(path)
    config = peft.OSFConfig(target_modules=TARGETS, effective_rank=share)
    model = peft.get_peft_model(plain, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        gradients_into(loss(model), trained)
        descend(trained)
    merged = model.merge_and_unload()
    return {n: p.detach() for n, p in merged.named_parameters() if n.split(".")[-2] in TARGETS}


def gradients_into(value: torch.Tensor, trained: list) -> None:
    for p in trained:
        p.grad = None
    value.backward()


@torch.no_grad()
def descend(trained: list) -> None:
    for p in trained:
        p -= 5 * p.grad


def test_it_goes_where_pefts_goes(tiny_llama):
    """Four steps of gradient descent: gradients alone leave no step to project, so both are the same."""
    kind = METHODS["osft"]
    method = kind(kind.Config(preserved=0.5), 7)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    base = {site: model.get_parameter(f"{site}.weight").clone() for site in plain_sites(model)}
    at_first = loss(model).item()
    model.requires_grad_(False)
    method.attach(model)
    share_inputs(model)
    method.begin_task(model, FIRST)
    assert loss(model).item() == pytest.approx(at_first, rel=1e-6)
    layers = sites(model)
    trained = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_w, layer.lora_B)]
    for _ in range(4):
        gradients_into(loss(model), trained)
        method.edit_gradients(None)
        descend(trained)
        before = [p.clone() for p in trained]
        method.after_step(None)
        for p, q in zip(trained, before, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    adapters = {site: adapter(layer) for site, layer in layers.items()}
    ours = method.consolidate(adapters, 0).dense
    theirs = peft_weights(tiny_llama, 0.5, 4)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        moved = (weight - base[name.removesuffix(".weight")]).norm()
        assert moved > 1e-3
        assert (weight - theirs[name]).norm() < 1e-3 * moved, name


def plain_sites(model) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TARGETS]


def adapter(layer) -> Adapter:
    return Adapter(layer.lora_A.detach(), layer.lora_B.detach(), layer.lora_w.detach())


def test_the_split_is_the_whole():
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    split = split_weight(weight, 2)
    leading = split.kept.u @ (split.kept.u.T @ weight)
    torch.testing.assert_close(leading + split.u * split.s @ split.vt, weight)
    torch.testing.assert_close(leading, weight @ split.kept.v @ split.kept.v.T)
    assert [preserved_rank(8, share) for share in (0.0, 0.5, 0.99)] == [0, 4, 7]
    largest = math.nextafter(1, 0)
    assert [preserved_rank(size, largest) for size in (1, 3, 576, 4096)] == [0, 2, 575, 4095]


def test_an_adapter_starts_off_the_leading_directions_with_what_is_left_of_its_draw():
    method, model = attached("osft_lora")
    method.begin_task(model, FIRST)
    started = {site: layer.lora_A.detach().double().clone() for site, layer in sites(model).items()}
    for site, layer in sites(model).items():
        layer.reset(method.seed, 0, site)
        _, _, vt = torch.linalg.svd(layer.weight.double(), full_matrices=False)
        leading = vt[: preserved_rank(min(layer.weight.shape), 0.5)]
        drawn = layer.lora_A.detach().double()
        torch.testing.assert_close(started[site], drawn - drawn @ leading.T @ leading, rtol=0, atol=1e-6)
        assert (started[site] - drawn).norm() > 0.05


@pytest.mark.parametrize("name", ["osft", "osft_lora"])
def test_whatever_the_optimizer_does_the_leading_directions_stay(name):
    """U_hiᵀ W and W V_hi after a step in any direction are what they were."""
    method, model = attached(name) if name == "osft_lora" else whole()
    base = {site: layer.weight.double().clone() for site, layer in sites(model).items()}
    method.begin_task(model, FIRST)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.lora_A += torch.randn(layer.lora_A.shape, generator=draw)
            layer.lora_B += torch.randn(layer.lora_B.shape, generator=draw)
    method.after_step(None)
    for site, layer in sites(model).items():
        middle = layer.lora_B if layer.lora_w is None else layer.lora_B * layer.lora_w
        now = layer.weight.double() + layer.spec.scale * (middle @ layer.lora_A).double()
        u, _, vt = torch.linalg.svd(base[site], full_matrices=False)
        kept = preserved_rank(min(now.shape), 0.5)
        assert kept and (now - base[site]).norm() > 0.1
        torch.testing.assert_close(u[:, :kept].T @ now, u[:, :kept].T @ base[site], rtol=0, atol=1e-5)
        torch.testing.assert_close(now @ vt[:kept].T, base[site] @ vt[:kept].T, rtol=0, atol=1e-5)


def test_a_resumed_task_goes_on_from_the_same_split_where_singular_values_are_equal(monkeypatch):
    """Of an orthogonal W any directions may be the leading ones, and an SVD with other threads takes
    others: here one of W with noise in its last bits."""
    method, model = orthogonal()
    base = {site: layer.weight.clone() for site, layer in sites(model).items()}
    method.begin_task(model, FIRST)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.lora_B.mul_(1.25)  # what training might do
    adapters = {site: adapter(layer) for site, layer in sites(model).items()}
    saved = {name: tensor.clone() for name, tensor in method.progress().items()}
    expected = method.consolidate(adapters, 0).dense
    again, resumed = orthogonal()
    plain, draw = torch.linalg.svd, torch.Generator().manual_seed(5)

    def otherwise(weight, **given):
        noise = torch.randn(weight.shape, generator=draw)
        return plain(weight + 1e-7 * weight.norm() * noise, **given)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", otherwise)
        again.begin_task(resumed, FIRST)
    other = {site: high for site, (high, _) in again._high.items()}
    assert all((other[site] - saved[site]).norm() > 0.1 * saved[site].norm() for site in saved)
    again.resume(saved)
    for name, weight in again.consolidate(adapters, 0).dense.items():
        assert torch.equal(weight, expected[name])
    for site, layer in sites(resumed).items():
        assert torch.equal(layer.weight, sites(model)[site].weight)
        kept, before = again._kept[layer], method._kept[sites(model)[site]]
        torch.testing.assert_close(kept.u @ kept.u.T, before.u @ before.u.T, rtol=0, atol=1e-5)
        torch.testing.assert_close(kept.v @ kept.v.T, before.v @ before.v.T, rtol=0, atol=1e-5)
        assert (expected[f"{site}.weight"] - base[site]).norm() > 0.1


def test_a_resumed_adapter_is_off_the_same_directions_where_singular_values_are_equal():
    """Directions that another SVD would take have nothing to do with those that the factors left alone."""
    method, model = orthogonal_lora()
    method.begin_task(model, START)
    train_a_step(method, model)
    saved = {name: tensor.clone() for name, tensor in method.progress().items()}
    factors = {site: (layer.lora_A.clone(), layer.lora_B.clone()) for site, layer in sites(model).items()}
    again, resumed = orthogonal_lora()
    again.begin_task(resumed, START)
    layers = sites(resumed)
    with torch.no_grad():
        for site, (a, b) in factors.items():
            layers[site].lora_A.copy_(a)
            layers[site].lora_B.copy_(b)
            _, k = again._kept[layers[site]].u.shape
            u, _, vt = torch.linalg.svd(torch.randn(layers[site].weight.shape), full_matrices=False)
            again._kept[layers[site]] = Kept(u[:, :k], vt[:k].T)
    again.resume(saved)
    again.after_step(None)
    for site, (a, b) in factors.items():
        assert a.norm() > 0.1 and b.norm() > 0.1
        torch.testing.assert_close(layers[site].lora_A, a, rtol=0, atol=1e-5)
        torch.testing.assert_close(layers[site].lora_B, b, rtol=0, atol=1e-5)
        kept, before = again._kept[layers[site]], method._kept[sites(model)[site]]
        assert torch.equal(kept.u, before.u) and torch.equal(kept.v, before.v)


@torch.no_grad()
def train_a_step(method, model) -> None:
    """What training might do to the factors."""
    for layer in sites(model).values():
        layer.lora_A += torch.randn(layer.lora_A.shape)
        layer.lora_B += torch.randn(layer.lora_B.shape)
    method.after_step(None)


def orthogonal_lora():
    """`osft_lora` on the three layers of `attached`, with weights whose singular values are all 1."""
    torch.manual_seed(0)
    model = nn.ModuleDict({site: nn.Linear(*size, bias=False) for site, size in SIZES.items()})
    for layer in model.values():
        nn.init.orthogonal_(layer.weight)
    kind = METHODS["osft_lora"]
    method = kind(kind.Config(targets=list(SIZES), rank=2), 7)
    method.attach(model)
    return method, model


def orthogonal():
    """`whole` with weights whose singular values are all 1."""
    method, model = whole()
    for layer in sites(model).values():
        nn.init.orthogonal_(layer.weight)
    return method, model


def whole():
    """`osft` on the three layers of `attached`."""
    torch.manual_seed(0)
    model = nn.ModuleDict({site: nn.Linear(*size, bias=False) for site, size in SIZES.items()})
    kind = METHODS["osft"]
    method = kind(kind.Config(targets=list(SIZES)), 7)
    method.attach(model)
    return method, model

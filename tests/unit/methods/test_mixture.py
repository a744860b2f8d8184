"""Methods that keep an adapter per task and weigh them by the prompt: single, color, hidelora, sapt,
duallora.
"""

import warnings
from dataclasses import replace

import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn
from torch.nn import functional

from codyra_llm.data.batches import collate
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import AdapterSpec
from codyra_llm.lora.mixture import MixtureLinear, select, weigh
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.experts.duallora import DualLinear, gate_by
from codyra_llm.methods.experts.identity import Gaussians
from codyra_llm.methods.parts.features import kmeans, prompt_mask


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def layer(request):
    """A mixing layer of three adapters, two of them held, in float64."""
    torch.manual_seed(0)
    made = MixtureLinear(nn.Linear(5, 7, bias=request.param).double(), AdapterSpec(2, 1.5))
    made.hold([Adapter(torch.randn(k, 5).double(), torch.randn(7, k).double(), None) for k in (2, 3)])
    nn.init.normal_(made.lora_A), nn.init.normal_(made.lora_B)
    return made


def dense(layer, x, m):
    """The same row by row from whole matrices ΔW."""
    pairs = zip(
        [*layer.old_a.split([2, 3]), layer.lora_A],
        [*layer.old_b.split([2, 3], 1), 1.5 * layer.lora_B],
        strict=True,
    )
    deltas = torch.stack([b @ a for a, b in pairs])
    rows = [
        row @ (layer.weight + torch.einsum("k,koi->oi", weights, deltas)).T
        for row, weights in zip(x, m, strict=True)
    ]
    return torch.stack(rows) + (0 if layer.bias is None else layer.bias)


def test_mixture_is_the_dense_formula_row_by_row(layer):
    x, m = torch.randn(4, 3, 5).double().requires_grad_(), torch.rand(4, 3).double().requires_grad_()
    weigh(layer, m)
    out, expected = layer(x), dense(layer, x, m)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(out)
    trained = (x, m, layer.lora_A, layer.lora_B)
    for own, true in zip(*(torch.autograd.grad(y, trained, direction) for y in (out, expected)), strict=True):
        torch.testing.assert_close(own, true, rtol=1e-11, atol=1e-11)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    chosen = torch.tensor([3, 1])
    select(layer, chosen)
    torch.testing.assert_close(layer(x[chosen]), expected[chosen], rtol=1e-12, atol=1e-12)
    weigh(layer, None)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


def test_dual_layer_gates_each_row_by_its_prompt():
    torch.manual_seed(0)
    layer = DualLinear(nn.Linear(6, 5).double(), AdapterSpec(5, 2.0))
    layer.hold([Adapter(torch.randn(3, 6).double(), torch.randn(5, 3).double(), None)])
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    x, lengths = torch.randn(2, 4, 6).double().requires_grad_(), (3, 1)
    gate_by(layer, torch.tensor([[True] * n + [False] * (4 - n) for n in lengths]))
    gates, expected = [], []
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    for row, n in zip(x.detach(), lengths, strict=True):
        mean = row[1:n].mean(0) if n > 1 else row[0]
        rho = (
            torch.stack([(layer.old_a @ mean).square().sum(), (a[2:] @ mean).square().sum()])
            / mean.square().sum()
        )
        gates.append(rho / rho.sum())
        delta = (
            2 * (b[:, :2] @ a[:2] + gates[-1][1] * b[:, 2:] @ a[2:])
            + gates[-1][0] * layer.old_b @ layer.old_a
        )
        expected.append(row @ (layer.weight + delta).T + layer.bias)
    torch.testing.assert_close(layer(x), torch.stack(expected), rtol=1e-6, atol=1e-6)  # gates are float32
    torch.testing.assert_close(layer.rows[:, [0, 2]].double(), torch.stack(gates), rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.rows[:, 1], torch.ones(2))
    layer.prompts = None
    torch.testing.assert_close(layer(x[:, :1]), torch.stack(expected)[:, :1], rtol=1e-6, atol=1e-6)


def test_gates_of_a_dual_layer_are_those_at_test_under_dropout_too():
    torch.manual_seed(0)
    layer = DualLinear(nn.Linear(6, 5).double(), AdapterSpec(4, 2.0, dropout=0.5))
    layer.hold([Adapter(torch.randn(3, 6).double(), torch.randn(5, 3).double(), None)])
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    x, gates = torch.randn(2, 4, 6).double(), []
    for training in (True, False):
        gate_by(layer, torch.ones(2, 4, dtype=torch.bool))
        out = layer.train(training)(x)
        gates.append(layer.rows)
    assert torch.equal(*gates)
    layer.prompts = None  # with the gates that were taken, dropout alone makes the difference
    assert not torch.allclose(layer.train()(x), out) and torch.equal(layer.eval()(x), out)


def test_what_a_prompt_is_does_not_depend_on_which_of_its_turns_are_learnt():
    """In training as at test it is all that stands before the answer."""
    chats = [Encoded([1, 5, 6, 7, 8], [9, 2], False, turns=((2, 4),)), Encoded([1, 5, 6], [7, 8, 2], False)]
    plain = [replace(chat, turns=()) for chat in chats]
    learnt, last = (collate(encoded, [0, 1], [0.5, 0.5], 0) for encoded in (chats, plain))
    assert torch.equal(prompt_mask(learnt), prompt_mask(last))
    assert prompt_mask(learnt).sum(1).tolist() == [len(prompt) for prompt in learnt.prompts] == [5, 3]
    assert learnt.labelled == [4, 3] and last.labelled == [2, 3]


def test_kmeans_finds_the_blobs_and_is_a_fixed_point():
    draw = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 3, generator=draw).double()
    x = (centres[:, None] + 0.1 * torch.randn(4, 30, 3, generator=draw).double()).flatten(0, 1)
    found = kmeans(x, 4, "test")
    nearest = torch.cdist(x, found).argmin(1)
    assert len({tuple(part.tolist()) for part in nearest.view(4, 30)}) == 4 and torch.equal(
        found, kmeans(x, 4, "test")
    )
    torch.testing.assert_close(found, torch.stack([x[nearest == c].mean(0) for c in range(4)]))


def test_kmeans_of_fewer_points_than_centroids_says_nothing():
    """Some centroids coincide, each on a point."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double().repeat(3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kmeans(x, 4, "test")
    assert found.unique(dim=0).tolist() == [[1, 2], [3, 4]] and len(found) == 4


def test_kmeans_ends_at_a_fixed_point():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(1)).double()
    found = kmeans(x, 4, "test")
    nearest = torch.cdist(x, found).argmin(1)
    torch.testing.assert_close(found, torch.stack([x[nearest == c].mean(0) for c in range(4)]))


def test_discriminant_analysis_is_the_largest_likelihood():
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=draw).double()
    tasks = [
        torch.randn(n, 4, generator=draw).double() @ mix + torch.randn(4, generator=draw).double()
        for n in (30, 20, 40)
    ]
    gaussians = Gaussians.load({})
    for x in tasks:
        gaussians = Gaussians.load(gaussians.with_task(x).state())  # by way of the stored form
    pooled = sum((x - x.mean(0)).T @ (x - x.mean(0)) for x in tasks) / (90 - 3)
    shrunk = 0.8 * pooled + 0.2 * pooled.trace() / 4 * torch.eye(4)
    points = torch.cat(tasks)
    likelihoods = torch.stack(
        [torch.tensor(multivariate_normal(x.mean(0), shrunk).logpdf(points)) for x in tasks], 1
    )
    own = gaussians.classifier(0.2)(points)
    assert torch.equal(own, likelihoods.argmax(1)) and own.unique().numel() == 3
    assert not torch.equal(own, torch.cdist(points, torch.stack([x.mean(0) for x in tasks])).argmin(1))

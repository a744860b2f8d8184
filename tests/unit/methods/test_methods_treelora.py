"""TreeLoRA, as the paper and as the released code have it: selection, surrogate, and the loop."""

import math
from types import SimpleNamespace

import pytest
import torch
from adapters import SIZES, a_task, attached, drawn

from codyra_llm.lora.layer import sites
from codyra_llm.methods.regularised.tree import Bandit, grow
from codyra_llm.methods.regularised.treelora import blend, distance
from codyra_llm.methods.regularised.treelora_repo import Draw


def test_the_bandit_finds_the_nearest_task():
    draw = torch.Generator().manual_seed(0)
    signatures = torch.randn(6, 400, generator=draw)
    wanted = signatures[4] + 0.3 * torch.randn(400, generator=draw)
    signatures[5] = signatures[4] + 2.0 * torch.randn(400, generator=draw)
    unit = signatures / signatures.abs().sum(1, keepdim=True)
    bandit, picks = Bandit(unit, 0.3), []
    for _ in range(200):
        picks.append(bandit.select())
        bandit.observe(picks[-1], distance(wanted, signatures[picks[-1]]).item())
    assert set(picks) == set(range(6)) and picks[100:].count(4) > 60
    counts = torch.bincount(torch.tensor(picks), minlength=6)
    assert counts.argmax() == 4
    only = Bandit(unit[:1], 2.0)
    assert [only.select() for _ in range(3)] == [0, 0, 0]


def test_the_distance_by_hand():
    """½ ℓ1 between vectors of ℓ1 norm 1: 0 for one direction, 1 for opposite ones."""
    a = torch.tensor([3.0, 1.0])
    others = torch.tensor([[6.0, 2.0], [-3.0, -1.0], [1.0, 3.0], [0.0, 0.0]])
    assert distance(a.expand(4, 2), others).tolist() == [0.0, 1.0, 0.5, 0.5]


def test_a_node_s_spread_is_the_largest_cost_between_two_of_its_arms():
    """By which the costs of its arms can differ: the bound is that of the bandit's costs, half of ℓ1."""
    signatures = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).double()
    signatures /= signatures.abs().sum(1, keepdim=True)
    nodes = [grow(signatures, list(range(6)))]
    for node in nodes:
        nodes += node.children
        apart = [distance(signatures[i], signatures[k]).item() for i in node.arms for k in node.arms]
        assert node.spread == pytest.approx(max(apart))
    assert len(nodes) == 11  # six leaves, of one arm each


def test_blend():
    g, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.1])
    torch.testing.assert_close(blend(g, other, 0.2), torch.tensor([2.4, 3.2 + 1.0]))
    assert torch.equal(blend(g, torch.zeros(2), 0.2), g) and torch.equal(blend(g, other, 0.0), g)


def test_treelora_leans_to_the_planted_task_and_keeps_the_mean_of_the_last_epoch():
    method, model = attached("treelora", weight=0.25, exploration=0.1)
    layers, sizes = sites(model), {site: 3 * (i + o) for site, (i, o) in SIZES.items()}
    draw = torch.Generator().manual_seed(5)
    planted_at = {"q_proj": 0, "v_proj": 2, "down_proj": 1}
    old = {site: torch.randn(3, n, generator=draw) for site, n in sizes.items()}
    method.begin_task(model, a_task(0, epochs=2))
    method.begin_task(model, a_task(0, epochs=2))
    with pytest.MonkeyPatch.context() as patch:  # a later task without an archive: the adapter stays as it is
        patch.setattr("codyra_llm.methods.sequential.seqlora.restore", lambda *_: None)
        method.begin_task(model, a_task(3, SimpleNamespace(load=lambda _: None), old, epochs=2))
    seen, leaned = {site: [] for site in layers}, {site: [] for site in layers}
    for step in range(60):
        method.before_step([], step, 60, "constant")
        for site, layer in layers.items():
            g = old[site][planted_at[site]] + 0.5 * torch.randn(sizes[site], generator=draw)
            seen[site].append(g)
            layer.lora_A.grad, layer.lora_B.grad = (
                part.view_as(p)
                for part, p in zip(
                    g.clone().split([layer.lora_A.numel(), layer.lora_B.numel()]),
                    (layer.lora_A, layer.lora_B),
                    strict=True,
                )
            )
        method.edit_gradients(None)
        for site, layer in layers.items():
            written = torch.cat([layer.lora_A.grad.flatten(), layer.lora_B.grad.flatten()])
            to = [(written - blend(seen[site][-1], o, 0.25)).norm().item() < 1e-4 for o in old[site]]
            assert sum(to) == 1
            leaned[site].append(to.index(True))
    assert all(leaned[site][20:].count(planted_at[site]) > 30 for site in layers)
    state = method.end_task(model, a_task(3), None)
    for site in layers:
        torch.testing.assert_close(state[site][:3], old[site])
        torch.testing.assert_close(state[site][3], torch.stack(seen[site][30:]).mean(0))


def _released_tree(t, dots):
    """Its two parts of the tasks, each with the median that divides it; `dots(tasks, level)` by signature."""

    def lower_median(values):
        return sorted(values)[(len(values) - 1) // 2]

    if t == 1:
        return []
    root = dots(range(t), 0)
    cut = lower_median(root)
    sides = [i for i in range(t) if root[i] >= cut], [i for i in range(t) if root[i] < cut]
    children = []
    for part in sides if all(sides) else (list(range(t // 2)), list(range(t // 2, t))):
        children.append((part, lower_median(dots(part, 1)) if len(part) > 1 else None))
    return children


def released(saved, vs, steps, draws):
    """The released loop in plain scalars: the tasks drawn in every step, and the last accumulated
    signature.
    """
    t, depth, _ = saved.shape
    n_sel, sim = [[0] * depth for _ in range(t)], [[0.0] * depth for _ in range(t)]
    cur, out = torch.zeros_like(vs[0]), []
    diffs = [saved[0]] + [saved[i] - saved[i - 1] for i in range(1, t)]

    def dots(tasks, level):
        mean = sum(diffs[i][level] for i in tasks) / len(tasks)
        return [float(diffs[i][level] @ mean) for i in tasks]

    def exponentials(values):
        return [math.exp(x - max(values)) for x in values]

    def choose(weights, u):
        total, at = 0.0, 0
        for at, w in enumerate(weights):
            total += w / sum(weights)
            if u < total:
                return at
        return at

    children = _released_tree(t, dots)
    for tau, (v, u) in enumerate(zip(vs, draws, strict=True)):
        for _ in range(depth):
            cur = cur + v / steps
        s = [[0.0] * depth for _ in range(t)]
        for k in range(t):
            for d in range(depth):
                m = sim[k][d] / max(n_sel[k][d], 1)
                top = math.sqrt(math.log(2 * steps * (tau + 1) * (tau + 2)))
                s[k][d] = -(m - top / math.sqrt(2 * n_sel[k][d] + 1e-5))
        low = min(map(min, s))
        s = [[x + low for x in row] for row in s]
        rows = [sum(row) for row in s]
        first = choose(exponentials(rows), u[0])
        for part, median in children:
            if first in part:
                for k in part:
                    s[k] = [x * min(median or 1, 1.5) for x in s[k]]
        width = max(map(max, s)) - min(map(min, s)) + 1e-5
        s = [[x / width for x in row] for row in s]
        picked = []
        for d in range(depth):
            k = choose(exponentials([s[j][d] for j in range(t)]), u[1 + d])
            n_sel[k][d] += 1
            sim[k][d] -= float((cur[d] - saved[k][d]).abs().sum())
            picked.append(k)
        out.append(picked)
    return out, cur


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
def test_repo_mode_is_the_released_loop(tasks):
    draw = torch.Generator().manual_seed(tasks)
    saved = torch.randn(tasks, 4, 7, generator=draw).double()
    vs = [torch.randn(4, 7, generator=draw).double() for _ in range(12)]
    uniform = [torch.rand(5, generator=torch.Generator().manual_seed(100 + i)).double() for i in range(12)]
    expected, cur = released(saved, vs, 12, uniform)
    mine, found = Draw(saved, 12), []
    mine.pulls, mine.similarity = mine.pulls.double(), mine.similarity.double()
    for i, v in enumerate(vs):
        mine.add(v)
        signatures = mine.signatures(torch.Generator().manual_seed(100 + i))
        found.append(
            [next(k for k in range(tasks) if torch.equal(signatures[d], saved[k, d])) for d in range(4)]
        )
    assert found == expected and (tasks == 1 or len({k for picked in found for k in picked}) > 1)
    torch.testing.assert_close(mine.current, cur)


def test_repo_mode_regulariser_and_ramp():
    method, model = attached("treelora_repo", weight=0.5)
    state = {site: torch.randn(2, 3 * i) for site, (i, _) in SIZES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codyra_llm.methods.sequential.seqlora.restore", lambda *_: None)
        method.begin_task(model, a_task(2, SimpleNamespace(load=lambda _: None), state, epochs=2))
    drawn(model, 4)
    batch = SimpleNamespace(cross_entropy=lambda m: torch.tensor(3.0))
    for step in range(8):
        method.before_step([], step, 8, "constant")
        terms = method.loss(model, batch)
        if step % 4 == 0:
            assert terms.keys() == {"loss"}  # the ramp starts again in every epoch
            continue
        ramp = 0.5 * (step % 4) / 4
        assert terms["treelora"].item() == pytest.approx(-3.0 * ramp)
        model.zero_grad()
        terms["treelora"].backward()
        previous = {
            site: p[d]
            for group, p in zip(method._groups, method._previous, strict=True)
            for d, site in enumerate(group)
        }
        s = sum((layer.lora_A.flatten() @ previous[site]).item() for site, layer in sites(model).items())
        for site, layer in sites(model).items():
            slope = -3.0 * ramp * previous[site] / s
            torch.testing.assert_close(layer.lora_A.grad.flatten(), slope, rtol=1e-4, atol=1e-6)
            assert any(torch.equal(previous[site], old) for old in state[site])
    model.eval()
    assert method.loss(model, batch).keys() == {"loss"}

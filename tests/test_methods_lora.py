"""Methods that constrain a LoRA adapter: each against its definition, against seqlora, and through a killed run."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from codyra_llm import attention
from codyra_llm import recipe as recipes
from codyra_llm import run as runs
from codyra_llm.errors import Fault
from codyra_llm.files import read_jsonl
from codyra_llm.lora.archive import Adapter, Archive, Update
from codyra_llm.lora.layer import sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.methods import METHODS
from codyra_llm.methods.base import Task
from codyra_llm.methods.hidelora import contrast
from codyra_llm.methods.inflora import covariances, loaded
from codyra_llm.methods.subspace import Subspace
from codyra_llm.methods.tree import Bandit
from codyra_llm.methods.treelora import blend, distance
from codyra_llm.methods.treelora_repo import Draw
from codyra_llm.optim import released_threshold
from codyra_llm.setup import prepare

TASKS = ["ONE", "TWO", "THREE"]
METHOD_SETTINGS = {
    "olora": {}, "sora": {}, "inflora": {"layers_at_once": 1}, "treelora": {"weight": 0.5},
    "treelora_repo": {"weight": 5.0}, "hidelora_treelora_repo": {}, "clora": {}}


@pytest.fixture(scope="module")
def run(tiny_llama, toy_stream, tmp_path_factory):
    """Function from a method's section to its finished run, each made once."""
    made = {}

    def finished(method):
        key = json.dumps(method, sort_keys=True)
        if key not in made:
            made[key] = runs.run(recipe(tiny_llama, toy_stream, tmp_path_factory.mktemp("runs") / "run", method))
        return made[key]
    return finished


def recipe(model, stream, out, method):
    return recipes.parse({
        "model": {"path": str(model)}, "data": {"root": str(stream), "tasks": TASKS, "epochs": 2},
        "method": {"rank": 4, **method}, "optim": {"lr": 1e-2, "batch_size": 8}, "output": str(out),
        "checkpoint": False, "eval": {"max_new_tokens": 2, "max_examples": 1}})


def baseline(name):
    """The seqlora that `name` is an addition to: with a fresh adapter per task, or with one for all."""
    return {"name": "seqlora", "fresh": True} if METHODS[name].Config().fresh else {"name": "seqlora"}


def tensors(folder):
    return {f"{f.name} {key}": value for f in sorted((folder.path / "updates").glob("*.safetensors"))
            for key, value in load_file(f).items()}


def losses(folder):
    return [row["loss"] for row in read_jsonl(folder.path / "log.jsonl")]


def assert_equal(one, two):
    assert losses(one) == losses(two) and len(losses(one)) == 18
    a, b = tensors(one), tensors(two)
    for key, value in a.items():
        assert key.endswith(".w") or torch.equal(value, b[key]), key


@pytest.mark.parametrize("name", METHOD_SETTINGS)
def test_stopped_after_two_tasks_and_started_again_equals_straight_through(name, run, tiny_llama, toy_stream, tmp_path):
    method = {"name": name, **METHOD_SETTINGS[name]}
    straight = run(method)
    shutil.copytree(straight.path, tmp_path / "run")
    for file in tmp_path.glob("run/*/02-THREE*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    (tmp_path / "run" / "state" / "02.safetensors").unlink(missing_ok=True)
    for lines in ("scores.jsonl", "log.jsonl"):
        rows = read_jsonl(straight.path / lines)
        kept = [row for row in rows if "THREE" not in (row["task"], row.get("after"))]
        assert len(kept) < len(rows)
        (tmp_path / "run" / lines).write_text("".join(json.dumps(row) + "\n" for row in kept))
    again = runs.run(recipe(tiny_llama, toy_stream, tmp_path / "run", method))
    assert_equal(straight, again)
    one, two = (load_file(f.state(2)) if f.state(2).is_file() else {} for f in (straight, again))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", METHOD_SETTINGS)
def test_it_is_not_seqlora(name, run):
    """With its weight on, what later tasks leave is not what seqlora leaves."""
    plain = run(baseline(name))
    own = run({"name": name, **METHOD_SETTINGS[name]})
    assert losses(own)[8:12] != losses(plain)[8:12]
    assert all(math.isfinite(x) for x in losses(own)) and losses(own)[11] < losses(own)[6]


@pytest.mark.parametrize("method", [
    {"name": "olora", "lambda_orthogonal": 0.0}, {"name": "olora", "lambda_orthogonal": 0.0, "fresh": False},
    {"name": "treelora", "weight": 0.0},
    {"name": "sora", "kappa": 0.0, "gate_init": "constant", "gate_lr": 0.0}, {"name": "treelora_repo", "weight": 0.0},
    {"name": "hidelora_treelora_repo", "weight": 0.0}], ids=lambda m: m["name"])
def test_without_its_weight_it_is_seqlora_step_by_step(method, run):
    same = baseline(method["name"]) if method.get("fresh", True) else {"name": "seqlora"}
    assert_equal(run(same), run(method))


# --- on single layers -------------------------------------------------------------------------------------------------

SIZES = {"q_proj": (6, 5), "v_proj": (6, 3), "down_proj": (8, 6)}  # (in, out)


def attached(name, seed=0, **config):
    """A method on three linear layers of two input sizes, drawn adapters with B ≠ 0, and its model."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({site: nn.Linear(*size, bias=False) for site, size in SIZES.items()})
    kind = METHODS[name]
    method = kind(kind.Config(**{"rank": 3, "targets": list(SIZES), **config}), 7)
    method.attach(model)
    return method, model


def a_task(index, archive=None, state=None, epochs=1):
    return Task(index, archive, SimpleNamespace(epochs=[epochs] * 9, tasks=TASKS), None, None, state or {})


def drawn(model, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.lora_A.normal_(generator=draw)
            layer.lora_B.normal_(generator=draw)


@pytest.fixture
def two_updates(tmp_path):
    draw = torch.Generator().manual_seed(1)
    archive = Archive(tmp_path / "updates", "base")
    for task in TASKS[:2]:
        factors = {site: (torch.randn(3, i, generator=draw), torch.randn(o, 3, generator=draw))
                   for site, (i, o) in SIZES.items()}
        archive.append(task, Update({site: Adapter(a, b, None) for site, (a, b) in factors.items()}, 2.0))
    return archive


@pytest.mark.parametrize("kind", ["abs", "squared"])
def test_olora_penalty_and_its_gradient(kind, two_updates):
    method, model = attached("olora", overlap=kind, lambda_orthogonal=0.3, lambda_norm=0.2)
    method.begin_task(model, a_task(0))
    assert "orthogonal" not in method.penalty(model)
    method.begin_task(model, a_task(1, two_updates))
    assert method.penalty(model)["orthogonal"] > 0
    sum(method.penalty(model).values()).backward()
    assert all(layer.lora_B.grad.eq(0).all() for layer in sites(model).values()), "B = 0 has a norm but no slope"
    method.begin_task(model, a_task(2, two_updates))
    drawn(model, 2)
    model.zero_grad()
    found = method.penalty(model)
    sum(found.values()).backward()
    value, norms = 0.0, 0.0
    for site, layer in sites(model).items():
        old = torch.cat([two_updates.load(k).adapters[site].a for k in range(2)]).double()
        a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        products = old @ a.T
        value += (products.abs() if kind == "abs" else products**2).sum()
        norms += a.norm() + b.norm()
        slope = products.sign().T @ old if kind == "abs" else 2 * products.T @ old
        torch.testing.assert_close(layer.lora_A.grad.double(), 0.3 * slope + 0.2 * a / a.norm(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.lora_B.grad.double(), 0.2 * b / b.norm(), rtol=1e-5, atol=1e-6)
    assert found["orthogonal"].item() == pytest.approx(0.3 * value.item())
    assert found["norm"].item() == pytest.approx(0.2 * norms.item())


def test_merged_old_adapters_equal_concatenated_ones(two_updates):
    """y = W x + s·[B_0 B_1][A_0; A_1] x + s·B A x, the form of the paper, is the merged W with the new adapter."""
    method, model = attached("olora", alpha=6.0)
    method.begin_task(model, a_task(2, two_updates))
    drawn(model, 3)
    for site, layer in sites(model).items():
        x = torch.randn(4, layer.in_features)
        parts = [two_updates.load(k).adapters[site] for k in range(2)]
        a, b = torch.cat([p.a for p in parts] + [layer.lora_A]), torch.cat([p.b for p in parts] + [layer.lora_B], 1)
        whole = x @ layer.weight.T + 2.0 * x @ a.T @ b.T
        with torch.no_grad():
            layer.weight += sum(p.delta(2.0) for p in parts)
        torch.testing.assert_close(layer(x), whole, rtol=1e-4, atol=1e-4)


def test_sora_threshold_is_the_three_lines():
    grid, kappa = torch.linspace(-3, 3, 600), 0.7  # meets no multiple of κ
    expected = grid.clone()
    expected[expected > kappa] -= kappa
    expected[expected < -kappa] += kappa
    expected[expected.abs() < kappa] = 0
    torch.testing.assert_close(released_threshold(grid, kappa), expected)
    assert (expected[grid.abs() < 2 * kappa] == 0).all()


def test_sora_trains_on_from_all_ranks_and_archives_those_not_zero(run):
    folder = run({"name": "sora", "kappa": 0.05})
    for index in range(3):
        state, update = load_file(folder.state(index)), folder.archive().load(index)
        kept = [len(x.a) for x in update.adapters.values()]
        assert update.mode == "replace" and 0 < sum(kept) < 4 * len(kept)
        for site, pruned in update.adapters.items():
            whole = Adapter(*(state[f"{site}.lora_{key}"] for key in "ABw"))
            assert len(whole.a) == 4 and len(pruned.a) == whole.w.count_nonzero()
            torch.testing.assert_close(pruned.delta(1.0), whole.delta(1.0))


def test_clora_is_the_dense_formula_and_keeps_what_is_old():
    method, model = attached("clora", alpha=6.0, weight=0.4, factor_lr=0.1)
    method.begin_task(model, a_task(0))
    layer = sites(model)["q_proj"]
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    assert layer.lora_B.any() and not method.penalty(model)
    with torch.no_grad():
        layer.lora_w.normal_()  # no forget(): another version of R must make another product
    a, b, r = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.lora_w))
    y = x.double() @ (layer.weight.double() + 2.0 * b @ r @ a).T
    torch.testing.assert_close(layer(x), y.float(), rtol=1e-5, atol=1e-5)
    layer(x).square().sum().backward()
    y.square().sum().backward()
    for own, dense in zip((layer.lora_A, layer.lora_B, layer.lora_w), (a, b, r)):
        torch.testing.assert_close(own.grad, dense.grad.float(), rtol=1e-4, atol=1e-4)
    state = method.end_task(model, a_task(0), None)
    method.begin_task(model, a_task(1, state=state))
    groups = method.param_groups(model, 1.0)
    assert [g["lr"] for g in groups] == [1.0, 0.1]
    before = state["q_proj.lora_w"].clone()
    with torch.no_grad():
        layer.lora_w.add_(0.1)
    expected = 0.4 * (before.double().T @ torch.full((3, 3), 0.1, dtype=torch.float64)).square().sum()
    assert method.penalty(model)["routing"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.equal(state["q_proj.lora_w"], before) and not torch.equal(layer.lora_w, before)
    adapter = Adapter(layer.lora_A.detach(), layer.lora_B.detach(), layer.lora_w.detach())
    plain = method.consolidate({"q_proj": adapter}, 1).adapters["q_proj"]
    torch.testing.assert_close(plain.delta(2.0), 2.0 * adapter.b @ adapter.w @ adapter.a)


def test_clora_freezes_the_shared_factors_after_the_first_task(run):
    folder = run({"name": "clora"})
    first, last = (load_file(folder.state(i)) for i in (0, 2))
    same = {key: torch.equal(first[key], last[key]) for key in first}
    assert all(equal == (not key.endswith("w")) for key, equal in same.items())


def test_hidelora_contrast():
    a = torch.randn(2, 4, 6)
    expected = sum(-torch.log_softmax(m.double() @ m.double().T / 0.8, 1).diagonal().mean() for m in a)
    assert contrast(a, 0.8).item() == pytest.approx(expected.item(), rel=1e-5)


# --- InfLoRA ----------------------------------------------------------------------------------------------------------

def normal(rows, columns, seed):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def planted(*directions, size=12, seed=0):
    """A covariance with the given variances along the first unit vectors, turned by a fixed rotation."""
    turn = torch.linalg.qr(normal(size, size, seed))[0]
    variances = torch.zeros(size, dtype=torch.float64)
    for place, variance in directions:
        variances[place] = variance
    return turn * variances @ turn.T, turn


def test_dualgpm_takes_the_fewest_directions_that_hold_the_energy():
    covariance, turn = planted((0, 3.0), (1, 2.0), (2, 1.0))  # squares 9, 4, 1 of 14
    for energy, count in ((0.6, 1), (9 / 14, 1), (0.65, 2), (0.93, 3), (1.0, 3)):
        found = Subspace.nothing(12).grown(covariance, energy)
        assert found.basis.shape[1] == count and not found.complement
        torch.testing.assert_close(found.basis @ found.basis.T, turn[:, :count] @ turn[:, :count].T)
    old = Subspace.nothing(12).grown(covariance, 0.65)
    assert old.grown(covariance, 0.65) is old, "what is held already counts"
    more, _ = planted((1, 3.0), (5, 2.0), (6, 1.0))
    found = old.grown(more, 0.9)  # 9 of 14 held, 4 more needed
    expected = turn[:, [0, 1, 5]]
    torch.testing.assert_close(found.basis @ found.basis.T, expected @ expected.T)
    torch.testing.assert_close(old.leading(more, 2).abs(), turn[:, 5:7].abs())


def test_dualgpm_keeps_the_complement_beyond_half_of_the_space():
    """The complement must say the same as the basis would have said."""
    first, turn = planted(*((i, 10.0 - i) for i in range(8)))
    kept = Subspace.nothing(12).grown(first, 0.9999)
    assert kept.complement and kept.basis.shape[1] == 4
    used = Subspace(turn[:, :8])
    mixed = normal(12, 40, 3)
    torch.testing.assert_close(kept.free(mixed), used.free(mixed))
    covariance = mixed @ mixed.T
    torch.testing.assert_close(kept.leading(covariance, 3).abs(), used.leading(covariance, 3).abs())
    for energy in (0.5, 0.9, 0.97, 0.995):
        one, two = kept.grown(covariance, energy), used._replace(complement=False).grown(covariance, energy)
        torch.testing.assert_close(one.free(mixed), two.free(mixed))
        held = 1 - one.free(covariance).square().sum() / covariance.square().sum()
        assert held >= energy - 1e-12
    nothing_left = kept.grown(covariance, 1.0)
    assert not nothing_left.basis.shape[1] and not nothing_left.leading(covariance, 3).any()


def test_left_singular_vectors_of_a_product_that_is_not_symmetric():
    covariance, old = torch.cov(normal(12, 30, 4)), Subspace(torch.linalg.qr(normal(12, 4, 5))[0])
    u = torch.linalg.svd(covariance - old.basis @ old.basis.T @ covariance)[0][:, :3]
    torch.testing.assert_close(old.leading(covariance, 3).abs(), u.abs())


def test_old_inputs_see_no_change():
    seen, fresh = normal(200, 4, 6) @ normal(4, 12, 7) + 1e-3 * normal(200, 12, 8), normal(200, 12, 9)
    old = Subspace.nothing(12).grown(seen.T @ seen, 0.9999)
    delta = normal(5, 3, 10) @ old.leading(fresh.T @ fresh, 3).T
    assert (seen @ delta.T).norm() / seen.norm() < 2e-3 * delta.norm() < 0.01 * (fresh @ delta.T).norm() / fresh.norm()


def test_inflora_run_stays_off_the_old_inputs(run):
    folder = run({"name": "inflora", **METHOD_SETTINGS["inflora"]})
    for index in (1, 2):
        spaces, adapters = loaded(load_file(folder.state(index - 1))), folder.archive().load(index).adapters
        assert len(spaces) == 2 * 4 and len(adapters) == 14
        for site, space in spaces.items():
            a = adapters[site].a
            assert 0 < space.basis.shape[1] <= len(space.basis) / 2
            torch.testing.assert_close(space.free(a.T.double()), a.T.double(), rtol=0, atol=1e-5)
        block = "model.layers.1."
        assert torch.equal(adapters[f"{block}self_attn.q_proj"].a, adapters[f"{block}self_attn.v_proj"].a)
        assert torch.equal(adapters[f"{block}mlp.gate_proj"].a, adapters[f"{block}mlp.up_proj"].a)
    torch.testing.assert_close((a @ a.T).diagonal(), torch.full((4,), 1 / 3), rtol=1e-4, atol=1e-4)


@pytest.fixture
def on_llama(tiny_llama, toy_stream, tmp_path):
    """(method, adapted model, plain model, function from a state to the third task)."""
    setup = prepare(recipe(tiny_llama, toy_stream, tmp_path / "run", {"name": "inflora"}))
    archive = Archive(tmp_path / "updates", "base")
    model, plain = setup.model(archive, -1), setup.model(archive, -1)
    setup.method.attach(model)
    share_inputs(model)
    for layer in sites(model).values():
        layer.reset(0)
    return setup.method, model, plain, lambda state: setup.task(model, archive, 2, state)


@pytest.mark.parametrize("packed", [False, True])
def test_covariances_are_those_of_prompt_and_answer_without_bos(packed, on_llama):
    _, model, plain, make = on_llama
    if packed:
        attention.use(model)
    task = make({})
    examples = task.encode(task.records())
    block, rows = model.model.layers[1], [[], [], []]
    fused = block.mlp.forward
    layers = [block.self_attn.q_proj, block.mlp.gate_proj, block.mlp.down_proj]
    found = covariances(model.train(), layers, task, examples)
    assert block.mlp.forward is fused and model.training and not block.mlp.down_proj._forward_pre_hooks
    other = plain.model.layers[1]
    for i, module in enumerate((other.self_attn.q_proj, other.mlp.gate_proj, other.mlp.down_proj)):
        module.register_forward_pre_hook(lambda _, args, i=i: rows[i].append(args[0][0, 1:].double()))
    with torch.no_grad():
        for example in examples:  # one by one: no pads
            plain(input_ids=torch.tensor([example.prompt + example.answer]))
    for own, parts in zip(found, rows):
        x = torch.cat(parts)
        torch.testing.assert_close(own, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_a_task_that_finds_no_free_direction_is_refused(on_llama):
    method, model, _, make = on_llama
    full = {f"{site}.free": torch.zeros(layer.in_features, 0) for site, layer in sites(model).items()}
    with pytest.raises(Fault, match="q_proj: earlier tasks' inputs leave no direction free for task 1.*energy_first"):
        method.begin_task(model, dataclasses.replace(make(full), index=0))


# --- TreeLoRA ---------------------------------------------------------------------------------------------------------

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
        patch.setattr("codyra_llm.methods.seqlora.restore", lambda *_: None)
        method.begin_task(model, a_task(3, SimpleNamespace(load=lambda _: None), old, epochs=2))
    seen, leaned = {site: [] for site in layers}, {site: [] for site in layers}
    for step in range(60):
        method.before_step([], step, 60, "constant")
        for site, layer in layers.items():
            g = old[site][planted_at[site]] + 0.5 * torch.randn(sizes[site], generator=draw)
            seen[site].append(g)
            layer.lora_A.grad, layer.lora_B.grad = (part.view_as(p) for part, p in zip(
                g.clone().split([layer.lora_A.numel(), layer.lora_B.numel()]), (layer.lora_A, layer.lora_B)))
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


def released(saved, vs, steps, draws):
    """The released loop in plain scalars: the tasks drawn in every step, and the last accumulated signature."""
    t, depth, _ = saved.shape
    n_sel, sim = [[0] * depth for _ in range(t)], [[0.0] * depth for _ in range(t)]
    cur, out = torch.zeros_like(vs[0]), []
    diffs = [saved[0]] + [saved[i] - saved[i - 1] for i in range(1, t)]

    def dots(tasks, level):
        mean = sum(diffs[i][level] for i in tasks) / len(tasks)
        return [float(diffs[i][level] @ mean) for i in tasks]

    def lower_median(values):
        return sorted(values)[(len(values) - 1) // 2]

    def exponentials(values):
        return [math.exp(x - max(values)) for x in values]

    def choose(weights, u):
        total, at = 0.0, 0
        for at, w in enumerate(weights):
            total += w / sum(weights)
            if u < total:
                return at
        return at

    children = []
    if t > 1:
        root = dots(range(t), 0)
        cut = lower_median(root)
        for part in ([i for i in range(t) if root[i] <= cut], [i for i in range(t) if root[i] > cut]):
            children.append((part, lower_median(dots(part, 1)) if len(part) > 1 else None))
    for tau, (v, u) in enumerate(zip(vs, draws)):
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
        found.append([next(k for k in range(tasks) if torch.equal(signatures[d], saved[k, d])) for d in range(4)])
    assert found == expected and (tasks == 1 or len({k for picked in found for k in picked}) > 1)
    torch.testing.assert_close(mine.current, cur)


def test_repo_mode_regulariser_and_ramp():
    method, model = attached("treelora_repo", weight=0.5)
    state = {site: torch.randn(2, 3 * i) for site, (i, _) in SIZES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codyra_llm.methods.seqlora.restore", lambda *_: None)
        method.begin_task(model, a_task(2, SimpleNamespace(load=lambda _: None), state, epochs=2))
    drawn(model, 4)
    batch = SimpleNamespace(cross_entropy=lambda m: torch.tensor(3.0))
    for step in range(8):
        method.before_step([], step, 8, "constant")
        terms = method.loss(model, batch)
        if step % 4 == 0:
            assert terms.keys() == {"loss"}  # the ramp starts anew in every epoch
            continue
        ramp = 0.5 * (step % 4) / 4
        assert terms["treelora"].item() == pytest.approx(-3.0 * ramp)
        model.zero_grad()
        terms["treelora"].backward()
        previous = {site: p[d] for group, p in zip(method._groups, method._previous) for d, site in enumerate(group)}
        s = sum((layer.lora_A.flatten() @ previous[site]).item() for site, layer in sites(model).items())
        for site, layer in sites(model).items():
            slope = -3.0 * ramp * previous[site] / s
            torch.testing.assert_close(layer.lora_A.grad.flatten(), slope, rtol=1e-4, atol=1e-6)
            assert any(torch.equal(previous[site], old) for old in state[site])
    model.eval()
    assert method.loss(model, batch).keys() == {"loss"}

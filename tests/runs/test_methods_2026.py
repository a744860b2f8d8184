"""Methods of 2025 and 2026: what whole runs of them must keep to."""

import math

import pytest
import torch
from contract import raw, rows
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.config.recipe import parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.setup import prepare
from codyra_llm.methods.parts.inputs import loaded
from codyra_llm.methods.regularised import dream
from codyra_llm.methods.regularised.demonstrations import new_inputs
from codyra_llm.methods.sequential.slao import merged_columns, orthonormal_rows
from codyra_llm.store.rows import Stage


def test_slao_merges_what_it_trained(run):
    """B^m is the merge of the archived one and of the B that training left; A starts from its own basis."""
    folder = run({"name": "slao"})
    archive = folder.archive()
    one, two = archive.load(0).adapters, archive.load(1).adapters
    trained = load_file(folder.state(1))
    assert archive.load(0).mode == "replace" and trained.keys() == one.keys()
    for site, adapter in two.items():
        assert torch.equal(adapter.b, merged_columns(one[site].b, trained[site], 2))
        start = orthonormal_rows(one[site].a)
        assert (adapter.a - start).norm() < 0.5 * start.norm(), "training went on from the start"
        assert not torch.equal(adapter.b, trained[site])


def base_gradient(folder) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every projection of the base, and the mean gradient by it over the first task, by autograd."""
    setup = prepare(folder.recipe)
    examples = setup.encoder.encode(setup.stream.records(0, "train"))
    plain = AutoModelForCausalLM.from_pretrained(setup.base)
    adapted = folder.archive().load(0).adapters
    weights = [plain.get_parameter(f"{site}.weight") for site in adapted]
    total = 0.0
    for example in examples:
        ids = torch.tensor([example.prompt + example.answer])
        logits = plain(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
        total = total + functional.cross_entropy(logits, torch.tensor(example.answer))
    found = torch.autograd.grad(total / len(examples), weights)
    return dict(zip(adapted, zip(weights, found, strict=True), strict=True))


@pytest.mark.parametrize("old", ["inputs", "gradients"])
def test_keeplora_reads_neither_the_base_nor_old_tasks(run, old):
    share = 0.3
    folder = run(
        {"name": "keeplora", "energy_weights": share, "energy_old": 0.9, "inputs_at_once": 3, "old": old}
    )
    adapters, principal = [folder.archive().load(i).adapters for i in range(3)], {}
    for site, (weight, gradient) in base_gradient(folder).items():
        _, values, rows = torch.linalg.svd(weight.detach().double())
        energy = values.square().cumsum(0) / values.square().sum()
        principal[site] = rows[: int((energy < share).sum()) + 1]
        free = torch.eye(weight.shape[1], dtype=torch.float64) - principal[site].T @ principal[site]
        expected = torch.linalg.svd(free @ gradient.double().T)[0][:, :4]
        overlap = (adapters[0][site].a.double() @ expected).abs()
        torch.testing.assert_close(overlap, torch.eye(4, dtype=torch.float64), rtol=0, atol=2e-3)
    for index in (1, 2):
        spaces = loaded(load_file(folder.state(index - 1)))
        assert spaces.keys() == principal.keys()
        for site, space in spaces.items():
            a = adapters[index][site].a.double().T
            torch.testing.assert_close(space.free(a), a, rtol=0, atol=1e-5)
            kept = principal[site].T
            torch.testing.assert_close(space.free(kept), torch.zeros_like(kept), rtol=0, atol=1e-5)


def test_ewclora_sums_fishers_and_is_fresh_lora_without_weight(run):
    """γ is on the sum; with λ 0 it is seqlora that merges after every task, whatever its Fisher is."""
    settings = {"name": "ewclora", "examples": 5}
    plain, free = run({"name": "seqlora", "fresh": True}), run({**settings, "weight": 0.0})
    halved = run({**settings, "weight": 0.0, "decay": 0.5})
    for index in range(3):
        one, two = plain.archive().load(index).adapters, free.archive().load(index).adapters
        assert all(torch.equal(one[site].b, two[site].b) for site in one)
    first, both, decayed = (
        load_file(folder.state(index)) for folder, index in ((free, 0), (free, 1), (halved, 1))
    )
    for site, fisher in first.items():
        torch.testing.assert_close(both[site] - decayed[site], fisher / 2, rtol=1e-4, atol=1e-8)
        assert fisher.shape == plain.archive().load(0).adapters[site].delta(1.0).shape


def test_ewclora_holds_back_what_old_tasks_need(run):
    """A larger λ leaves less of Σ F ΔW² after the second task."""
    costs = []
    for weight in (0.0, 1e4):
        folder = run({"name": "ewclora", "examples": 5, "weight": weight})
        fisher, update = load_file(folder.state(0)), folder.archive().load(1)
        parts = [fisher[site] * x.delta(update.scale).square() for site, x in update.adapters.items()]
        costs.append(sum(part.sum().item() for part in parts))
    assert costs[1] < costs[0] / 2


def test_dream_without_weight_is_seqlora(run):
    plain = run({"name": "seqlora"})
    free = run({"name": "dream", "weight": 0.0, "samples": 12, "sample_tokens": 4})
    for index in range(3):
        one, two = plain.archive().load(index).adapters, free.archive().load(index).adapters
        assert all(torch.equal(one[site].b, two[site].b) for site in one)
    setup = prepare(free.recipe)
    for index in range(3):
        prefix = load_file(free.state(2))[f"prefix.{index}"].tolist()
        examples = setup.encoder.encode(setup.stream.records(index, "train"))
        assert prefix and all(example.prompt[: len(prefix)] == prefix for example in examples)


def test_dream_after_demonstrations_has_the_base_write(run, monkeypatch):
    """Before each task the base as it was loaded reads two training examples of every earlier task."""
    ids, seen = torch.tensor([[1, 30, 40, 50]]), []

    def spying(model, kept, *given):
        seen.append((model(input_ids=ids).logits, kept))
        return new_inputs(model, kept, *given)

    monkeypatch.setattr(dream, "new_inputs", spying)
    settings = {"inputs": "demonstrations", "samples": 8, "sample_tokens": 3, "input_tokens": 20}
    plain, free = run({"name": "seqlora"}), run({"name": "dream", "weight": 0.0, **settings})
    setup = prepare(free.recipe)
    base = AutoModelForCausalLM.from_pretrained(setup.base)
    assert len(seen) == 3  # one earlier task, then two
    for (logits, kept), past in zip(seen, (0, 0, 1), strict=True):
        torch.testing.assert_close(logits, base(input_ids=ids).logits)
        examples = setup.encoder.encode(setup.stream.records(past, "train"))
        assert len(kept.examples) == 2 and all(example in examples for example in kept.examples)
    for index in range(3):
        one, two = plain.archive().load(index).adapters, free.archive().load(index).adapters
        assert all(torch.equal(one[site].b, two[site].b) for site in one)
    log = rows(run({"name": "dream", **settings}))
    assert all(math.isfinite(row["dream"]) for row in log) and max(row["dream"] for row in log) > 0


def test_dream_learns_to_write_inputs(run):
    """After the first task its prompts are likelier than to a model that learnt the answers alone."""
    settings = {"inputs": "learnt", "input_weight": 4.0}
    plain, learnt = run({"name": "seqlora"}), run({"name": "dream", "samples": 0, **settings})
    assert all(row["inputs"] > 0 for row in rows(learnt))
    losses = []
    for folder in (plain, learnt):
        setup = prepare(folder.recipe)
        model, _ = setup.load_stage(folder, Stage.of(folder.recipe.tasks, 0), torch.device("cpu"))
        prompts = [setup.encoder.prompt(r["prompt"])[0] for r in setup.stream.records(0, "train")]
        each = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            each.append(model(input_ids=ids, labels=ids).loss.item())
        losses.append(sum(each) / len(each))
    assert losses[1] < losses[0] - 0.1


def test_other_methods_start_from_the_same_rows(run):
    """B = 0 at first, so that A is still near its start after a task of a few steps: W's least directions."""
    settings = {"start": "weights"}
    folder = run({"name": "seqlora", **settings})
    base = AutoModelForCausalLM.from_pretrained(prepare(folder.recipe).base)
    found = folder.archive().load(0).adapters
    for site, adapter in found.items():
        weight = base.get_parameter(f"{site}.weight").detach()
        least = torch.linalg.svd(weight, full_matrices=False)[2].flip(0)[:4]
        assert functional.cosine_similarity(adapter.a, least).abs().mean() > 0.8
    dreamt = run({"name": "dream", "weight": 0.0, "samples": 4, "sample_tokens": 2, **settings})
    for site, adapter in dreamt.archive().load(0).adapters.items():
        assert torch.equal(adapter.a, found[site].a)


def test_gainlora_shuts_new_gates_on_old_prompts(run):
    """Nearly all that old prompts were is held, so the third task's gate is near 0 on theirs, and not on its
    own."""
    folder = run({"name": "gainlora", "energy_first": 0.9999, "hidden": 60, "inputs_at_once": 3})
    setup = prepare(folder.recipe)
    model, _ = setup.load_stage(folder, Stage.of(folder.recipe.tasks, 2), torch.device("cpu"))
    means = []
    for index in range(3):
        prompts = [setup.encoder.prompt(r["prompt"])[0] for r in setup.stream.records(index, "train")]
        means.append(setup.method.mixture(model, prompts, None).mean(0))
    found = torch.stack(means)
    assert found.shape == (3, 3) and (found.diagonal() > 0.5).all()
    assert found[0, 2] < 0.1 and found[1, 2] < 0.1 and found[0, 1] < 0.1


NEW = ["slao", "pm", "keeplora", "ewclora", "osft", "osft_lora", "dream", "gainlora"]


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
@pytest.mark.parametrize("name", NEW)
def test_they_run_on_a_base_of_few_bits(name, kind, tiny_llama, toy_stream, tmp_path):
    """Two tasks on half-precision and on packed weights: every pass over data, SVD and penalty meets them."""
    settings = raw(tiny_llama, toy_stream, tmp_path / "run", name)
    settings["data"] = {**settings["data"], "tasks": ["ONE", "TWO"], "epochs": 1}
    settings["model"] |= {"dtype": "bfloat16"} if kind == "bfloat16" else {"quantization": kind}
    if kind == "nf4" and name == "osft":
        with pytest.raises(Fault, match="packs weights that stay frozen, and osft trains projections"):
            runs.run(parse_recipe(settings))
        return
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = runs.run(parse_recipe(settings))
    assert all(math.isfinite(row["loss"]) for row in rows(folder))
    update = folder.archive().load(1)
    assert update.dense or any(adapter.b.any() for adapter in update.adapters.values())

"""Methods that keep an adapter per task and weigh them by the prompt: single, color, hidelora, sapt,
duallora.
"""

import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.checkpoints.generate import answer
from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.data.batches import collate, example_weights
from codyra_llm.data.encoding import Encoded
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.export import write_merged, write_stage
from codyra_llm.experiment.learning import task_data
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.layer import AdapterSpec, sites
from codyra_llm.lora.mixture import MixtureLinear, mixtures
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.experts.hidelora import contrast
from codyra_llm.methods.experts.sapt import attention_divergence
from codyra_llm.methods.parts.features import pooled_embeddings, pooled_states, prompt_mask
from codyra_llm.methods.parts.inputs import distinct_inputs, loaded
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import Stage
from codyra_llm.train.trainer import Trainer

NAMES = ("single", "color", "hidelora", "sapt", "duallora")
TASKS = ["ONE", "TWO", "THREE"]


def recipe(name, model, stream, out, **changes):
    raw = {
        "model": {"path": str(model)},
        "data": {"root": str(stream), "tasks": TASKS, "epochs": 2},
        "method": {"name": name, "rank": 4, "alpha": 8},
        "optim": {"lr": 1e-2, "batch_size": 8, "weight_decay": 0.1},
        "eval": {"max_new_tokens": 4},
        "output": str(out),
    }
    return parse_recipe(
        override(raw, [f"{k.replace('__', '.')}={json.dumps(v)}" for k, v in changes.items()])
    )


@pytest.fixture(scope="module")
def finished(tiny_llama, toy_stream, tmp_path_factory):
    """Function from a method to its finished run of three tasks, and the tasks that its conditions were
    given.
    """
    made = {}

    def run(name):
        if name not in made:
            told, plain = set(), METHODS[name].condition
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    METHODS[name],
                    "condition",
                    lambda self, model, prompts, task: told.add(task) or plain(self, model, prompts, task),
                )
                folder = runs.run(
                    recipe(name, tiny_llama, toy_stream, tmp_path_factory.mktemp("runs") / name)
                )
            made[name] = folder, told
        return made[name]

    return run


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def layer(request):
    """A mixing layer of three adapters, two of them held, in float64."""
    torch.manual_seed(0)
    made = MixtureLinear(nn.Linear(5, 7, bias=request.param).double(), AdapterSpec(2, 1.5))
    made.hold([Adapter(torch.randn(k, 5).double(), torch.randn(7, k).double(), None) for k in (2, 3)])
    nn.init.normal_(made.lora_A), nn.init.normal_(made.lora_B)
    return made


@pytest.mark.parametrize("name", ["color", "hidelora"])
def test_every_prompt_gets_its_tasks_adapter_and_the_answer_of_that_adapter_merged(name, finished):
    folder, _ = finished(name)
    setup = prepare(folder.recipe)
    model, conditions = setup.load_stage(folder, Stage.of(folder.recipe.tasks, 2), torch.device("cpu"))
    eos, changed = setup.tokenizer.eos_token_id, False
    for number in range(3):
        prompts = [setup.encoder.prompt(r["prompt"])[0] for r in setup.test(number)]
        condition = conditions(prompts, number)
        rows = next(iter(mixtures(model).values())).rows
        assert torch.equal(rows, functional.one_hot(torch.full((len(prompts),), number), 3).float())
        answers = []
        for task in range(3):
            merged = AutoModelForCausalLM.from_pretrained(folder.recipe.model.path)
            with torch.no_grad():
                for site, adapter in folder.archive().load(task).adapters.items():
                    merged.get_parameter(f"{site}.weight").add_(8 / 4 * adapter.b @ adapter.a)
            answers.append(generate_ids(merged.eval(), prompts, 4, eos))
        assert generate_ids(model, prompts, 4, eos, condition) == answers[number]
        changed |= any(other != answers[number] for other in answers)
    assert changed


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_without_dropout(name, finished):
    """The adapters come into a model that is in eval mode already."""
    folder, _ = finished(name)
    method = folder.recipe.method.model_copy(update={"dropout": 0.5})
    logits = []
    for recipe in (folder.recipe, folder.recipe.model_copy(update={"method": method})):
        stage = Stage.of(recipe.tasks, 2)
        model, conditions = prepare(recipe).load_stage(folder, stage, torch.device("cpu"))
        assert not any(module.training for module in model.modules())
        conditions([[1, 40, 50, 60]], 0)
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([[1, 40, 50, 60]])).logits)
    assert torch.equal(*logits)


def test_single_is_told_the_task_and_the_others_are_not(finished):
    for name in NAMES:
        assert finished(name)[1] == ({0, 1, 2} if name == "single" else {None})
        assert METHODS[name].task_id == (name == "single") and not METHODS[name].merges


def test_single_answers_by_the_base_where_no_adapter_is_known(finished):
    folder, _ = finished("single")
    setup = prepare(folder.recipe)
    model, conditions = setup.load_stage(folder, Stage.of(folder.recipe.tasks, 0), torch.device("cpu"))
    base, prompts = setup.model(folder.archive(), -1), [[1, 40, 50, 60], [1, 70]]
    for task in (None, 1):
        assert generate_ids(model, prompts, 4, 2, conditions(prompts, task)) == generate_ids(
            base, prompts, 4, 2
        )
    assert generate_ids(model, prompts, 4, 2, conditions(prompts, 0)) != generate_ids(base, prompts, 4, 2)


def test_hidelora_goes_on_from_the_adapter_before(tiny_llama, toy_stream, tmp_path):
    folder = runs.run(recipe("hidelora", tiny_llama, toy_stream, tmp_path / "run", data__tasks=["ONE"]))
    setup = prepare(recipe("hidelora", tiny_llama, toy_stream, tmp_path / "run"))
    model = begun(setup, folder, 1)
    for site, adapter in folder.archive().load(0).adapters.items():
        assert torch.equal(sites(model)[site].lora_A, adapter.a) and torch.equal(
            sites(model)[site].lora_B, adapter.b
        )


def begun(setup, folder, index):
    """The model at the start of task `index`."""
    model = setup.model(folder.archive(), -1)
    setup.method.attach(model)
    state = folder.load_state(index - 1)
    setup.method.begin_task(model, setup.task(model, folder.archive(), index, state))
    return model


def test_contrastive_term(finished):
    draw = torch.Generator().manual_seed(0)
    z, old = torch.randn(3, 5, generator=draw).double(), torch.randn(2, 5, generator=draw).double()
    z.requires_grad_()
    own = contrast(z, old, 0.8)
    expected = []
    for row in z:
        scores = [torch.exp(row @ c / (row.norm() * c.norm()) / 0.8) for c in old]
        e = torch.exp(torch.tensor(1 / 0.8).double())
        expected.append(-torch.log(e / (e + sum(scores))))
    torch.testing.assert_close(own, torch.stack(expected))
    for a, b in zip(torch.autograd.grad(own.sum(), z), torch.autograd.grad(sum(expected), z), strict=True):
        torch.testing.assert_close(a, b)
    folder, _ = finished("hidelora")
    setup = prepare(folder.recipe)
    model = begun(setup, folder, 2)
    examples = setup.encoder.encode(setup.stream.records(2, "train")[:4])
    shares = example_weights(examples, range(4), "token")

    def terms(chosen):
        return setup.method.loss(model, collate(examples, chosen, [shares[i] for i in chosen], 0))

    whole, parts = terms([0, 1, 2, 3]), [terms([0, 2]), terms([1]), terms([3])]
    for name in ("loss", "contrast"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])
    alone = collate(examples, [0], [shares[0]], 0)
    torch.testing.assert_close(terms([0])["loss"], alone.cross_entropy(model))
    prompt = torch.tensor([examples[0].prompt])
    feature = pooled_states(model, prompt, torch.ones_like(prompt, dtype=torch.bool))
    torch.testing.assert_close(
        terms([0])["contrast"],
        0.01
        * len(examples[0].answer)
        * shares[0]
        * contrast(feature, folder.load_state(1)["adapted"], 0.8)[0],
    )


def test_sapt_attention_is_read_from_the_prompt_alone(finished):
    folder, _ = finished("sapt")
    setup = prepare(folder.recipe)
    model = begun(setup, folder, 2)
    prompts = [[1, 50, 51, 52], [1, 60]]
    batch = collate([Encoded(p, [70, 2], False) for p in prompts], [0, 1], [0.25, 0.25], 0)
    log_weights = model.prompt_attention(pooled_embeddings(model, batch.ids, prompt_mask(batch)))
    query, keys = model.prompt_attention.query, model.prompt_attention.keys
    assert torch.equal(keys[:2], folder.load_state(1)["keys"])
    for row, prompt in zip(log_weights, prompts, strict=True):
        e = model.get_input_embeddings().weight[prompt].max(0).values
        inner = functional.silu(query[1].weight @ (query[0].weight @ e))
        q = functional.layer_norm(inner, (32,), query[3].weight, query[3].bias)
        torch.testing.assert_close(row.exp(), torch.softmax(keys @ q / 32**0.5, 0))
    setup.method.loss(model, batch)
    assert all(torch.equal(m.rows, log_weights.exp()) for m in mixtures(model).values())


def test_sapt_replays_the_attention_of_old_tasks(finished):
    """The penalty and its gradient against KL written out on the very prompts of the stream."""
    folder, _ = finished("sapt")
    setup = prepare(folder.recipe)
    setup.method.config = setup.method.config.model_copy(update={"replay_batch": 99})  # all prompts: no draw
    model, state = begun(setup, folder, 2), folder.load_state(1)
    own = setup.method.penalty(model)["attention"]
    expected = torch.zeros(())
    for past in (0, 1):
        mean = torch.cat([state[f"mean.{past}"], torch.zeros(2 - past)])
        assert len(state[f"mean.{past}"]) == past + 1 and mean.sum() == pytest.approx(1)
        for record in setup.stream.records(past, "train"):
            e = model.get_input_embeddings().weight[setup.encoder.prompt(record["prompt"])[0]].max(0).values
            w = torch.softmax(model.prompt_attention.query(e) @ model.prompt_attention.keys.T / 32**0.5, 0)
            expected = (
                expected + sum(a * (a.log() - b.log()) for a, b in zip(mean, w, strict=True) if a > 0) / 20
            )
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)
    trained = list(model.prompt_attention.parameters())
    for a, b in zip(*(torch.autograd.grad(loss, trained) for loss in (own, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    uniform = torch.tensor([0.5, 0.5])
    assert attention_divergence(uniform.log()[None], uniform) == pytest.approx(0)
    assert attention_divergence(uniform.log()[None], torch.tensor([1.0, 0.0])) == pytest.approx(
        0.6931, abs=1e-4
    )


@pytest.mark.parametrize("name", ["sapt", "duallora"])
def test_training_moves_the_newest_adapter_alone(name, finished):
    """The third task's training from the stored second stage again, with an eye on the model itself."""
    folder, _ = finished(name)
    setup = prepare(folder.recipe)
    model = begun(setup, folder, 2)
    before = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    trainer = Trainer(Accelerator(cpu=True), setup.method, model, folder.recipe.optim, 0)
    for _ in trainer.fit(task_data(setup, 2), folder.recipe.seed):
        pass
    adapters = trainer.adapters()
    still = {n for n, t in [*model.named_parameters(), *model.named_buffers()] if torch.equal(t, before[n])}
    moved = before.keys() - still
    assert all(".lora_" in n or n.startswith("prompt_attention.") for n in moved)
    assert {n for n in before if ".lora_B" in n} <= moved and {n for n in before if ".old_a" in n} <= still
    old = [folder.archive().load(k).adapters for k in range(3)]
    half = 2 if name == "duallora" else 0
    for site, layer in mixtures(model).items():
        held = torch.cat([adapters[site].a[half:] for adapters in old[:2]])
        assert torch.equal(layer.old_a, held)
        assert torch.equal(adapters[site].b, old[2][site].b)


def test_duallora_updates_are_orthogonal_to_old_inputs(finished):
    """A_o's applied update has nothing in M, B_o stays, so inputs in M get the same from O; R reads U
    alone.
    """
    folder, _ = finished("duallora")
    first, second, third = (folder.archive().load(k).adapters for k in range(3))
    model, used = begun(prepare(folder.recipe), folder, 2), 0
    seen = {site: names[0] for names in distinct_inputs(model) for site in names}
    assert len(seen) == 14 and len(set(seen.values())) == 8
    for before, after, state in (
        (first, second, folder.load_state(0)),
        (second, third, folder.load_state(1)),
    ):
        spaces = loaded(state)
        for site, adapter in after.items():
            space = spaces[seen[site]]
            inside = space.basis @ space.basis.T
            basis = (
                torch.eye(len(inside)).double() - inside if space.complement else inside
            )  # the projector on M
            used += basis.trace()
            moved = (adapter.a[:2] - before[site].a[:2]).double()
            assert moved.abs().max() > 1e-3 and (moved @ basis).abs().max() < 1e-5
            assert torch.equal(adapter.b[:, :2], before[site].b[:, :2]) and adapter.b[:, :2].any()
            old_inputs = basis @ torch.randn(basis.shape[1], 8).double()
            outputs = [
                x[site].b[:, :2].double() @ x[site].a[:2].double() @ old_inputs for x in (before, after)
            ]
            torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
            bases = adapter.a[2:].double()
            torch.testing.assert_close(bases @ bases.T, torch.eye(2).double(), rtol=0, atol=1e-5)
            assert (bases @ basis).abs().max() < 1e-5
            assert adapter.b[:, 2:].any()
    assert used > 28 * 1.9  # on average more than one direction for each site and task


def test_duallora_bases_are_those_of_the_first_inputs(finished):
    """At the first task U is of C itself, read from the base with plain hooks."""
    folder, _ = finished("duallora")
    setup = prepare(folder.recipe)
    base, seen = setup.model(folder.archive(), -1), []
    site = "model.layers.1.self_attn.q_proj"
    base.get_submodule(site).register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 1:]))
    with torch.no_grad():
        for e in setup.encoder.encode(setup.stream.records(0, "train")):
            base(input_ids=torch.tensor([e.prompt + e.answer]))
    x = torch.cat(seen).double()
    top = torch.linalg.svd(x.T @ x / len(x))[0][:, :2]
    a = folder.archive().load(0).adapters[site].a[2:].double()
    torch.testing.assert_close(a.T @ a, top @ top.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_export(name, finished, tmp_path):
    """No merged model; a stage answers as the run did after that task."""
    folder, _ = finished(name)
    with pytest.raises(Fault, match=f"a {name} run is not a plain model .* --format stage") as caught:
        write_merged(prepare(folder.recipe), folder.archive(), 1, None, tmp_path / "merged")
    assert len(caught.value.messages) == 1 and not (tmp_path / "merged").exists()
    write_stage(folder, 1, tmp_path / "stage")
    assert len(RunFolder(tmp_path / "stage").archive().files) == 2
    for task in ("TWO",) if name == "single" else ("ONE", "TWO"):  # serving tells single the stage's own task
        lines = (folder.path / "predictions" / "02-TWO" / f"{task}.jsonl").read_text().splitlines()[:3]
        for row in map(json.loads, lines):
            assert answer(f"{tmp_path / 'stage'}@TWO", row["prompt"], 4) == row["prediction"]

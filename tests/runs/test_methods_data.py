"""icl, rcl, mtl, ilora and seqft: what they show, read, visit, average and store."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import logits, tiny_recipe, weights, write_task
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.commands.checkpoints import export
from codyra_llm.config.methods.sequential import REASONING_VARIANT
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256, read_jsonl
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.export import write_peft
from codyra_llm.experiment.learning import task_data
from codyra_llm.experiment.setup import prepare
from codyra_llm.train.task_data import TaskData

THREE = {"data__tasks": ["ONE", "TWO", "THREE"], "eval__max_examples": 2, "checkpoint": False}


@pytest.fixture(scope="module")
def reasoned(toy_stream, tmp_path_factory):
    """A copy of the toy stream with its variant with reasoning next to it."""
    root = tmp_path_factory.mktemp("trace")
    shutil.copytree(toy_stream, root / "plain")
    for task in ("ONE", "TWO", "THREE"):
        rows = json.loads((toy_stream / task / "train.json").read_text())
        write_task(
            root / REASONING_VARIANT / task,
            [{**r, "answer": f"So it is.\nAnswer:{r['answer']}"} for r in rows],
        )
    return root / "plain"


@pytest.mark.parametrize(
    ("name", "dies_at", "settings"),
    [
        ("icl", -1, {"method__shots": 2}),
        # With dropout, and draws of its memory: the other methods' restarts are test_methods_contract's.
        ("ilora", 2, {"method__memory": 9, "method__dropout": 0.1, "method__decay": 0.5}),
    ],
)
def test_killed_between_tasks_and_restarted_equals_straight_through(
    name, dies_at, settings, tiny_llama, reasoned, tmp_path, monkeypatch
):
    changes = {"method": name, **settings, **THREE}
    straight = runs.run(tiny_recipe(tiny_llama, reasoned, tmp_path / "straight", **changes))

    def dying(action):
        def acting(experiment, stage, *more):
            if stage.index == dies_at:
                raise KeyboardInterrupt
            action(experiment, stage, *more)

        return acting

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "evaluate", dying(runs.evaluate))
        patch.setattr(runs, "learn", dying(runs.learn))
        runs.run(tiny_recipe(tiny_llama, reasoned, tmp_path / "killed", **changes))
    killed = runs.run(tiny_recipe(tiny_llama, reasoned, tmp_path / "killed", **changes))
    found, expected = weights(killed), weights(straight)
    files = (
        [] if name == "icl" else [f"0{i}-{task}.safetensors" for i, task in enumerate(straight.recipe.tasks)]
    )
    assert list(found) == list(expected) == files
    for file, tensors in expected.items():
        assert all(torch.equal(found[file][key], tensor) for key, tensor in tensors.items())
    assert [r.score for r in straight.scores] == [r.score for r in killed.scores]


# icl


def test_icl_without_demonstrations_is_none(tiny_llama, toy_stream, tmp_path):
    none, icl, shown = (
        runs.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / out, **changes, **THREE))
        for out, changes in (
            ("none", {"method": "none"}),
            ("icl", {"method": "icl", "method__shots": 0}),
            ("shown", {"method": "icl", "method__shots": 2}),
        )
    )
    files = sorted(p.relative_to(none.path) for p in none.path.rglob("*.jsonl") if "predictions" in str(p))
    assert len(files) == 3
    assert all((none.path / f).read_bytes() == (icl.path / f).read_bytes() for f in files)
    assert any((none.path / f).read_bytes() != (shown.path / f).read_bytes() for f in files)
    assert json.loads((shown.path / "summary.json").read_text())["op"] is not None


# rcl


def test_rcl_trains_on_reasoning_and_names_what_lacks(tiny_llama, reasoned, toy_stream, tmp_path):
    setup = prepare(tiny_recipe(tiny_llama, reasoned, tmp_path / "run", method="rcl"))
    records, epochs = setup.method.train_data(setup.stream, 0)
    assert records[1] == {"prompt": "Say B:", "answer": "So it is.\nAnswer:B"} and epochs == [range(20)] * 2
    with pytest.raises(Fault, match=rf"method.folder: .*{REASONING_VARIANT} has no ONE/train.json"):
        prepare(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", method="rcl"))
    elsewhere = str(reasoned.parent / REASONING_VARIANT)
    again = prepare(
        tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", method="rcl", method__folder=elsewhere)
    )
    assert again.method.train_data(again.stream, 0)[0] == records
    first = f"{REASONING_VARIANT}/ONE/train.json"
    assert setup.method.own_data(setup.stream)[first] == file_sha256(Path(elsewhere) / "ONE" / "train.json")


def test_rcl_prefers_the_variant_in_the_root_to_the_one_beside_it(tiny_llama, reasoned, tmp_path):
    root = shutil.copytree(reasoned.parent, tmp_path / "trace") / "plain"
    inside = [{"prompt": "Say B:", "answer": "Inside.\nAnswer:B"}]
    for task in ("ONE", "TWO", "THREE"):
        write_task(root / REASONING_VARIANT / task, inside)
    setup = prepare(tiny_recipe(tiny_llama, root, tmp_path / "run", method="rcl"))
    assert setup.method.train_data(setup.stream, 0)[0] == inside


# mtl


def test_mtl_sees_every_example_as_often_as_its_epochs_say(tiny_llama, toy_stream, tmp_path):
    setup = prepare(
        tiny_recipe(
            tiny_llama,
            toy_stream,
            tmp_path / "run",
            method="mtl",
            data__tasks=["ONE", "TWO", "THREE"],
            data__epochs={"ONE": 1, "TWO": 4, "THREE": 2},
        )
    )
    records, epochs = setup.method.train_data(setup.stream, 2)
    data = TaskData("THREE", 2, records, epochs, [])
    visits = Counter(i for batch in data.batches(0, 8) for i in batch)
    of = {"S": 1, "W": 2, "0123456789": 4}
    expected = [next(n for key, n in of.items() if record["prompt"][0] in key) for record in records]
    assert len(records) == 60 and [visits[i] for i in range(60)] == expected
    assert data.steps(8) == 8 + 5 + 3 + 3
    assert [setup.method.train_data(setup.stream, i)[1] for i in (0, 1)] == [[], []]


def test_mtl_has_one_row_and_nothing_to_leave_out(tiny_llama, toy_stream, tmp_path):
    out = runs.run(
        tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", method="mtl", **THREE, eval__zero_shot=True)
    )
    summary = json.loads((out.path / "summary.json").read_text())
    assert summary["matrix"][:2] == [[None] * 3] * 2 and summary["op"] == pytest.approx(
        sum(summary["matrix"][2]) / 3
    )
    assert all(summary[key] is None for key in ("bwt", "bwt_treelora", "forgetting", "fwt"))
    assert {row["task"] for row in read_jsonl(out.path / "log.jsonl")} == {"THREE"}
    assert [len(tensors) for tensors in weights(out).values()] == [0, 0, 28]
    with pytest.raises(Fault, match="mtl keeps no part of a task's own"):
        export(out.path, tmp_path / "less", without="ONE")


def test_mtl_trains_anew_when_a_task_is_added(tiny_llama, toy_stream, tmp_path):
    two, three = {**THREE, "data__tasks": ["ONE", "TWO"]}, {**THREE, "data__tasks": ["ONE", "TWO", "THREE"]}
    runs.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "grown", method="mtl", **two))
    grown, fresh = (
        runs.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / name, method="mtl", **three))
        for name in ("grown", "fresh")
    )
    assert [(r.step, r.task) for r in grown.scores] == [
        (2, "ONE"),
        (2, "TWO"),
        (3, "ONE"),
        (3, "TWO"),
        (3, "THREE"),
    ]
    last = "02-THREE.safetensors"
    assert all(torch.equal(tensor, weights(grown)[last][key]) for key, tensor in weights(fresh)[last].items())


def test_mtl_is_validated_on_all_that_it_learns(tiny_llama, toy_stream, tmp_path):
    recipe = tiny_recipe(
        tiny_llama, toy_stream, tmp_path / "run", method="mtl", optim__validate_every=1, **THREE
    )
    setup = prepare(recipe)
    expected = []
    for index in range(3):
        expected += setup.encoder.encode(setup.stream.records(index, "eval"))
    assert task_data(setup, 2).validation == expected and len(expected) == 12


@pytest.mark.parametrize("name", ["ilora", "ilora_mixed"])
def test_an_average_over_the_steps_has_no_best_step(name, tiny_llama, toy_stream, tmp_path):
    recipe = tiny_recipe(
        tiny_llama,
        toy_stream,
        tmp_path / "run",
        method=name,
        optim__validate_every=1,
        optim__keep_best=True,
        **THREE,
    )
    with pytest.raises(Fault, match=f"optim.keep_best: {name} leaves an average .* set it to false"):
        prepare(recipe)


def test_mtl_on_one_task_is_seqlora(tiny_llama, toy_stream, tmp_path):
    one, other = (
        runs.run(
            tiny_recipe(
                tiny_llama, toy_stream, tmp_path / name, method=name, data__tasks=["ONE"], checkpoint=False
            )
        )
        for name in ("mtl", "seqlora")
    )
    assert all(
        torch.equal(v, weights(other)["00-ONE.safetensors"][k])
        for k, v in weights(one)["00-ONE.safetensors"].items()
    )


# seqft


@pytest.fixture(scope="module")
def tuned(tiny_llama, tiny_gemma3, toy_stream, tmp_path_factory):
    """Finished seqft runs (untied float32, tied bfloat16) with their models as training left them."""
    method, made = METHODS["seqft"], {}
    end = method.end_task
    for kind, base, dtype in (("untied", tiny_llama, "float32"), ("tied", tiny_gemma3, "bfloat16")):
        left = []

        def ended(self, model, task, gradients, left=left):
            left.append({name: p.detach().clone() for name, p in model.named_parameters()})
            return end(self, model, task, gradients)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(method, "end_task", ended)
            made[kind] = (
                runs.run(
                    tiny_recipe(
                        base,
                        toy_stream,
                        tmp_path_factory.mktemp("runs") / kind,
                        method="seqft",
                        optim__lr=1e-3,
                        model__dtype=dtype,
                    )
                ),
                left,
            )
    return made


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_seqft_exports_what_it_trained(kind, tuned):
    run, left = tuned[kind]
    dtype = torch.bfloat16 if kind == "tied" else torch.float32
    stored = AutoModelForCausalLM.from_pretrained(run.path / "checkpoint", dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(run.recipe.model.path, dtype=dtype)
    for name, p in left[1].items():
        assert p.dtype is torch.float32 and torch.equal(stored.get_parameter(name), p.to(dtype)), name
        assert not torch.equal(stored.get_parameter(name), base.get_parameter(name)) or "norm" in name, name
    assert (
        (stored.lm_head.weight is stored.model.embed_tokens.weight)
        == (kind == "tied")
        == ("lm_head.weight" not in left[1])
    )
    setup, archive = prepare(run.recipe), run.archive()
    assert torch.equal(logits(setup.model(archive, 1)), logits(stored))
    assert not torch.equal(logits(setup.model(archive, 0)), logits(stored))


def test_seqft_reports_every_parameter_and_refuses_what_needs_parts(tuned, tiny_llama, toy_stream, tmp_path):
    run, left = tuned["untied"]
    rows = run.updates
    assert len(rows) == 2 * len(left[0])
    for row in rows:
        name = f"{row.site}.weight"
        base = (
            AutoModelForCausalLM.from_pretrained(tiny_llama).get_parameter(name)
            if row.task == "ONE"
            else left[0][name]
        )
        new = left[row.task == "TWO"][name]
        assert row.update_norm == pytest.approx((new - base).norm().item(), rel=1e-4) and row.rank is None
    assert "| TWO | embed_tokens |  | " in (run.path / "report.md").read_text()
    with pytest.raises(Fault, match="seqft keeps no part of a task's own"):
        export(run.path, tmp_path / "less", without="ONE")
    with pytest.raises(Fault, match="format peft holds adapters"):
        write_peft(prepare(run.recipe), run.archive(), 1, None, tmp_path / "peft")
    with pytest.raises(Fault) as caught:
        prepare(
            tiny_recipe(
                tiny_llama,
                toy_stream,
                tmp_path / "run",
                method="seqft",
                model__quantization="int8",
                optim__validate_every=2,
                optim__keep_best=True,
            )
        )
    assert "model.quantization" in str(caught.value) and "optim.keep_best" in str(caught.value)


def test_seqft_is_adam_on_all_weights(tiny_llama, toy_stream, tmp_path):
    """Two steps on all of each task, one task after the other, against transformers' own loss and torch's own
    Adam.
    """
    run = runs.run(
        tiny_recipe(
            tiny_llama,
            toy_stream,
            tmp_path / "run",
            method="seqft",
            optim__lr=1e-3,
            optim__batch_size=20,
            optim__loss_average="token",
            checkpoint=False,
        )
    )
    setup, model = prepare(run.recipe), AutoModelForCausalLM.from_pretrained(tiny_llama)
    for index in (0, 1):
        adam = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.9, 0.95))
        encoded = setup.encoder.encode(setup.stream.records(index, "train"))
        for _ in range(2):
            total = 0
            for e in encoded:
                z = model(input_ids=torch.tensor([e.prompt + e.answer])).logits[0, len(e.prompt) - 1 : -1]
                total = total + functional.cross_entropy(z, torch.tensor(e.answer), reduction="sum")
            (total / sum(len(e.answer) for e in encoded)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
        for name, tensor in run.archive().load(index).dense.items():
            error = (tensor - model.get_parameter(name).detach()).abs()
            assert error.mean() < 2e-5 and error.max() < 2e-3, (
                name
            )  # Adam turns rounding of near-zero gradients into steps

"""The whole way on tiny models: run, restart, growth, export, faults."""

import json
import shutil

import pytest
import torch
from helpers import logits, tiny_recipe, weights
from transformers import AutoModelForCausalLM

from codyra_llm.config.recipe import parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import read_jsonl
from codyra_llm.experiment import run, scoring
from codyra_llm.experiment.export import write_merged, write_peft
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.layer import sites
from codyra_llm.lora.update import Adapter
from codyra_llm.runtime import signals
from codyra_llm.store.archive import Archive
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import LogRow
from codyra_llm.train.trainer import Trainer


@pytest.fixture(scope="module")
def finished(tiny_llama, toy_stream, tmp_path_factory):
    """A finished codyra run of two tasks."""
    return run.run(
        tiny_recipe(tiny_llama, toy_stream, tmp_path_factory.mktemp("runs") / "codyra", eval__zero_shot=True)
    )


def test_run_folder_is_whole(finished):
    summary = json.loads((finished.path / "summary.json").read_text())
    assert summary["tasks"] == ["ONE", "TWO"] and summary["matrix"][0][1] is None
    assert len(finished.scores) == 2 + 1 + 2
    for row in finished.scores:
        lines = finished.path / "predictions" / f"{row.step:02d}-{row.after}" / f"{row.task}.jsonl"
        scored = [json.loads(line) for line in lines.read_text().splitlines()]
        metric = row.metrics[row.headline]
        mean = sum(r[row.headline] for r in scored) / len(scored)
        assert metric["mean"] == pytest.approx(mean) == row.score
        assert metric["low"] <= metric["mean"] <= metric["high"] and metric["n"] == len(scored) == 6
        texts = [line["prediction"] for line in scored]
        assert row.commonest == max(map(texts.count, texts)) / 6 and row.empty == len(
            [t for t in texts if t.isspace() or not t]
        )
        assert row.cut is not None and 0 <= row.cut <= 6
    logs = [json.loads(line) for line in (finished.path / "log.jsonl").read_text().splitlines()]
    assert [(r["task"], r["step"]) for r in logs] == [(t, s) for t in ("ONE", "TWO") for s in range(1, 7)]
    assert sum(r["kappa"] for r in logs if r["task"] == "ONE") == pytest.approx(0.6)
    costs = read_jsonl(finished.path / "costs.jsonl")
    setup = prepare(finished.recipe)
    trained = sum(
        4 * (m.in_features + m.out_features + 1)
        for m in setup.model(finished.archive(), -1).model.layers.modules()
        if isinstance(m, torch.nn.Linear)
    )
    assert [(row["task"], row["trained"]) for row in costs] == [("ONE", trained), ("TWO", trained)]
    assert summary["costs"]["seconds"] == pytest.approx(sum(row["seconds"] for row in costs), abs=0.1)
    report = (finished.path / "report.md").read_text()
    assert "divided by" in report and f"Training: {trained:,} parameters" in report


def test_the_floor_is_what_a_constant_answer_scores(finished, toy_stream):
    """Against exact match counted here, on the files; a run that goes on notes what it has not noted."""
    summary = json.loads((finished.path / "summary.json").read_text())
    for task, row, floor in zip(["ONE", "TWO"], finished.floor, summary["floor"]["scores"], strict=True):
        answers = [one["answer"] for one in json.loads((toy_stream / task / "train.json").read_text())]
        counts = {answer: answers.count(answer) for answer in answers}
        assert row.answer in [answer for answer in counts if counts[answer] == max(counts.values())]
        assert row.share == counts[row.answer] / len(answers)
        right = [one["answer"] for one in json.loads((toy_stream / task / "test.json").read_text())]
        assert (row.task, row.headline) == (task, finished.scores[0].headline)
        assert row.score == floor == pytest.approx(100 * right.count(row.answer) / len(right))
        assert row.interval["n"] == len(right)
    assert summary["floor"]["op"] == pytest.approx(sum(summary["floor"]["scores"]) / 2)
    report = (finished.path / "report.md").read_text()
    assert "| most frequent training answer | " in report and "| op of the floor | " in report


def test_a_run_that_goes_on_notes_the_floor_that_it_lacks(finished):
    setup, had, folder = prepare(finished.recipe), finished.floor, RunFolder(finished.path)
    folder._write_rows("floor.jsonl", had[:1])
    for _ in range(2):  # the second time nothing is left to note
        scoring.note_floor(setup, folder)
        assert folder.floor == had


def test_update_report(finished):
    rows = [json.loads(line) for line in (finished.path / "updates.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 14
    setup, archive = prepare(finished.recipe), finished.archive()
    first, last = (setup.model(archive, i) for i in (0, 1))
    base = setup.model(archive, -1)
    for row in rows:
        model, before = (first, base) if row["task"] == "ONE" else (last, first)
        at = f"{row['site']}.weight"
        moved = model.get_parameter(at) - before.get_parameter(at)
        assert row["update_norm"] == pytest.approx(moved.norm().item(), rel=1e-3, abs=1e-5)
        assert row["drift"] == pytest.approx(
            (model.get_parameter(at) - base.get_parameter(at)).norm().item(), rel=1e-3
        )
        assert row["surviving"] == pytest.approx(1, abs=1e-3) if row["kept"] else row["surviving"] is None
    assert any(row["kept"] for row in rows)
    both = [row for row in rows if row["task"] == "TWO" and row["site"].endswith("up_proj")]
    line = next(
        x for x in (finished.path / "report.md").read_text().splitlines() if x.startswith("| TWO | up_proj |")
    )
    assert f"| {sum(r['kept'] for r in both)} of 8 | {sum(r['update_norm'] for r in both) / 2:.4f} |" in line


def test_the_same_command_again_does_nothing(finished):
    before = {p: p.read_bytes() for p in finished.path.rglob("*.safetensors")}
    rows = finished.scores
    run.run(parse_recipe(json.loads((finished.path / "recipe.json").read_text())))
    assert finished.scores == rows and before == {
        p: p.read_bytes() for p in finished.path.rglob("*.safetensors")
    }


def test_killed_and_restarted_equals_straight_through(tiny_llama, toy_stream, tmp_path, monkeypatch):
    """With rows in the log of a task that was not finished, and an optimizer that goes on from the task
    before. test_methods_contract.py restarts every method."""
    method = {"method": "seqlora", "method__carry_optimizer": True}
    straight = run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "straight", **method))
    learn = run.learn

    def dies(experiment, stage, peak):
        if stage.index == 1:
            experiment.store.log(LogRow("TWO", 1, 6, {"loss": 1.0}))  # as far as it got
            raise KeyboardInterrupt
        learn(experiment, stage, peak)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "learn", dies)
        run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "killed", **method))
    killed = run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "killed", **method))
    for name, tensors in weights(straight).items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, weights(killed)[name][key]), (name, key)
    assert [r.score for r in straight.scores] == [r.score for r in killed.scores]
    steps = [[(r["task"], r["step"]) for r in read_jsonl(f.path / "log.jsonl")] for f in (straight, killed)]
    assert steps[0] == steps[1]


def test_scores_at_the_ends_are_the_diagonal_and_the_last_row(tiny_llama, toy_stream, tmp_path):
    asked = {"data__tasks": ["ONE", "TWO", "THREE"], "checkpoint": False, "eval__max_examples": 1}
    each = run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "each", **asked))
    ends = run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "ends", **asked, eval__when="ends"))
    scored = {(row.step, row.task): row.score for row in ends.scores}
    assert list(scored) == [(1, "ONE"), (2, "TWO"), (3, "ONE"), (3, "TWO"), (3, "THREE")]
    assert scored.items() <= {(row.step, row.task): row.score for row in each.scores}.items()
    few, all_of_them = (json.loads((f.path / "summary.json").read_text()) for f in (ends, each))
    assert few["forgetting"] is None and all_of_them["forgetting"] is not None
    assert all(few[name] == all_of_them[name] for name in ("op", "bwt", "bwt_treelora"))
    assert "| ONE |" in (ends.path / "report.md").read_text()


def test_a_finished_run_goes_on_with_a_task_added_at_the_end(finished, tiny_llama, toy_stream, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    before = weights(finished)
    longer = tiny_recipe(
        tiny_llama, toy_stream, tmp_path / "run", eval__zero_shot=True, data__tasks=["ONE", "TWO", "THREE"]
    )
    grown = run.run(longer)
    after = weights(grown)
    assert list(after) == ["00-ONE.safetensors", "01-TWO.safetensors", "02-THREE.safetensors"]
    assert all(torch.equal(after[f][k], before[f][k]) for f in before for k in before[f])
    assert len(json.loads((grown.path / "summary.json").read_text())["matrix"]) == 3


def test_a_folder_of_another_recipe_is_refused(finished, tiny_llama, toy_stream, tmp_path):
    with pytest.raises(Fault, match="belongs to another recipe: method.rank was 4, now 8"):
        run.run(tiny_recipe(tiny_llama, toy_stream, finished.path, eval__zero_shot=True, method__rank=8))
    with pytest.raises(Fault, match="data.tasks was"):
        run.run(
            tiny_recipe(
                tiny_llama, toy_stream, finished.path, eval__zero_shot=True, data__tasks=["TWO", "ONE"]
            )
        )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(Fault, match="holds files of something else"):
        run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "mine"))


def test_export_is_the_run(finished, tmp_path):
    """Merged folder, PEFT adapter and the run's own model give the same logits; the checkpoint is the last
    stage.
    """
    from peft import PeftModel

    setup, archive = prepare(finished.recipe), finished.archive()
    for after, without in ((1, None), (0, None), (1, 0)):
        own = logits(setup.model(archive, after, without))
        name = f"{after}-{without}"
        write_merged(setup, archive, after, without, tmp_path / f"merged-{name}")
        write_peft(setup, archive, after, without, tmp_path / f"peft-{name}")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{name}")
        assert torch.equal(logits(merged), own)
        base = AutoModelForCausalLM.from_pretrained(finished.recipe.model.path)
        assert not torch.allclose(logits(base), own, atol=1e-3)
        torch.testing.assert_close(
            logits(PeftModel.from_pretrained(base, tmp_path / f"peft-{name}")), own, rtol=1e-4, atol=1e-4
        )
    stored = AutoModelForCausalLM.from_pretrained(finished.path / "checkpoint")
    assert torch.equal(logits(stored), logits(setup.model(archive, 1)))


def test_merged_logits_equal_adapter_logits(tiny_gemma3, toy_stream, tmp_path):
    """What training saw is what is merged, though only the ranks with w ≠ 0 are archived."""
    setup = prepare(tiny_recipe(tiny_gemma3, toy_stream, tmp_path / "run"))
    archive = Archive(tmp_path / "updates", "base")
    model = setup.model(archive, -1)
    setup.method.attach(model)
    with torch.no_grad():
        for i, (name, layer) in enumerate(sites(model).items()):
            layer.reset(0, name)
            layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
            layer.lora_w.copy_(torch.tensor([0.5, 0.0, -0.3, 0.0]))
    adapters = {
        name: Adapter(m.lora_A.detach(), m.lora_B.detach(), m.lora_w.detach())
        for name, m in sites(model).items()
    }
    update = setup.method.consolidate(adapters, 0)
    assert {len(a.a) for a in update.adapters.values()} == {2}
    archive.append("ONE", update)
    torch.testing.assert_close(logits(setup.model(archive, 0)), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(setup.model(archive, -1)), logits(model), atol=1e-2)


def test_faults_come_together_and_before_weights_load(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("codyra_llm.models.loading.load", lambda *a, **k: pytest.fail("weights were loaded"))
    (tmp_path / "s" / "ONE").mkdir(parents=True)
    (tmp_path / "s" / "ONE" / "train.json").write_text('[{"prompt": "x"}]')
    with pytest.raises(Fault) as caught:
        run.run(tiny_recipe(tmp_path / "nowhere", tmp_path / "s", tmp_path / "run"))
    text = "\n".join(caught.value.messages)
    assert "nowhere" in text and "'answer'" in text and "TWO" in text and "test.json" in text
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(
    tiny_llama, toy_stream, tmp_path, monkeypatch
):
    from codyra_llm.data.batches import Batch

    plain = Batch.cross_entropy
    monkeypatch.setattr(
        Batch,
        "cross_entropy",
        lambda self, model: plain(self, model) * (float("nan") if 7 in self.examples else 1.0),
    )
    with pytest.raises(Fault, match=r"task ONE, step \d: the loss is nan.*\b7\b"):
        run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", data__epochs=1, optim__batch_size=4))
    assert not (tmp_path / "run" / "updates").exists()


def test_gradients_that_are_not_finite_stop_the_run_where_the_loss_is(
    tiny_llama, toy_stream, tmp_path, monkeypatch
):
    """In the last step of a task no later loss would tell."""
    from codyra_llm.data.batches import Batch

    plain = Batch.cross_entropy

    def with_a_root_at_zero(self, model):
        loss = plain(self, model)
        return loss + (loss - loss.detach()).abs().sqrt()  # 0, and its derivative is none

    monkeypatch.setattr(Batch, "cross_entropy", with_a_root_at_zero)
    few = {"data__max_train_examples": 4, "data__epochs": 1, "optim__batch_size": 4}
    with pytest.raises(Fault, match=r"task ONE, step 1: the loss is \d\S+ and the norm of its gradients nan"):
        run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", **few))
    assert not (tmp_path / "run" / "updates").exists()


def test_none_and_validation(tiny_llama, toy_stream, tmp_path):
    none = run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "none", method="none"))
    summary = json.loads((none.path / "summary.json").read_text())
    assert summary["op"] is not None and summary["bwt"] is None and not (none.path / "updates").exists()
    kept = run.run(
        tiny_recipe(
            tiny_llama,
            toy_stream,
            tmp_path / "best",
            optim__validate_every=2,
            optim__keep_best=True,
            data__tasks=["ONE"],
            method="seqlora",
        )
    )
    rows = [json.loads(line) for line in (kept.path / "log.jsonl").read_text().splitlines()]
    assert [("eval_loss" in row) for row in rows] == [False, True] * 3


def test_the_validation_loss_is_the_loss_without_what_a_method_adds(tiny_llama, toy_stream, tmp_path):
    """As the log's `loss` is: after the last step, the cross entropy of the model that the task leaves. What
    a method adds would say nothing of the answers, and keep_best would choose by it."""
    asked = tiny_recipe(
        tiny_llama,
        toy_stream,
        tmp_path / "run",
        optim__validate_every=6,
        optim__loss_average="token",
        eval__max_examples=1,
        method={"name": "lwf", "rank": 4, "weight": 3.0},
    )
    folder = run.run(asked)
    setup, row = prepare(folder.recipe), read_jsonl(folder.path / "log.jsonl")[-1]
    model = setup.model(folder.archive(), 1).double()
    total = tokens = 0
    for example in setup.encoder.encode(setup.stream.records(1, "eval")):
        ids = torch.tensor([example.prompt + example.answer])
        logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
        answer = torch.tensor(example.answer)
        total += torch.nn.functional.cross_entropy(logits, answer, reduction="sum").item()
        tokens += len(answer)
    assert row["eval_loss"] == pytest.approx(total / tokens, rel=1e-5) and row["lwf"] > 1e-3


@pytest.mark.parametrize("method", ["codyra", "sora", {"name": "codyra_drift", "selection": "threshold"}])
def test_the_best_step_is_not_asked_for_where_ranks_are_selected(method, tiny_llama, toy_stream, tmp_path):
    """The loss is lowest before the threshold has shrunk anything."""
    settings = {"optim__validate_every": 2, "optim__keep_best": True, "method": method}
    with pytest.raises(Fault, match="optim.keep_best: .* set it to false"):
        run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", **settings))


@pytest.mark.parametrize(
    "method",
    [{"name": "seqlora", "rank": 4}, {"name": "sapt", "rank": 4}, {"name": "pp", "length": 2}],
    ids=lambda method: method["name"],
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_task_ends_with_all_that_trains_at_its_best_step(
    interrupted, method, tiny_llama, toy_stream, tmp_path, monkeypatch
):
    """Also where it was stopped between the best step and the last. The validation losses are made up: 3, 1,
    2.
    """
    seen, ended, fit = [], [], Trainer.fit
    monkeypatch.setattr(signals, "_asked", [])

    def values(trainer):
        return {key: value.detach().clone() for key, value in trainer.engine.values()}

    def validate(trainer, examples):
        seen.append(values(trainer))
        if interrupted and len(seen) == 2:
            signals.ask("a test")  # heard in the next step
        return [3.0, 1.0, 2.0][len(seen) % 3 - 1]

    def watched(trainer, *arguments):
        yield from fit(trainer, *arguments)
        ended.append(values(trainer))

    monkeypatch.setattr(Trainer, "validate", validate)
    monkeypatch.setattr(Trainer, "fit", watched)
    asked = tiny_recipe(
        tiny_llama,
        toy_stream,
        tmp_path / "run",
        optim__validate_every=2,
        optim__keep_best=True,
        checkpoint=False,
        eval__max_examples=1,
        method=method,
    )
    if interrupted:
        with pytest.raises(signals.Stopped):
            run.run(asked)
        monkeypatch.setattr(signals, "_asked", [])
    rows = read_jsonl(run.run(asked).path / "log.jsonl")
    assert [row.get("eval_loss") for row in rows] == [None, 3.0, None, 1.0, None, 2.0] * 2 and len(seen) == 6
    for end, best, last in zip(ended, seen[1::3], seen[2::3], strict=True):
        assert all(torch.equal(end[key], best[key]) for key in best)
        assert any(not torch.equal(last[key], best[key]) for key in best)


def test_accumulation_does_not_change_the_result(tiny_llama, toy_stream, tmp_path):
    """One micro-batch of 8 against eight of 1: the loss divides by the global count either way."""
    one = run.run(
        tiny_recipe(
            tiny_llama, toy_stream, tmp_path / "one", data__tasks=["THREE"], optim__micro_batch_tokens=4096
        )
    )
    eight = run.run(
        tiny_recipe(
            tiny_llama, toy_stream, tmp_path / "eight", data__tasks=["THREE"], optim__micro_batch_tokens=16
        )
    )
    for name, tensors in weights(one).items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(weights(eight)[name][key], tensor, rtol=2e-3, atol=2e-4)
    losses = [
        [json.loads(line)["loss"] for line in (f.path / "log.jsonl").read_text().splitlines()]
        for f in (one, eight)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradient_checkpointing_does_not_change_the_result(tiny_gemma3, toy_stream, tmp_path):
    plain, checkpointed = (
        run.run(
            tiny_recipe(
                tiny_gemma3,
                toy_stream,
                tmp_path / str(on),
                data__tasks=["ONE"],
                model__gradient_checkpointing=on,
                checkpoint=False,
            )
        )
        for on in (False, True)
    )
    for name, tensors in weights(plain).items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(weights(checkpointed)[name][key], tensor, rtol=1e-3, atol=1e-4)


def test_bfloat16_sums_in_float32_and_casts_once(tiny_llama, toy_stream, tmp_path):
    folder = run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", model__dtype="bfloat16"))
    setup, archive = prepare(folder.recipe), folder.archive()
    model, base = setup.model(archive, 1), AutoModelForCausalLM.from_pretrained(tiny_llama)
    for site, adapter in archive.load(1).adapters.items():
        w0 = base.get_parameter(f"{site}.weight")
        exact = w0.double() + sum(a.delta(1.0).double() for a in (archive.load(0).adapters[site], adapter))
        error = (model.get_parameter(f"{site}.weight").double() - exact).abs()
        assert (error <= exact.abs() * 2**-8 * (1 + 1e-3) + 1e-9).all(), (
            "one rounding to bfloat16 and no more"
        )
    shares = [row.surviving for row in folder.updates if row.kept]
    assert shares and all(0.5 < share < 1.5 for share in shares) and any(share != 1 for share in shares)

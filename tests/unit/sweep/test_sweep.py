"""Sweeps: which runs a file asks for, that each is run once, and how settings are chosen."""

import shutil
from pathlib import Path

import pytest
import yaml
from commands import plugin
from made_plugins import FILE
from sweeps import Ended, go

from codyra_llm.config import plugins
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import write_json, write_jsonl
from codyra_llm.evaluate.matrix import summary as summarise
from codyra_llm.sweep import comparison, runner
from codyra_llm.sweep.spec import finished, load_sweep


def test_every_arm_at_every_point(sweep_file):
    asked = load_sweep(
        sweep_file(grid={"seed": [1, 2], "data.tasks": [["ONE", "TWO"], ["TWO", "ONE"]], "optim.lr": [1e-3]}),
        ["data.epochs=2"],
    )
    found = {run.folder.path.relative_to(asked.output): run.recipe for run in asked.runs()}
    assert len(found) == 8
    one = found[Path("ewc/seed=2,data.tasks=#2,optim.lr=0.001")]
    assert (one.method.name, one.method.weight, one.seed, one.tasks) == ("ewc", 1e3, 2, ["TWO", "ONE"])
    assert (
        one.optim.lr == 1e-3
        and one.data.epochs == 2
        and one.checkpoint is False
        and one.optim.batch_size == 8
    )


def test_a_method_comes_first_whichever_layer_names_it(sweep_file):
    ranks = {"small": {"method.rank": 3}, "large": {"method.rank": 5}}
    found = load_sweep(
        sweep_file(arms=ranks, grid={"method": ["seqlora", "ewc"]}, set={"method.rank": 9}),
        ["method.dropout=0.1"],
    )
    assert [(r.recipe.method.name, r.recipe.method.rank, r.recipe.method.dropout) for r in found.runs()] == [
        ("seqlora", 3, 0.1),
        ("seqlora", 5, 0.1),
        ("ewc", 3, 0.1),
        ("ewc", 5, 0.1),
    ]
    with pytest.raises(Fault, match="unknown key 'method.rank'"):  # reported, not dropped
        load_sweep(sweep_file(arms={"none": {"method": "none"}}, set={"method.rank": 9}))


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"grid": {"seed": [1, "1"]}}, "each once"),  # one folder
        ({"grid": {"output": ["x", "y"]}}, "folder of its own"),
        ({"arms": {"x": {"output": "y"}}}, "arms.x: .*folder of its own"),
        ({"arms": {"x": {"method": {"name": [1]}}}}, r"\[1\] is not a method"),
        ({3: 4}, "the key 3 is not text"),
        (
            {
                "tune": {
                    "by": "forgetting",
                    "set": {"data.tasks": ["ONE"]},
                    "tries": {"seqlora": [{}], "ewc": [{}]},
                }
            },
            "ewc, seqlora has no forgetting",
        ),
    ],
)
def test_mistakes_are_sentences(sweep_file, sections, said):
    path = sweep_file()
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | sections), encoding="utf-8")
    with pytest.raises(Fault, match=said):
        load_sweep(path)
    with pytest.raises(Fault, match="not valid YAML"):
        load_sweep(path, ["optim.betas=[0.9"])


def test_all_faults_of_the_file_at_once(sweep_file):
    with pytest.raises(Fault) as fault:
        load_sweep(
            sweep_file(
                arms={"a/b": {}, "good": {}},
                grid={"seed": []},
                baseline="goof",
                tune={"tries": {"good": [{}], "a/b": [{}, {}], "other": [{}]}},
            )
        )
    text = str(fault.value)
    assert len(fault.value.messages) == 5
    assert all(
        part in text
        for part in (
            "'a/b' becomes a folder",
            "grid.seed",
            "Did you mean 'good'?",
            "'other' is not an arm",
            "good 1, a/b 2",
        )
    )


def test_what_any_run_would_refuse_is_told_before_the_first(sweep_file, launches):
    broken = sweep_file(arms={"x": {"optim.lr": -1}, "y": {"method": "ewk"}})
    with pytest.raises(Fault) as fault:
        load_sweep(broken)
    assert [m.partition(":")[0] for m in fault.value.messages] == [
        "x/seed=1",
        "y/seed=1",
    ]  # not for every seed again
    with pytest.raises(Fault, match="replay: method.general: .*Lima.* or null for none"):
        go(sweep_file(arms={"seqlora": {}, "replay": {"method": "replay"}}))
    assert not launches
    with pytest.raises(Fault, match="tune.tries: ewc would be compared without tries"):
        load_sweep(sweep_file(tune={"tries": {"seqlora": [{}]}}))
    with pytest.raises(Fault, match="can't be read"):
        load_sweep("nowhere.yaml")


def test_a_section_of_an_arm_leaves_the_recipe_s_other_keys(sweep_file):
    whole, key = ({"method": "seqlora", **lr} for lr in ({"optim": {"lr": 1e-3}}, {"optim.lr": 1e-3}))
    one, two = load_sweep(sweep_file(arms={"a": whole, "b": key}, grid={})).runs()
    assert one.recipe.optim == two.recipe.optim and one.recipe.optim.batch_size == 8


def test_what_tries_would_choose_is_not_set_by_the_grid(sweep_file):
    """Every run would have the grid's value, so the tries would be for nothing."""
    tries = {"seqlora": [{"optim.lr": 1e-3}, {"optim.lr": 3e-3}], "ewc": [{}, {"method.weight": 1.0}]}
    asked = {"tune": {"tries": tries}, "grid": {"seed": [1], "optim.lr": [1e-2]}}
    with pytest.raises(Fault, match=r"tune.tries: seqlora would choose optim.lr, which 'grid' sets .*0.01"):
        load_sweep(sweep_file(**asked))


TRIES = {"seqlora": [{"optim.lr": 1e-2}, {"optim.lr": 3e-2}], "ewc": [{}, {"method.weight": 1.0}]}


@pytest.mark.parametrize(
    "tune, split",
    [
        ({"tries": TRIES}, "eval"),
        ({"tries": TRIES, "set": {"seed": 0}}, "eval"),
        ({"tries": TRIES, "set": {"eval.split": "test"}}, "test"),
        ({"tries": {"seqlora": [{"eval.split": "test"}], "ewc": [{"eval.split": "test"}]}}, "test"),
    ],
)
def test_tries_are_scored_on_eval_unless_they_say_otherwise(sweep_file, tune, split):
    """Also where the recipe of all runs says test; the report names the split that was."""
    asked = load_sweep(sweep_file(tune=tune, set={"checkpoint": False, "eval.split": "test"}))
    assert {run.recipe.eval.split for run in asked.tries} == {split}
    assert {run.recipe.eval.split for run in asked.runs()} == {"test"}
    for run in asked.tries:
        run.folder.open(run.recipe.resolved(), {"base": "x"})
        found = summarise(["ONE", "TWO"], [[50.0, None], [40.0, 60.0]], None)
        write_json(run.folder.path / "summary.json", {**found, "costs": None, "general": {}})
    text = comparison.render(comparison.compare(asked), "x")
    assert f"Settings of each arm were chosen by op on the {split} splits, among:" in text
    assert "| 50.0 | 55.0 | 10.0 |  |" in text  # OP, just learnt, forgetting, and ΔR without general ability


def test_a_setting_of_one_point_of_the_grid_alone_is_checked_before_the_first(sweep_file, launches):
    points = {"method.rank": [2, 4000], "optim.warmup": [0, 100], "trackers": [[], ["nothing"]]}
    with pytest.raises(Fault) as fault:
        go(sweep_file(grid=points))
    text = str(fault.value)
    for part in ("method.rank: 4000", "optim.warmup: 100", "trackers: 'nothing'"):
        assert f"seqlora: {part}" in text
    assert not launches


def test_all_folders_of_other_settings_are_told_at_once(sweep_file, launches):
    for run in load_sweep(sweep_file()).runs():
        run.folder.open(run.recipe.resolved(), {"base": "x"})
    with pytest.raises(Fault) as fault:
        go(sweep_file(), "data.epochs=2")
    assert len([m for m in fault.value.messages if "was run with other settings" in m]) == 4 and not launches


def test_runs_by_two_versions_of_a_plug_in_are_not_mixed(sweep_file, launches, tmp_path):
    """Only a hash tells them apart: the file is edited between two calls, and the settings stay."""
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    path = sweep_file(arms={"seqlora": {"method": "seqlora"}, "mine": {"method": "mine"}}, grid={"seed": [1]})
    with plugin(file):
        for run in load_sweep(path).runs():
            metrics = [name for task in run.recipe.tasks for name in run.recipe.benchmark.task(task).metrics]
            run.folder.open(run.recipe.resolved(), {"plugins": plugins.used(run.recipe.method.name, metrics)})
        assert finished(load_sweep(path).runs()) == []  # of the same version, and not refused
        file.write_text(FILE + "# another\n")
        plugins.load([file])
        with pytest.raises(Fault) as fault:
            go(path)
    (told,) = fault.value.messages
    assert "mine/seed=1 was made with another version of method mine" in told and not launches
    assert told.endswith("give the file as it was, give the arm another name, or remove the folder")


def test_a_setting_that_no_run_gets_is_refused(sweep_file):
    """It would be silently ignored: what a grid or an arm sets comes later."""
    with pytest.raises(Fault, match=r"^seed: 7 is given for all runs, and none gets it, since 'grid' has"):
        load_sweep(sweep_file(), ["seed=7"])
    with pytest.raises(Fault, match="method: 'ewc' is given .* since all of 'arms' have a method"):
        load_sweep(sweep_file(arms={"a": {"method": "seqlora"}}), ["method=ewc"])
    assert load_sweep(sweep_file(), ["method=ewc"])  # one of two arms gets it
    tune = {"tries": {"seqlora": [{}], "ewc": [{}]}}
    assert {run.recipe.seed for run in load_sweep(sweep_file(tune=tune), ["seed=7"]).tries} == {7}
    with pytest.raises(Fault, match="seed: 7 .* none gets it"):
        load_sweep(sweep_file(tune={**tune, "set": {"seed": 0}}), ["seed=7"])


def test_a_set_that_meets_the_default_grid_is_refused(sweep_file):
    path = sweep_file(set={"seed": 7})
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({key: raw[key] for key in raw if key != "grid"}), encoding="utf-8")
    with pytest.raises(Fault, match=r"seed: 7 .* since 'grid' has seed: \[1, 2, 3\]"):
        load_sweep(path)


def test_an_arm_that_sets_nothing_is_the_recipe(sweep_file):
    found = load_sweep(sweep_file(arms={"plain": None, "ewc": {"method": "ewc"}}, grid={"seed": [1]}))
    assert [run.recipe.method.name for run in found.runs()] == ["seqlora", "ewc"]


def test_tries_of_different_splits_are_refused(sweep_file):
    tries = {"seqlora": [{}, {"eval.split": "test"}], "ewc": [{}, {}]}
    with pytest.raises(Fault, match="tune.tries: some are scored on the eval splits and some on test"):
        load_sweep(sweep_file(tune={"tries": tries}))


def test_tries_are_refused_where_eval_is_test(sweep_file, toy_stream, tmp_path, launches):
    shutil.copytree(toy_stream, tmp_path / "same")
    for task in ("ONE", "TWO"):
        shutil.copy(tmp_path / "same" / task / "test.json", tmp_path / "same" / task / "eval.json")
    same = {"checkpoint": False, "data.root": str(tmp_path / "same")}
    load_sweep(sweep_file(set=same)).prepare()
    with pytest.raises(Fault, match="eval.json has no prompt that test.json lacks") as fault:
        go(sweep_file(set=same, tune={"tries": TRIES}))
    assert "seqlora: " in str(fault.value) and not launches


def test_a_run_that_fails_stops_no_other(sweep_file, monkeypatch):
    started = []
    monkeypatch.setattr(
        runner, "_launch", lambda run, *_: started.append(run.arm) or Ended(run.arm == "seqlora")
    )
    with pytest.raises(Fault) as fault:
        go(sweep_file())
    assert started == ["seqlora", "ewc"] * 2 and len(fault.value.messages) == 2
    assert "seed=1.log" in fault.value.messages[0]


def test_one_run_per_gpu_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 8)
    assert runner._places(None, None) == [{"OMP_NUM_THREADS": "8"}]
    assert runner._places(4, None) == [{"OMP_NUM_THREADS": "2"}] * 4
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 2)
    for visible, gpus in (("", ["0", "1"]), ("3,5", ["3", "5"])):  # those of the machine that were given
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [place["CUDA_VISIBLE_DEVICES"] for place in runner._places(None, None)] == gpus
    assert runner._places(None, "accelerate launch") == [{}]


@pytest.mark.parametrize(
    ("jobs", "launcher", "told"),
    [(2, "accelerate launch", "leave one of the two out"), (None, "accelerate 'launch", "is not a command")],
)
def test_a_launcher_is_checked_before_anything_runs(jobs, launcher, told, sweep_file):
    asked = load_sweep(sweep_file())
    with pytest.raises(Fault, match=told):
        runner.execute(asked, jobs, launcher, lambda: None)
    assert not asked.output.exists()


def test_read_jsonl_keeps_line_separators(tmp_path):
    from codyra_llm.core.files import read_jsonl

    write_jsonl(tmp_path / "x.jsonl", [{"a": "one\u2028two\x85three"}, {"a": "\n"}])
    assert [row["a"] for row in read_jsonl(tmp_path / "x.jsonl")] == ["one\u2028two\x85three", "\n"]

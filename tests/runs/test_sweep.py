"""Sweeps: which runs a file asks for, that each is run once, how settings are chosen, and the intervals of
the comparison.
"""

import pytest
from helpers import call
from sweeps import go

from codyra_llm.core.errors import Fault
from codyra_llm.experiment.setup import prepare
from codyra_llm.sweep import comparison, forecast, runner
from codyra_llm.sweep.spec import load_sweep


def test_a_finished_run_is_not_run_again(sweep_file, launches):
    go(sweep_file())
    assert launches == ["seqlora/seed=1", "ewc/seed=1", "seqlora/seed=2", "ewc/seed=2"]
    go(sweep_file(grid={"seed": [1, 2, 3]}))
    assert launches[4:] == ["seqlora/seed=3", "ewc/seed=3"]
    go(
        sweep_file(set={"checkpoint": False, "data.tasks": ["ONE", "TWO", "THREE"]}, arms={"seqlora": {}})
    )  # a longer stream
    assert launches[6:] == ["seqlora/seed=1", "seqlora/seed=2"]
    with pytest.raises(Fault, match="seed=1 was run with other settings: data.epochs was .*name"):
        go(sweep_file(), "data.epochs=2")


def test_the_best_try_is_what_is_run(sweep_file, launches):
    rates = [{"optim.lr": 1e-9}, {"optim.lr": 3e-2}]
    asked = go(
        sweep_file(
            arms={"seqlora": {}},
            set={"checkpoint": False, "data.epochs": 20, "data.tasks": ["ONE"]},
            tune={"set": {"seed": 0, "eval.split": "eval"}, "tries": {"seqlora": rates}},
        )
    )
    scores = [run.folder.summary["op"] for run in asked.tries]
    assert scores[0] < scores[1]
    assert all(run.recipe.eval.split == "eval" and run.recipe.seed == 0 for run in asked.tries)
    assert [(r.recipe.optim.lr, r.recipe.eval.split) for r in asked.runs()] == [(3e-2, "test")] * 2
    assert launches == ["seqlora/try=1", "seqlora/try=2", "seqlora/seed=1", "seqlora/seed=2"]
    found = comparison.compare(asked)
    assert [tried["learnt"] for tried in found["tries"]] == scores  # of one task
    text = comparison.render(found, "x")
    assert "| arm | try | op | just learnt | forgetting | ΔR | chosen |" in text
    assert f"| seqlora | optim.lr=0.03 | {scores[1]:.1f} | {scores[1]:.1f} |  |  | yes |" in text


def test_a_dry_run_lists_runs_tokens_and_hours(sweep_file, launches, capsys):
    """Tokens in closed form: of every example prompt and answer, here without padding in batches of 8."""
    path = sweep_file(grid={"seed": [1, 2], "optim.lr": [1e-2, 1e-3]}, set={"checkpoint": False})
    code, out, err = call(capsys, "sweep", path, "--dry-run", "--jobs", "2")
    assert code == 0, err
    asked = load_sweep(path)
    found = forecast.foresee(asked)
    assert len(found) == 8 and not launches and not asked.output.exists()
    assert len({id(one.training) for one in found}) == 2  # an arm's seeds and rates are measured once
    setup = prepare(found[0].run.recipe)
    records = [setup.encoder.encode(setup.stream.records(i, "train")) for i in range(2)]
    least = sum(len(example) for examples in records for example in examples)
    work = found[0].training
    assert work.steps == 2 * 3 and least <= work.tokens <= 1.5 * least  # 20 examples of each of two tasks
    total = sum(one.training.tokens for one in found)
    assert f"8 of 8 runs are left: {total:,} tokens" in out
    assert "hours of training" in out and "with 2 at a time" in out and "nothing was run" in out
    go(sweep_file(grid={"seed": [1]}))
    code, out, _ = call(capsys, "sweep", sweep_file(grid={"seed": [1, 2]}), "--dry-run")
    assert "2 of 4 runs are left" in out and out.count("finished") == 2


def test_a_sweep_that_is_refused_leaves_the_comparison_of_another(sweep_file, launches, capsys):
    """Two sweeps share an output: the second waits or is refused, and may be of other arms."""
    one = load_sweep(sweep_file(grid={"seed": [1]}))
    comparison.write(one, "first")
    written = (one.output / "sweep.md").read_bytes()
    with runner._held(one.output):
        code, _, err = call(capsys, "sweep", sweep_file(arms={"other": {"method": "ewc"}}))
    assert code == 2 and "another sweep, or a run that it left, is at work" in err
    assert (one.output / "sweep.md").read_bytes() == written and not launches

"""The comparison of a sweep: its intervals, what it pools, pairs and leaves out, and its table."""

import io

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import norm, ttest_1samp

from codyra_llm.core.files import write_json
from codyra_llm.evaluate.matrix import summary as summarise
from codyra_llm.evaluate.statistics import MEASURES, resampled
from codyra_llm.store.rows import ScoreRow
from codyra_llm.sweep import comparison
from codyra_llm.sweep.spec import load_sweep


def faked(sweep, scores: dict[tuple[str, int], dict[tuple[int, str], list[float]]]) -> None:
    """Write run folders of two tasks with these scores by (step, task), each exact match of an example."""
    for run in sweep.runs():
        cells = scores[run.arm, run.settings["seed"]]
        run.folder.open(run.recipe.resolved(), {"base": "x"})
        means = {cell: float(np.mean(values)) for cell, values in cells.items()}
        found = summarise(["ONE", "TWO"], [[means.get((s, t)) for t in ("ONE", "TWO")] for s in (1, 2)], None)
        cost = {"trained": 10, "seconds": 2.0 if run.arm == "ewc" else 1.0, "peak_bytes": None}
        write_json(run.folder.path / "summary.json", {**found, "general": {}, "costs": cost})
        for (step, task), values in cells.items():
            after = ("ONE", "TWO")[step - 1]
            row = ScoreRow(after, step, task, "task", "exact_match", means[step, task])
            run.folder.add_scores(row, [{"exact_match": v} for v in values])


def test_intervals_over_seeds_and_paired_differences(sweep_file):
    rng = np.random.default_rng(0)
    asked = load_sweep(sweep_file(grid={"seed": [1, 2, 3, 4]}))
    scores = {
        (arm, seed): {
            cell: list(rng.integers(0, 2, 5) * 100.0) for cell in ((1, "ONE"), (2, "ONE"), (2, "TWO"))
        }
        for arm in ("seqlora", "ewc")
        for seed in (1, 2, 3, 4)
    }
    faked(asked, scores)
    base, ewc = comparison.compare(asked)["rows"]
    ops = {
        arm: [np.mean([np.mean(scores[arm, s][2, t]) for t in ("ONE", "TWO")]) for s in (1, 2, 3, 4)]
        for arm in ("seqlora", "ewc")
    }
    for found, values in (
        (ewc["op"], ops["ewc"]),
        (ewc["difference"]["op"], np.subtract(ops["ewc"], ops["seqlora"])),
    ):
        bounds = ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found["mean"], found["low"], found["high"]) == pytest.approx((np.mean(values), *bounds))
        assert found["over"] == "seeds"
    assert base["difference"] is None and ewc["relative"] == {"trained": 1, "seconds": 2, "peak_bytes": None}
    assert ewc["seeds"] == 4 and ewc["learnt"]["mean"] == pytest.approx(
        np.mean(
            [[np.mean(scores["ewc", s][1, "ONE"]), np.mean(scores["ewc", s][2, "TWO"])] for s in (1, 2, 3, 4)]
        )
    )


def test_intervals_over_test_examples(sweep_file):
    """Of one seed: near the normal approximation, and nought for a difference between equal predictions."""
    asked = load_sweep(sweep_file(grid={"seed": [1]}))
    rng = np.random.default_rng(1)
    cells = {cell: list(rng.integers(0, 2, 400) * 100.0) for cell in ((1, "ONE"), (2, "ONE"), (2, "TWO"))}
    faked(asked, {("seqlora", 1): cells, ("ewc", 1): cells})
    _, ewc = comparison.compare(asked)["rows"]
    error = np.sqrt(sum(np.var(cells[2, t]) / 400 for t in ("ONE", "TWO"))) / 2
    half = (ewc["op"]["high"] - ewc["op"]["low"]) / 2
    assert half == pytest.approx(norm.ppf(0.975) * error, rel=0.1) and ewc["op"]["over"] == "test examples"
    # The same examples are drawn in both rows of ONE, so BWT's interval is that of the paired difference.
    change = np.subtract(cells[2, "ONE"], cells[1, "ONE"])
    assert (ewc["bwt"]["high"] - ewc["bwt"]["low"]) / 2 == pytest.approx(
        norm.ppf(0.975) * change.std() / 20, rel=0.1
    )
    assert ewc["difference"]["op"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "over": "test examples"}


def test_tasks_of_one_example_or_none_have_no_interval(sweep_file):
    """Of one run: a single example says nothing of the spread, and a task without one has no score."""
    asked = load_sweep(sweep_file(grid={"seed": [1]}, arms={"seqlora": {}}))
    faked(asked, {("seqlora", 1): {(2, "ONE"): [100.0], (2, "TWO"): [0.0, 100.0]}})
    (run,) = asked.runs()
    run.folder.add_scores(ScoreRow("TWO", 2, "probe", "general", "acc", None), [])
    found = comparison.compare(asked)
    assert found["rows"][0]["op"] == {"mean": 75.0, "low": None, "high": None, "over": None}
    assert "| seqlora | 75.0 |" in comparison.render(found, "x")


def test_the_change_of_general_ability_is_paired(sweep_file):
    """Of one seed: the same questions are drawn before and after, so ΔR's interval is that of the change of
    single questions; IFEval is not a member, and a probe of the base alone neither."""
    asked = load_sweep(sweep_file(grid={"seed": [1]}, arms={"seqlora": {}}))
    rng = np.random.default_rng(2)
    (run,) = asked.runs()
    faked(asked, {("seqlora", 1): {(2, "ONE"): [100.0], (2, "TWO"): [0.0]}})
    probes = {}
    for name in ("piqa", "boolq", "ifeval"):
        before = rng.integers(0, 2, 400) * 100.0
        after = np.where(rng.random(400) < 0.1, 0.0, before)  # a tenth of the questions is lost
        probes[name] = before, after
    general = {}
    for name, ends in probes.items():
        general[name] = dict(zip(("before", "after"), map(np.mean, ends), strict=True))
        for step, after, values in ((0, "base", ends[0]), (2, "TWO", ends[1])):
            row = ScoreRow(after, step, name, "general", "acc,none", float(values.mean()))
            run.folder.add_scores(row, [{"acc,none": value} for value in values])
    write_json(run.folder.path / "summary.json", run.folder.summary | {"general": general})
    found = comparison.compare(asked)
    (row,) = found["rows"]
    changes = [np.subtract(after, before) for before, after in (probes["piqa"], probes["boolq"])]
    error = np.sqrt(sum(change.var() / 400 for change in changes)) / 2
    assert row["delta_r"]["mean"] == pytest.approx(np.mean(changes))
    assert row["delta_r"]["over"] == "test examples"
    half = (row["delta_r"]["high"] - row["delta_r"]["low"]) / 2
    assert half == pytest.approx(norm.ppf(0.975) * error, rel=0.1)
    level = (row["general"]["high"] - row["general"]["low"]) / 2
    assert level > 1.5 * half  # which is why the change has an interval of its own
    text = comparison.render(found, "x")
    assert "| general ability | ΔR |" in text and f" | {np.mean(changes):.1f} ± {half:.1f} | " in text


def test_runs_are_pooled_over_seeds_and_orders(sweep_file):
    """Against scipy over all runs of an arm, paired by seed and order; and order by order."""
    orders = [["ONE", "TWO"], ["TWO", "ONE"]]
    asked = load_sweep(sweep_file(grid={"seed": [1, 2], "data.tasks": orders}))
    rng, ops = np.random.default_rng(3), {}
    for run in asked.runs():
        matrix = rng.uniform(0, 100, (2, 2)).tolist()
        run.folder.open(run.recipe.resolved(), {"base": "x"})
        found = summarise(run.recipe.tasks, matrix, None)
        cost = {"trained": 10, "seconds": 1.0, "peak_bytes": None}
        write_json(run.folder.path / "summary.json", {**found, "general": {}, "costs": cost})
        ops[run.arm, run.settings["seed"], run.recipe.tasks[0]] = np.mean(matrix[-1])
    found = comparison.compare(asked)
    points = [(seed, first) for seed in (1, 2) for first in ("ONE", "TWO")]
    values = {arm: np.array([ops[arm, *point] for point in points]) for arm in ("seqlora", "ewc")}
    base, ewc = found["rows"]
    for row, arm in ((base, "seqlora"), (ewc, "ewc")):
        bounds = ttest_1samp(values[arm], 0).confidence_interval(0.95)
        assert (row["op"]["mean"], row["op"]["low"], row["op"]["high"]) == pytest.approx(
            (values[arm].mean(), *bounds)
        )
        assert (row["runs"], row["seeds"], row["orders"], row["settings"]) == (4, 2, 2, "")
    paired, own = ttest_1samp(values["ewc"] - values["seqlora"], 0), ewc["difference"]["op"]
    assert (own["mean"], own["low"], own["high"]) == pytest.approx(
        ((values["ewc"] - values["seqlora"]).mean(), *paired.confidence_interval(0.95))
    )
    by_order = {(row["arm"], row["settings"]): row["op"]["mean"] for row in found["by_order"]}
    assert by_order == {
        (arm, f"order {','.join(order)}"): pytest.approx(np.mean([ops[arm, s, order[0]] for s in (1, 2)]))
        for arm in ("seqlora", "ewc")
        for order in orders
    }
    text = comparison.render(found, "x")
    assert "Means over 2 seeds and 2 orders, ± half the width of a 95 % interval over runs" in text
    assert "time by the clock: where other jobs shared the machine it says little of the method" in text
    head, _, rest = text.partition("By order of the tasks, over seeds:")
    assert head.count("| ewc |") == 1 and rest.count("| ewc order ") == 2


def test_other_tasks_are_no_other_order(sweep_file):
    asked = load_sweep(sweep_file(grid={"data.tasks": [["ONE"], ["TWO"]]}, arms={"seqlora": {}}))
    for run in asked.runs():
        run.folder.open(run.recipe.resolved(), {"base": "x"})
        found = summarise(run.recipe.tasks, [[50.0]], None)
        write_json(run.folder.path / "summary.json", {**found, "general": {}, "costs": None})
        task = run.recipe.tasks[0]
        row = ScoreRow(after=task, step=1, task=task, kind="task", headline="exact_match", score=50.0)
        run.folder.add_scores(row, [{"exact_match": 50.0}])
    found = comparison.compare(asked)
    assert [row["settings"] for row in found["rows"]] == ["order ONE", "order TWO"] and not found["by_order"]


def test_arms_with_other_seeds_are_compared_over_those_they_share(sweep_file):
    asked = load_sweep(sweep_file(grid={"seed": [1, 2, 3]}))
    cells = {(1, "ONE"): [0.0, 100.0], (2, "ONE"): [0.0, 100.0], (2, "TWO"): [0.0, 100.0]}
    faked(asked, {(arm, seed): cells for arm in ("seqlora", "ewc") for seed in (1, 2, 3)})
    for run in asked.runs():
        summary = run.folder.summary
        if run.arm == "ewc" and run.settings["seed"] > 1:
            (run.folder.path / "summary.json").unlink()
        else:
            summary["costs"]["seconds"] *= run.settings["seed"]
            write_json(run.folder.path / "summary.json", summary)
    found = comparison.compare(asked)
    base, ewc = found["rows"]
    said = "over seeds or test examples (over test examples, of one run each: ewc); time"
    assert said in comparison.render(found, "x")  # which of the two kinds of ± a row has
    assert (base["seeds"], ewc["seeds"]) == (3, 1) and base["relative"]["seconds"] == 1
    assert (
        ewc["relative"]["seconds"] == 2
    )  # 2 s against the 1 s of the same seed, not against the mean of 1, 2 and 3 s
    assert ewc["difference"]["op"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "over": "test examples"}


def test_tasks_are_drawn_independently():
    scores = np.arange(50.0)
    first, again, other = (resampled(name, scores) for name in ("task12", "task12", "task21"))
    assert (first == again).all() and abs(np.corrcoef(first, other)[0, 1]) < 0.1


def test_the_table_fits_a_terminal():
    """Every number whole in 80 columns, however long the name of the arm."""
    value = {"mean": -43.21, "low": -46.0, "high": -40.0, "over": "seeds"}
    row = {
        "arm": "hidelora_treelora_repo",
        "settings": "",
        "seeds": 3,
        "orders": 1,
        **dict.fromkeys(MEASURES, value),
        "floor": 30.0,
        "difference": dict.fromkeys(MEASURES, value),
        "costs": None,
        "relative": {"seconds": 12.3, "peak_bytes": 1.25},
    }
    console = Console(width=80, file=io.StringIO())
    console.print(comparison.table({"rows": [row], "baseline": "seqlora"}))
    assert " -43.2 ± 3.0 -43.2 ± 3.0 -43.2 ± 3.0 -43.2 ± 3.0 12.30   1.25" in console.file.getvalue()
    console.print(comparison.table({"rows": [], "baseline": "seqlora"}))


def test_a_measure_that_was_not_taken_is_left_blank(sweep_file):
    asked = load_sweep(sweep_file())
    faked(
        asked,
        {
            (arm, seed): {(2, "ONE"): [100.0], (2, "TWO"): [0.0]}
            for arm in ("seqlora", "ewc")
            for seed in (1, 2)
        },
    )
    found = comparison.compare(asked)
    assert found["rows"][0]["bwt"] is None and found["rows"][0]["op"]["mean"] == 50
    assert "| seqlora | 50.0 ± 0.0 |  |  |" in comparison.render(found, "x")


def told(sweep, arm: str, **changes) -> None:
    """Put values into the summaries of an arm's runs."""
    for run in sweep.runs():
        if run.arm == arm:
            write_json(run.folder.path / "summary.json", run.folder.summary | changes)


def test_arms_that_were_measured_otherwise_have_no_difference(sweep_file):
    arms = {"seqlora": {}, "ewc": {"eval.max_examples": 2}}
    asked = load_sweep(sweep_file(grid={"seed": [1]}, arms=arms))
    cells = {(2, "ONE"): [100.0, 0.0], (2, "TWO"): [0.0, 0.0]}
    faked(asked, {(arm, 1): cells for arm in arms})
    found = comparison.compare(asked)
    assert found["unlike"] == ["examples scored"] and found["rows"][1]["difference"] is None
    assert "Runs here differ in examples scored." in comparison.render(found, "x")


def test_a_setting_is_text_in_the_table(sweep_file):
    """Of an arm's point and of a try: it ends no cell, begins no tag, and holds nothing for a terminal."""
    asked = load_sweep(sweep_file(grid={"seed": [1], "data.root": ["a|<b>\x9b2J"]}))
    cells = {(2, "ONE"): [100.0], (2, "TWO"): [0.0]}
    faked(asked, {(arm, 1): cells for arm in ("seqlora", "ewc")})
    found = comparison.compare(asked)
    found["tries"] = [{"arm": "ewc", "settings": {"data.root": "a|<b>\x9b2J"}, "split": "eval", "op": 1.0}]
    text = comparison.render(found, "x")
    shown = "data.root=a\\|&lt;b>\ufffd2J |"
    assert f"| seqlora {shown} 50.0" in text and f"| ewc | {shown} 1.0" in text
    assert "<b>" not in text and "\x9b" not in text


def test_the_floor_and_answers_that_are_all_alike_are_told(sweep_file):
    asked = load_sweep(sweep_file(grid={"seed": [1, 2]}))
    cells = {(1, "ONE"): [0.0, 100.0], (2, "ONE"): [0.0, 100.0], (2, "TWO"): [0.0, 100.0]}
    faked(asked, {(arm, seed): cells for arm in ("seqlora", "ewc") for seed in (1, 2)})
    before = comparison.render(comparison.compare(asked), "x")
    assert "training answer" not in before and "the same answer" not in before  # of runs that noted neither
    alike = {"task": "ONE", "after": "TWO", "of": 2, "alike": 1.0, "empty": 0, "cut": 0}
    told(asked, "ewc", answers=[alike], floor={"scores": [20.0, 31.0], "op": 25.5})
    told(asked, "seqlora", answers=[], floor={"scores": [20.0, 31.0], "op": 25.5})
    found = comparison.compare(asked)
    assert [row["floor"] for row in found["rows"]] == [25.5, 25.5]
    text = comparison.render(found, "x")
    blank = " |" * (len(comparison.COLUMNS) - 2)
    assert f"| most frequent training answer | 25.5 |{blank}\n" in text
    assert "just after the task or at the end: ewc: ONE (2 of 2 runs).\n" in text
    told(asked, "ewc", floor={"scores": [20.0, 11.0], "op": 15.5})
    text = comparison.render(comparison.compare(asked), "x")
    assert "| most frequent training answer, of seqlora | 25.5 |" in text
    assert "| most frequent training answer, of ewc | 15.5 |" in text

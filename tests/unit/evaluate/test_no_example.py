"""A task without an example has no score, and takes that of the mean with it."""

import json
from types import SimpleNamespace

from made_runs import TASKS, make

from codyra_llm.checkpoints.evaluate import _finish
from codyra_llm.core.files import write_jsonl
from codyra_llm.evaluate.matrix import mean
from codyra_llm.evaluate.statistics import commonest, delta_r, summarise
from codyra_llm.experiment import scoring
from codyra_llm.store.rows import ScoreRow, Stage


def row(task: str, values: list[float]) -> ScoreRow:
    found = summarise(values)
    return ScoreRow("c", 1, task, "task", "exact_match", found["mean"], {"exact_match": found})


def test_the_summary_of_an_evaluation(tmp_path):
    folder, rows = make(tmp_path / "run"), [row(TASKS[1], [100.0, 50.0]), row(TASKS[2], [])]
    setup = SimpleNamespace(recipe=folder.recipe, dtype="float32")
    experiment = SimpleNamespace(setup=setup, store=folder)
    for had, expected in (([rows[0]], 75.0), (rows, None), ([], None)):
        write_jsonl(folder.path / "scores.jsonl", [each.as_json() for each in had])
        _finish("c", experiment, Stage(1, "c"), 0)
        summary = json.loads((folder.path / "summary.json").read_text("utf-8"))
        assert summary["mean"] == expected
        assert list(summary["tasks"]) == [each.task for each in had]
    written = [json.loads(file.read_text("utf-8")) for file in folder.path.glob("lm_eval/*/results_*.json")]
    shares = [found["results"].get(TASKS[2], {}).get("exact_match,none") for found in written]
    assert sorted(map(str, shares)) == ["N/A", "None"]


def test_what_is_said_of_it(monkeypatch):
    said = []
    monkeypatch.setattr(scoring, "say", said.append)
    scoring._say(row("T", []), 2)
    scoring._say(row("T", [50.0]), 2)
    assert said == ["after c: T no example  (exact_match, 2 s)", "after c: T 50.0  (exact_match, 2 s)"]


def test_means():
    assert mean([1.0, 4.0]) == 2.5 and mean([1.0, None]) is None and mean([]) is None
    scored, unscored = {"before": 4.0, "after": 2.0}, {"before": 4.0, "after": None}
    assert delta_r({"a": scored, "b": unscored}) == {"value": -2.0, "members": ["a"]}


def test_the_commonest_answer():
    assert commonest([]) is None
    assert commonest(["b", "a", "a", ""]) == ("a", 0.5)
    assert commonest(["b", "a", "b", "a"]) == ("b", 0.5)  # the first one


def test_answers_of_white_space_are_empty():
    """As metrics see them that strip, and readers of a table."""
    questions = scoring.Questions("T", [{"prompt": "p", "answer": "a"}] * 4, 2, 0)
    scores = {"exact_match": [0.0] * 4}
    row = scoring._score_row(questions, Stage(1, "c"), scores, "exact_match", ["", "\n", " \t", "a"], 0)
    assert row.empty == 3

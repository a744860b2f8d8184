"""The line that tells how far a run is: what it says at any width, where it may be drawn, and what it says is
left.
"""

import re
from io import StringIO

import pytest
from helpers import tiny_recipe
from safetensors.torch import load_file

from codyra_llm.core.terminal import console, log_printed
from codyra_llm.experiment import run
from codyra_llm.experiment.agenda import remaining, steps, tokens
from codyra_llm.experiment.observers import Display
from codyra_llm.experiment.setup import prepare
from codyra_llm.runtime import signals
from codyra_llm.store import folder as runs
from codyra_llm.store.observer import Observer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eval__zero_shot": True, "eval__tasks": "all"},
        {"method": "mtl"},
        {"method": "none"},
        {"method": "none", "general__data": "mini"},
    ],
)
def test_a_run_does_what_was_expected_of_it(changes, tiny_llama, toy_stream, tmp_path, capsys):
    """The pieces, the steps and the tokens that are foreseen are those that come; an observer hears them all,
    and without a display nothing is printed."""
    asked = tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", checkpoint=False, **changes)

    class Begun(Observer):
        def __init__(self):
            self.pieces, self.scores, self.rows, self.calls = [], [], [], []

        def run_begins(self, tasks):
            self.calls.append(tasks)

        def run_ends(self):
            self.calls.append("end")

        def stage_begins(self, stage, piece):
            assert piece.stage == stage.step
            self.pieces.append(piece)

        def scored(self, row):
            self.scores.append(row)

        def row_logged(self, row):
            self.rows.append(row)

    heard = Begun()
    folder = run.run(asked, [heard])
    begun = heard.pieces
    assert heard.scores == folder.scores and heard.rows == folder.log_rows
    assert heard.calls == [asked.resolved().tasks, "end"] and capsys.readouterr().out == ""
    fresh = prepare(asked)
    assert (
        set(begun[:-1]) == set(remaining(fresh, runs.RunFolder(tmp_path / "none"), 0))
        and begun[-1].kind == "close"
    )
    assert len(begun) == len(set(begun)) and not remaining(fresh, folder, 2)
    trained = {task: [row for row in folder.log_rows if row.task == task] for task in fresh.recipe.tasks}
    assert steps(fresh) == [len(rows) for rows in trained.values()]
    counted = [sum(row.tokens for row in rows) for rows in trained.values()]
    assert [tokens(fresh, index) * bool(rows) for index, rows in enumerate(trained.values())] == counted


def test_a_run_on_a_terminal_ends_as_any_other(tiny_llama, toy_stream, tmp_path, monkeypatch):
    asked = tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", checkpoint=False)
    folder = run.run(asked)
    screened = StringIO()
    for name, value in {
        "_file": screened,
        "_force_terminal": True,
        "is_interactive": True,
        "_width": 60,
    }.items():
        monkeypatch.setattr(console, name, value)
    with log_printed():
        other = run.run(asked.model_copy(update={"output": str(tmp_path / "terminal")}), [Display()])
    assert (other.path / "scores.jsonl").read_bytes() == (folder.path / "scores.jsonl").read_bytes()
    assert other.archive().lineage == folder.archive().lineage  # hashes of the weights
    told = [line for line in screened.getvalue().splitlines() if "after " in line and "(exact_match" in line]
    assert len(told) == len(folder.scores) and all(re.search(r"(2K|25h|^)after ", line) for line in told)


def test_the_final_model_is_written_weight_by_weight(tiny_llama, toy_stream, tmp_path, monkeypatch):
    """A large one takes longer than a launch may stand still; and who asks to stop does not wait for it."""

    class Places(Observer):
        found: list[str] = []

        def at(self, place):
            self.found.append(place)
            if place == "the final model, model.embed_tokens.weight" and self.found.count(place) == 1:
                signals.ask("a test")

    asked = tiny_recipe(tiny_llama, toy_stream, tmp_path / "run")
    monkeypatch.setattr(signals, "_asked", [])
    with pytest.raises(signals.Stopped, match="a test"):
        run.run(asked, [Places()])
    assert not (tmp_path / "run" / "checkpoint").exists()
    signals._asked.clear()
    run.run(asked, [Places()])
    weights = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert {f"the final model, {name}" for name in weights} <= set(Places.found)

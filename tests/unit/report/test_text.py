"""The scores as a terminal of 80 columns shows them. Oracle: the numbers put in."""

import io

import pytest

from codyra_llm.core.terminal import Terminal
from codyra_llm.report.grid import number
from codyra_llm.report.groups import over
from codyra_llm.report.summary import MEASURES
from codyra_llm.report.text import table
from codyra_llm.sweep.comparison import _shown


def shown(tasks, matrix, zero_shot=None):
    names = [f"a task called {i}" for i in range(tasks)]
    found = dict.fromkeys(MEASURES) | {"op": 50.0, "method": "seqlora", "tasks": names, "matrix": matrix}
    out = io.StringIO()
    Terminal(file=out, width=80).print(table(found | {"zero_shot": zero_shot, "general": {}}))
    return out.getvalue()


@pytest.mark.parametrize("tasks", [2, 8, 10])
def test_a_stream_that_fits_is_a_matrix(tasks):
    text = shown(tasks, [[100.0] * tasks for _ in range(tasks)])
    assert text.count("100.0") == tasks * tasks and "after each task" in text


def test_a_longer_one_is_a_row_per_task_and_no_number_is_cut():
    matrix = [[float(10 * i + j) for j in range(23)] for i in range(23)]
    text = shown(23, matrix, [0.5] * 23)
    rows = [line.split()[-3:] for line in text.splitlines() if "a task called" in line]
    assert rows == [["0.5", f"{11 * i:.1f}", f"{220 + i:.1f}"] for i in range(23)]
    assert "report.md" in text and "…" not in text and "op 50.00" in text


def test_what_was_not_measured_is_blank():
    """eval.when ends: each task when it is learnt, and all at the end; and a run that trains nothing."""
    matrix = [[1.0 if i == j or i == 22 else None for j in range(23)] for i in range(23)]
    assert shown(23, matrix).count("1.0") == 46
    assert shown(23, [], [3.0] * 23).count("3.0") == 23


def test_a_narrow_matrix_does_not_break_what_is_said_of_it():
    found = dict.fromkeys(MEASURES, 50.0) | {"method": "seqlora", "tasks": ["A"], "matrix": [[1.0]]}
    out = io.StringIO()
    Terminal(file=out, width=80).print(table(found | {"zero_shot": None, "general": {}}))
    lines = out.getvalue().splitlines()
    assert lines[0] == "seqlora: score on each task, after each task"
    assert any(line.startswith("op 50.00   bwt 50.00   ") for line in lines)


def test_what_rounds_to_zero_has_no_minus():
    assert [number(value).text for value in (-0.04, 0.04, -0.06)] == ["0.0", "0.0", "-0.1"]
    assert over([-0.03, -0.01], "+z.1f").text.startswith("+0.0")
    assert _shown({"mean": -0.01, "low": None, "high": None}) == "0.0"

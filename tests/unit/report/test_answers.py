"""What hides behind a score: one answer to nearly all prompts, empty answers, and the floor. Oracle: the
numbers put in.
"""

import html
import json
import re

import pytest
from made_runs import TASKS, Page, make, score, written

from codyra_llm.core.files import read_jsonl, write_jsonl
from codyra_llm.report import answers
from codyra_llm.report.grid import plain
from codyra_llm.report.summary import summarised
from codyra_llm.report.text import render
from codyra_llm.store.rows import FloorRow, ScoreRow

FIRST, SECOND, THIRD = TASKS
NAME = "most frequent training answer"


def changed(folder, step: int, task: str, **values) -> None:
    """Put values into one row of the folder's scores."""
    rows = read_jsonl(folder.path / "scores.jsonl")
    for row in rows:
        if (row["step"], row["task"]) == (step, task):
            row |= values
    write_jsonl(folder.path / "scores.jsonl", rows)


def report(folder) -> str:
    return render(folder.recipe, summarised(folder), folder.updates)


def floors(scores: list[float]) -> list[dict]:
    """Rows of floor.jsonl, the last of a task that was added later missing where there are fewer scores."""
    rows = []
    for task, value in zip(TASKS, scores, strict=False):
        interval = {"mean": value, "low": value - 1, "high": value + 1, "n": 2}
        rows.append(FloorRow(task, "C", 0.6, "exact_match", value, {"exact_match": interval}).as_json())
    return rows


def test_a_row_as_it_was_written_before_and_as_it_is_now():
    old = score(1, FIRST, 80.0)
    row = ScoreRow.parse(old, "x")
    assert row.commonest is None and row.cut is None and row.as_json() == old
    new = old | {"commonest": 0.5, "cut": 0}
    assert ScoreRow.parse(new, "x").as_json() == new


@pytest.mark.parametrize(
    "share, count, told", [(0.9, 50, 0.9), (0.89, 50, None), (1.0, 2, 1.0), (1.0, 1, None), (None, 50, None)]
)
def test_from_which_share_on_answers_are_one(share, count, told):
    row = ScoreRow("T", 1, "T", "task", "m", 42.0, {"m": {"n": count}}, commonest=share)
    found = answers.noted([row], 3)
    assert [entry["alike"] for entry in found] == ([] if told is None else [told])


def test_rows_just_learnt_and_at_the_end_are_told_and_no_others(tmp_path):
    folder = make(tmp_path / "run")
    changed(folder, 0, SECOND, commonest=1.0)
    changed(folder, 1, FIRST, commonest=1.0)
    changed(folder, 2, FIRST, commonest=1.0, empty=2)
    changed(folder, 3, FIRST, commonest=0.95, empty=1)
    changed(folder, 3, SECOND, commonest=0.5)
    changed(folder, 3, "probe", commonest=1.0)
    one = f"{FIRST} (100% of 2 after {FIRST}, 95% of 2 after {THIRD}), probe (100% of 2 after {THIRD})"
    found = (
        f"One and the same answer to at least 90% of the prompts: {one}. Such a score shows nothing learnt "
        "from the prompts."
    )
    empty = f"Empty answers: {FIRST} (1 of 2 after {THIRD})."
    lines = report(folder).splitlines()
    assert plain(found) in lines and plain(empty) in lines
    texts = Page(written([folder], tmp_path / "x.html")).texts
    assert found in texts and empty in texts
    write_jsonl(folder.path / "floor.jsonl", floors([40.0, 10.0, 31.0]))
    found = f"{found[:-1]}; compare {FIRST} with the {NAME}."  # the probe has no floor
    assert plain(found) in report(folder).splitlines()
    assert found in Page(written([folder], tmp_path / "x.html")).texts


def test_general_ability_is_not_compared_with_a_floor(tmp_path):
    folder = make(tmp_path / "run")
    write_jsonl(folder.path / "floor.jsonl", floors([40.0, 10.0, 31.0]))
    changed(folder, 3, "probe", commonest=1.0)
    line = f"probe (100% of 2 after {THIRD}). Such a score shows nothing learnt from the prompts."
    assert report(folder).count(plain(line)) == 1
    assert line in " ".join(Page(written([folder], tmp_path / "x.html")).texts)


def test_foreign_names_are_text_in_markdown(tmp_path):
    """In report.md too: no name begins a tag, ends a cell, or holds what a terminal would interpret."""
    evil = "a|b\u202e<img src=x>"
    folder = make(tmp_path / "run", data__tasks=[evil, *TASKS[:2]], model__path="C:\\|<b>\x9b2J")
    text = report(folder)
    assert not re.search("<[a-z]|\x9b|\u202e", text)
    assert "Base model C:\\\\\\|&lt;b>\ufffd2J," in text  # backslash and bar have a backslash each
    head = next(line for line in text.splitlines() if line.startswith("| after |"))
    cells = re.findall(r"\| ((?:\\.|[^|\\])*?) (?=\|)", head)
    assert cells[:2] == ["after", "a\\|b\ufffd&lt;img src=x>"]
    assert [html.unescape(re.sub(r"\\(.)", r"\1", cell)) for cell in cells[2:]] == TASKS[:2]


def test_nothing_is_said_of_answers_that_differ_or_are_not_known(tmp_path):
    folder = make(tmp_path / "run")
    for commonest in (None, 0.5):
        changed(folder, 3, FIRST, **({} if commonest is None else {"commonest": commonest}))
        text = report(folder) + written([folder], tmp_path / "x.html")
        assert not any(
            said in text
            for said in ("One and the same", "Empty answers", "Answers cut", NAME, "op of the floor")
        )


def test_the_page_tells_all_cut_answers_and_the_report_where_half_are(tmp_path):
    folder = make(tmp_path / "run")
    changed(folder, 1, FIRST, cut=1, metrics={"exact_match": {"n": 3}})
    changed(folder, 3, SECOND, cut=1)
    few = f"{FIRST} (1 of 3 after {FIRST}), {SECOND} (1 of 2 after {THIRD})"
    begin = "Answers cut at eval.max_new_tokens, before they ended:"
    assert f"{begin} {few}." in Page(written([folder], tmp_path / "x.html")).texts
    assert plain(f"{begin} {SECOND} (1 of 2 after {THIRD}).") in report(folder).splitlines()
    changed(folder, 3, SECOND, cut=0)
    assert begin not in report(folder)


def test_the_floor_stands_in_front_of_the_matrix_with_its_op(tmp_path):
    folder = make(tmp_path / "run")
    write_jsonl(folder.path / "floor.jsonl", floors([40.0, 10.0, 31.0]))
    found = summarised(folder)
    assert found["floor"] == {"scores": [40.0, 10.0, 31.0], "op": 27.0}
    lines = report(folder).splitlines()
    place = lines.index(f"| {NAME} | 40.0 | 10.0 | 31.0 |")
    assert lines[place + 1].startswith("| base |")
    assert [line for line in lines if line.startswith("| op of the floor | 27.00 |")]
    source = written([folder], tmp_path / "x.html")
    texts = Page(source).texts
    assert NAME in texts and texts.index(NAME) < texts.index("before training")
    assert {"40.0", "39–41", "op of the floor", "27.00"} <= set(texts)
    assert "60% of the training answers" in source


def test_a_floor_that_is_not_whole_has_no_op(tmp_path):
    folder = make(tmp_path / "run")
    write_jsonl(folder.path / "floor.jsonl", floors([40.0, 10.0]))
    assert summarised(folder)["floor"] == {"scores": [40.0, 10.0, None], "op": None}
    text = report(folder)
    assert f"| {NAME} | 40.0 | 10.0 |  |" in text and "op of the floor" not in text
    assert answers.floor(TASKS, folder.floor, 2) == {"scores": [40.0, 10.0, None], "op": 25.0}  # as far as OP


def test_the_summary_is_json_and_names_them(tmp_path):
    folder = make(tmp_path / "run")
    changed(folder, 1, FIRST, commonest=1.0)
    told = {"task": FIRST, "after": FIRST, "of": 2, "alike": 1.0, "empty": 0, "cut": 0}
    assert json.loads(json.dumps(summarised(folder)))["answers"] == [told]


def test_runs_of_an_arm_are_counted_together():
    alike = {"task": "A", "after": "A", "of": 50, "alike": 1.0, "empty": 3, "cut": 24}
    last = alike | {"after": "B", "empty": 0, "cut": 25}
    other = {"task": "B", "after": "B", "of": 50, "alike": None, "empty": 7, "cut": 0}
    found = answers.tallied([[alike, last], [other], []])
    assert found == {
        "runs": 3,
        "alike": {"A": 1},
        "empty": {"A": [3, 50], "B": [7, 50]},
        "cut": {"A": [25, 50]},
    }
    alone = answers.tallied([[last]])
    assert answers.compared({"x": found, "y": alone, "z": answers.tallied([[]])}) == [
        "One and the same answer to at least 90% of a task's prompts, just after the task or at the end: "
        "x: A (1 of 3 runs); y: A.",
        "Empty answers, just after the task or at the end: x: A (3 of 50), B (7 of 50).",
        "Answers cut at eval.max_new_tokens, before they ended, just after the task or at the end: "
        "x: A (25 of 50); y: A (25 of 50).",
    ]


def test_the_page_of_several_runs_tells_floor_and_answers(tmp_path):
    one, other = make(tmp_path / "one"), make(tmp_path / "other", method={"name": "seqlora", "rank": 4})
    alone = Page(written([one, other], tmp_path / "x.html")).texts
    assert not any(NAME in text or "One and the same" in text for text in alone)
    changed(other, 3, SECOND, commonest=1.0)
    for folder in (one, other):
        write_jsonl(folder.path / "floor.jsonl", floors([40.0, 10.0, 31.0]))
    texts = Page(written([one, other], tmp_path / "x.html")).texts
    assert f"OP of the {NAME}: 27.0." in texts
    assert any(text.endswith(f"just after the task or at the end: 2 seqlora: {SECOND}.") for text in texts)
    write_jsonl(other.path / "floor.jsonl", floors([40.0, 10.0, 1.0]))
    texts = Page(written([one, other], tmp_path / "x.html")).texts
    assert {f"OP of the {NAME}, of 1 codyra: 27.0.", f"OP of the {NAME}, of 2 seqlora: 17.0."} <= set(texts)


@pytest.mark.parametrize("empty, told", [(0, False), (9, False), (10, True)])
def test_a_few_empty_answers_are_not_told(empty, told):
    row = {"task": "A", "after": "B", "of": 200, "alike": None, "empty": empty, "cut": 0}
    assert bool(answers.sentences([row])) == told and ("A" in answers.tallied([[row]])["empty"]) == told

"""A sample of the points at which `tests/crash_points.py` ends a run, and of the files that `tests/damage.py`
damages."""

import random
import re
from collections import Counter

import pytest
from crash_points import Points, Series
from damage import FINE, Damaged
from file_operations import MODES, content
from helpers import tiny_recipe

from codyra_llm.core.files import read_jsonl


@pytest.fixture(scope="module")
def points(tiny_llama, toy_stream, tmp_path_factory):
    out = tmp_path_factory.mktemp("points")
    recipe = tiny_recipe(
        tiny_llama, toy_stream, out, data__max_train_examples=8, eval__max_examples=2, save__minutes=1e-9
    )
    return Points(recipe, out)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_ends_at_a_file_operation_ends_as_if_it_had_not(points, mode):
    count = len(points.operations)
    assert count > 200
    for at in [1, *random.Random(mode).sample(range(2, count + 1), 4)]:
        assert points.check(mode, at) is None


def test_a_run_that_ends_twice(points):
    for at in random.Random("twice").sample(range(40, len(points.operations) + 1), 3):
        assert points.check("exit", at, at // 3) is None
        assert points.check("power", at, at // 3) is None


def test_a_loss_of_power_while_the_log_is_closed(points):
    """Its lines are not synced as they are added. The hash that was noted for it was that of all of them."""
    last = max(at for at, name in enumerate(points.operations, 1) if name.startswith("replace .log.jsonl"))
    assert points.check("power", last) is None


def test_what_is_noted_of_a_run_that_goes_on_is_what_one_leaves_that_ends(points):
    """Names and sizes; bytes differ by the seconds that a step took."""
    chosen = random.Random("noted").sample(range(40, len(points.operations) + 1), 3)
    code, captures = points.captured("noted", lambda at: list(MODES) if at in chosen else [])
    assert code == 0 and points.wrong("noted", code) is None
    for mode, at in [(mode, at) for mode in MODES for at in chosen]:
        ended = points.run("ended", mode, at)
        found = content(points.out / "ended")
        points.forget("ended")
        if (mode, at) not in captures.states:
            continue  # within a removal
        assert ended == captures.codes[mode, at]
        assert sizes(found) == sizes(captures.content(mode, at)), (mode, points.operations[at - 1])


def sizes(found: dict) -> dict:
    """By name without the process's id, None of a folder, and of a file the number of lines or bytes."""
    measured = {}
    for path, data in found.items():
        lines = data is not None and path.suffix != ".safetensors"
        size = data.count(b"\n") if lines else data and len(data)
        measured[re.sub(r"\.\d+(?=/|$)", "", str(path))] = size
    return measured


def test_all_points_by_the_script(points, tmp_path):
    for twice in (False, True):
        series = Series(points, tmp_path / "points.jsonl", list(MODES), len(points.operations) // 3, twice)
        series.go()
        assert len(series.rows) >= 4 * len(MODES)
        assert not [row for row in series.rows.values() if row["wrong"]]
    assert len(read_jsonl(tmp_path / "points.jsonl")) == len(series.rows)
    again = Series(points, tmp_path / "points.jsonl", list(MODES), len(points.operations) // 3, True)
    assert not any(again.left.values())


def test_damage_to_any_file_changes_no_result_without_a_word(tiny_llama, toy_stream, tmp_path):
    recipe = tiny_recipe(
        tiny_llama, toy_stream, tmp_path, data__max_train_examples=8, eval__max_examples=2, save__minutes=1e-9
    )
    damaged = Damaged(recipe, tmp_path)
    cases = list(damaged.cases())
    assert len(cases) > 80
    found = Counter()
    for case in random.Random(0).sample(cases, 12):
        found += damaged.check(*case)
    assert found.keys() <= set(FINE), found

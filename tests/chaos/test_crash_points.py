"""A sample of the points at which `tests/crash_points.py` ends a run, and of the files that `tests/damage.py`
damages."""

import random
from collections import Counter

import pytest
from crash_points import MODES, Points
from damage import FINE, Damaged
from helpers import tiny_recipe


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

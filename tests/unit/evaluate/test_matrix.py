"""The score matrix against numbers worked out by hand, and the bootstrap against its closed form."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from codyra_llm.evaluate.matrix import FORMULAS, summary
from codyra_llm.evaluate.statistics import summarise, summarise_all

TASKS = ["a", "b", "c"]
# Task a falls 60 -> 40 with its best, 70, in between; task b gains 50 -> 56, so clipping matters.
SCORES = [[60.0, 30.0, None], [70.0, 50.0, 25.0], [40.0, 56.0, 90.0]]
ZERO_SHOT = [10.0, 20.0, 30.0]
BY_HAND = {
    "op": (40 + 56 + 90) / 3,  # 62
    "bwt": ((40 - 60) + (56 - 50)) / 2,  # -7
    "bwt_treelora": ((60 - 40) + (50 - 56)) / 3,  # 4.667
    "bwt_treelora_clipped": (20 + 0) / 3,  # 6.667
    "forgetting": ((70 - 40) + (50 - 56)) / 2,  # 12
    "fwt": ((30 - 20) + (25 - 30)) / 2,  # 2.5
}


def test_every_number_is_the_one_worked_out_by_hand():
    result = summary(TASKS, SCORES, ZERO_SHOT)
    assert {name: result[name] for name in FORMULAS} == pytest.approx(BY_HAND)
    assert list(FORMULAS) == list(BY_HAND)
    assert result["tasks"] == TASKS and result["matrix"] == SCORES and result["zero_shot"] == ZERO_SHOT
    assert json.loads(json.dumps(result)) == result


def test_a_score_before_the_task_was_learnt_is_no_forgetting():
    early = [[60.0, 99.0, None], *SCORES[1:]]
    assert summary(TASKS, early, None)["forgetting"] == pytest.approx(12)


def test_one_task_has_performance_but_no_transfer():
    result = summary(["a"], [[80.0]], [10.0])
    assert result["op"] == 80.0
    assert [result[name] for name in FORMULAS if name != "op"] == [None] * 5


def test_nothing_trained_leaves_every_number_undefined():
    assert [summary(TASKS, [], ZERO_SHOT)[name] for name in FORMULAS] == [None] * 6


def test_an_unfinished_stream_is_summarised_as_far_as_it_got():
    result = summary(TASKS, [[60.0, None, None], [70.0, 50.0, None]], None)
    assert (result["op"], result["bwt"], result["fwt"]) == (60.0, 10.0, None)
    assert (result["bwt_treelora"], result["bwt_treelora_clipped"], result["forgetting"]) == (
        -5.0,
        0.0,
        -10.0,
    )


def test_a_missing_score_makes_what_needs_it_undefined_and_nothing_else():
    scores = [[None, None, None], [70.0, 50.0, None], [40.0, 56.0, 90.0]]
    result = summary(TASKS, scores, ZERO_SHOT)
    assert result["op"] == pytest.approx(62)
    assert [result[name] for name in FORMULAS if name != "op"] == [None] * 5


def test_with_the_diagonal_and_the_last_row_alone_the_best_score_is_not_known():
    scores = [[60.0, None, None], [None, 50.0, None], [40.0, 56.0, 90.0]]
    result = summary(TASKS, scores, None)
    assert result["forgetting"] is None  # the first task's score after the second might be the best
    assert (result["op"], result["bwt"]) == (pytest.approx(62), -7.0)


def test_forward_transfer_takes_the_tasks_that_are_measured():
    scores = [[60.0, 30.0, None], [70.0, 50.0, None], [40.0, 56.0, 90.0]]
    assert summary(TASKS, scores, ZERO_SHOT)["fwt"] == 10.0


@given(
    st.integers(2, 6).flatmap(
        lambda t: st.lists(st.lists(st.floats(0, 100), min_size=t, max_size=t), min_size=t, max_size=t)
    )
)
def test_the_definitions_agree_where_they_must(scores):
    t = len(scores)
    r = summary([str(i) for i in range(t)], scores, None)
    assert r["bwt_treelora"] == pytest.approx(-r["bwt"] * (t - 1) / t, abs=1e-9)
    assert r["bwt_treelora_clipped"] >= max(r["bwt_treelora"], 0) - 1e-9
    assert r["forgetting"] >= -r["bwt"] - 1e-9
    array = np.array(scores)
    assert r["bwt"] == pytest.approx((array[-1] - np.diag(array))[:-1].mean(), abs=1e-9)


def test_the_interval_has_the_width_that_theory_gives():
    scores = [100.0] * 300 + [0.0] * 700
    result = summarise(scores, resamples=4000)
    error = 100 * (0.3 * 0.7 / 1000) ** 0.5
    assert result["mean"] == 30.0 and result["n"] == 1000
    assert result["low"] == pytest.approx(30 - 1.96 * error, abs=0.25)
    assert result["high"] == pytest.approx(30 + 1.96 * error, abs=0.25)


def test_the_interval_is_the_same_each_time_and_follows_the_seed():
    scores = list(np.random.default_rng(3).uniform(0, 100, 40))
    assert summarise(scores) == summarise(scores)
    assert summarise(scores, seed=1)["low"] != summarise(scores)["low"]


def test_the_interval_of_constant_and_of_no_scores():
    assert summarise([50.0] * 7) == {"mean": 50.0, "low": 50.0, "high": 50.0, "n": 7}
    assert summarise([]) == {"mean": None, "low": None, "high": None, "n": 0}
    assert summarise([50.0]) == {"mean": 50.0, "low": None, "high": None, "n": 1}  # not "50 to 50"


@pytest.mark.parametrize("n", [2, 7, 129, 1001])
def test_bootstrap_sets_are_those_of_one_draw_of_all(n):
    """Drawn some at a time, so that memory does not grow with them, and the same to the last bit."""
    scores, other = np.random.default_rng(n).normal(size=(2, n))
    drawn = np.random.default_rng(0).integers(n, size=(1000, n))
    found = summarise_all({"a": list(scores), "b": list(other)})
    for name, values in (("a", scores), ("b", other)):
        low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
        assert found[name] == {"mean": values.mean(), "low": low, "high": high, "n": n}
        assert summarise(list(values)) == found[name]


def test_the_interval_is_that_of_scipy():
    """Which needs two values at least, and takes seconds to import in every process that scores."""
    scores = np.random.default_rng(5).uniform(0, 100, 60)
    expected = bootstrap(
        (scores,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found = summarise(list(scores))
    width = expected.high - expected.low  # the draws may be others than ours in another version of scipy
    assert found["low"] == pytest.approx(expected.low, abs=0.1 * width)
    assert found["high"] == pytest.approx(expected.high, abs=0.1 * width)

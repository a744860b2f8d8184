"""The warm-up of the learning rate, in closed form, and as a run logs it."""

import math

import pytest
from helpers import tiny_recipe
from hypothesis import given
from hypothesis import strategies as st

from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.proximal import lr_factor, rate_factor, warmup_steps


def test_steps_and_shares():
    assert [warmup_steps(w, 10) for w in (0.0, 0.1, 0.11, 0.5, 1.0, 3.0)] == [0, 1, 2, 5, 1, 3]


def test_closed_form():
    """W = 4 of 12 steps: fifths up to 4/5, then the schedule from its beginning over the other 8."""
    rates = [rate_factor("cosine", t, 12, 4.0) for t in range(12)]
    assert rates[:4] == [0.2, 0.4, 0.6, 0.8]
    assert rates[4:] == [0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    assert [rate_factor("constant", t, 6, 0.5) for t in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@given(st.integers(1, 200), st.floats(0, 0.9), st.sampled_from(["constant", "cosine"]))
def test_it_rises_to_the_schedule_and_is_never_0(steps, share, schedule):
    rates = [rate_factor(schedule, t, steps, share) for t in range(steps)]
    first = warmup_steps(share, steps)
    assert all(0 < rate <= 1 for rate in rates)
    rising = rates[: first + 1]
    assert rising == sorted(rising)
    assert first == steps or rates[first] == 1


@given(st.integers(1, 100))
def test_without_it_the_schedule_is_as_it_was(steps):
    for schedule in ("constant", "cosine"):
        assert [rate_factor(schedule, t, steps, 0.0) for t in range(steps)] == [
            lr_factor(schedule, t, steps) for t in range(steps)
        ]


@given(st.integers(1, 200), st.floats(0, 0.9))
def test_after_it_the_rate_is_never_below_the_schedule_that_thresholds_follow(steps, share):
    """So no shrink of codyra's budget comes when the learning rate is gone already."""
    for t in range(warmup_steps(share, steps), steps):
        assert rate_factor("cosine", t, steps, share) >= lr_factor("cosine", t, steps) - 1e-12


def test_mistakes_are_told_before_weights_load(tiny_llama, toy_stream, tmp_path):
    with pytest.raises(Fault, match="optim.warmup: 1.5 is neither a number of steps nor a share"):
        load_recipe("quickstart", ["optim.warmup=1.5"])
    with pytest.raises(Fault, match="optim.warmup: -1.* is not valid"):
        load_recipe("quickstart", ["optim.warmup=-1"])
    asked = tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", optim__warmup=6)  # 20 examples, 2 epochs
    with pytest.raises(
        Fault, match="optim.warmup: 6 leaves none of the 6 steps of ONE to the schedule"
    ) as found:
        prepare(asked)
    assert len(found.value.messages) == 2  # of TWO as well
    prepare(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", optim__warmup=5))

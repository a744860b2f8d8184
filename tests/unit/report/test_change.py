"""ΔR of one run with its interval over test examples, against the normal approximation and numpy's draws."""

import numpy as np
import pytest
from made_runs import make, written
from scipy.stats import norm

from codyra_llm.core.files import write_jsonl
from codyra_llm.evaluate.statistics import DRAWN, RESAMPLES, interval, resampled
from codyra_llm.report.summary import summarised
from codyra_llm.report.text import render

COUNT = 400


def probed(path, before: list[float], after: list[float]):
    """A run whose probe has these scores before and after; its rows are those of `make`, from 90 to 85."""
    folder = make(path)
    for stage, values in (("00-base", before), (f"03-{folder.recipe.tasks[2]}", after)):
        rows = [{"exact_match": value} for value in values]
        write_jsonl(path / "predictions" / stage / "probe.jsonl", rows)
    return folder


def test_the_change_is_paired_and_said_wherever_it_is_shown(tmp_path):
    """A twentieth of the questions is lost and none is won, so that the two ends differ far less than two
    samples of as many questions would."""
    before = [100.0] * 360 + [0.0] * 40
    after = [0.0] * 20 + before[20:]
    folder = probed(tmp_path / "run", before, after)
    found = summarised(folder)["delta_r"]
    half = norm.ppf(0.975) * np.std(np.subtract(after, before)) / COUNT**0.5
    assert (found["value"], found["members"]) == (-5.0, ["probe"])
    assert (found["low"], found["high"]) == pytest.approx((-5 - half, -5 + half), abs=0.4)
    said = f"ΔR -5.00 (95 % interval over test examples: {found['low']:+.2f} to {found['high']:+.2f})"
    text = render(folder.recipe, summarised(folder), folder.updates)
    page = written([folder], tmp_path / "x.html")
    for report in (text, page):
        assert f"{said}, mean change over probe." in report


@pytest.mark.parametrize("before, after", [([], []), ([100.0], [0.0]), ([100.0] * 3, [0.0] * 2)])
def test_without_pairs_there_is_no_interval(tmp_path, before, after):
    """Where predictions are gone, where the ends have other questions, and for a single one."""
    folder = probed(tmp_path / "run", before, after)
    found = summarised(folder)["delta_r"]
    assert found == {"value": -5.0, "members": ["probe"], "low": None, "high": None}
    assert "ΔR -5.00, mean change over probe." in render(folder.recipe, summarised(folder), folder.updates)


def test_draws_depend_on_the_name_and_the_number_alone():
    """In portions as all at once; a single example shows no spread."""
    scores = np.random.default_rng(0).integers(0, 2, COUNT) * 100.0
    assert DRAWN // COUNT < RESAMPLES  # so these are portions
    places = np.random.default_rng(list(b"piqa")).integers(COUNT, size=(RESAMPLES, COUNT))
    np.testing.assert_array_equal(resampled("piqa", scores), scores[places].mean(axis=1))
    assert not np.array_equal(resampled("boolq", scores), resampled("piqa", scores))
    assert interval([50.0], resampled("piqa", [50.0])) == {
        "mean": 50.0,
        "low": None,
        "high": None,
        "over": None,
    }

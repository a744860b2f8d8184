"""The report: what the page holds, that foreign text stays text, that it loads nothing, and what several runs
say together.
"""

import pytest
from made_runs import CHROMIUM, frame_widths, make, written


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two groups, codyra and seqlora, of three seeds each, given in turn; a third of one seed."""
    root = tmp_path_factory.mktemp("runs")
    lifts = {"codyra": (0.0, 1.0, 3.5), "seqlora": (-2.0, -0.5, 1.0)}
    grid = [
        make(
            root / f"{name}-{seed}",
            lift=lifts[name][seed],
            lose=7.0 * (name == "seqlora"),
            seed=seed,
            method={"name": name, "rank": 4},
        )
        for seed in range(3)
        for name in lifts
    ]
    return [*grid, make(root / "rank-8", method={"name": "codyra", "rank": 8}, seed=0)]


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")
def test_the_body_never_scrolls_sideways(one, many, tmp_path):
    widths = frame_widths([written(folders, tmp_path / "x.html") for folders in ([one], many)], tmp_path)
    assert all(0.9 * given < found <= given for found, given in zip(widths, (420, 1280) * 2, strict=True)), (
        widths
    )


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")
def test_the_page_does_not_scroll_sideways(tmp_path):
    pages = [written([make(tmp_path / "run")], tmp_path / "x.html", paper=True)]
    assert all(
        0.9 * given < found <= given
        for found, given in zip(frame_widths(pages, tmp_path), (420, 1280), strict=True)
    )

"""Figures: what is drawn in closed form, and files that are whole and equal each time."""

import re

import pytest
from helpers import main_ends
from made_runs import MATRIX, make

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import write_jsonl
from codyra_llm.report import figures
from codyra_llm.report.groups import Member
from codyra_llm.report.html.many_runs import opened

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two methods, two seeds each, one with names that TeX would read."""
    root = tmp_path_factory.mktemp("runs")
    lifts = {"codyra": 0.0, "seqlora": -4.0}
    return [
        make(
            root / f"{name}-{seed}",
            lift=lift + 2 * seed,
            lose=3.0,
            seed=seed,
            method={"name": name, "rank": 4},
        )
        for name, lift in lifts.items()
        for seed in range(2)
    ]


@pytest.mark.parametrize("kind", figures.FIGURES)
@pytest.mark.parametrize("suffix", figures.SUFFIXES)
def test_every_figure_in_every_format(runs, tmp_path, kind, suffix):
    out = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in out:
        words = ["report", *(str(run.path) for run in runs), "--out", str(path), "--figure", kind]
        assert main_ends(words) == 0
    first, second = (path.read_bytes() for path in out)
    begin = {".pdf": b"%PDF-", ".svg": b"<?xml", ".png": b"\x89PNG"}[suffix]
    assert first == second and first.startswith(begin) and len(first) > 3000


def test_names_are_text(runs, tmp_path):
    """Nothing in a name is TeX or markup."""
    out = tmp_path / "x.svg"
    assert main_ends(["report", str(runs[0].path), "--out", str(out)]) == 0  # the matrix, of one run
    text = out.read_text(encoding="utf-8")
    assert "A&lt;script&gt;alert(1)&lt;x&gt;" in text and "<script" not in text
    shown = set(re.findall(r">(\d+)</text>", text))
    assert {"80", "66", "71", "52", "50", "61"} <= shown


def test_what_is_drawn(runs):
    """Means over two seeds, which lift all scores by 0 and 2, and take 3 off the first task's last score."""
    one = opened([Member(run) for run in runs[:2]])
    rows = figures.means(one)
    expected = [[v if v is None else v + 1 for v in row] for row in MATRIX]
    expected[2][0] -= 3
    assert rows == [[v if v is None else pytest.approx(v) for v in row] for row in expected]
    lifted = [80, (65.5 + 71.25) / 2, (55 - 3 + 50 + 61) / 3]
    assert figures.along(one[0]) == pytest.approx(lifted)
    # Ranks kept of 4: (task + layer) mod 5 of three tasks.
    assert figures.kept(one) == {"up_proj": {0: pytest.approx(3 / 12), 1: pytest.approx(6 / 12)}}


def test_marks_of_many_groups_stay_at_their_task(runs):
    """Of forty groups the last one's mark after a task is still nearer to it than to the next task."""
    one = opened([Member(runs[0])])
    drawn = figures.stream([figures.Series(f"group {number}", one) for number in range(40)])
    lines = [bar.lines[0] for bar in drawn.axes[0].containers]
    places = [list(line.get_xdata()) for line in lines]
    assert len(places) == 40 and places[0] == [1, 2, 3]
    assert all(0 <= place - step < 0.5 for row in places for step, place in enumerate(row, 1))
    few = figures.stream([figures.Series(f"group {number}", one) for number in range(2)])
    assert list(few.axes[0].containers[1].lines[0].get_xdata()) == [1.04, 2.04, 3.04]


def test_points_of_the_tradeoff_are_the_measures(runs):
    import matplotlib

    series = [figures.Series("a", opened([Member(run) for run in runs[:2]]))]
    with matplotlib.rc_context(figures.STYLE):
        (axes,) = figures.tradeoff(series).axes
    (x,), (y,) = axes.lines[0].get_data()
    learnt = [(80 + 71.25 + 61) / 3 + lift for lift in (0, 2)]
    forgotten = ((80 - 52) + (71.25 - 50)) / 2  # a lift changes none
    assert x == pytest.approx(sum(learnt) / 2) and y == pytest.approx(forgotten)


def test_looks_differ():
    looks = [tuple(map(str, figures._look(i).values())) for i in range(70)]
    assert len(set(looks)) == 70
    grey = [look[1:3] for look in looks[:10]]  # mark and line
    assert len(set(grey)) == 10


def test_mistakes_are_one_sentence(runs, tmp_path, capsys, monkeypatch):
    path = str(runs[0].path)
    for words, message in (
        (["--out", "x.pdf", "--figure", "matrx"], "'matrx' is not a figure; choose matrix, tradeoff"),
        (["--out", "x.md", "--figure", "matrix"], "must end in .pdf, .svg, .png"),
    ):
        assert main_ends(["report", path, *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    assert main_ends(["report", path, "--out", "x.pdf"]) == 2
    assert "install codyra-llm[figures]" in capsys.readouterr().err


def test_nothing_to_draw_is_a_fault(tmp_path):
    folder = make(tmp_path / "run")
    write_jsonl(folder.path / "updates.jsonl", [])
    write_jsonl(folder.path / "scores.jsonl", [])
    for kind in figures.FIGURES:
        with pytest.raises(Fault, match=f"--figure {kind}: no "):
            figures.write(opened([Member(folder)]), tmp_path / "x.pdf", kind, False)
    assert not (tmp_path / "x.pdf").exists()

"""A sweep's folder reported as papers do: pooled over seeds and orders, differences, LaTeX."""

import csv
import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers import main_ends
from made_runs import TASKS, make
from scipy.stats import t

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import write_json
from codyra_llm.report.grid import Cell, Grid
from codyra_llm.report.groups import collected
from codyra_llm.report.html.many_runs import content
from codyra_llm.report.latex import escaped, latex

OP = (55 + 50 + 61) / 3
LIFTS = {"a_base": (0.0, 1.0, 2.5, 4.0), "b%plus": (3.0, 3.5, 6.0, 9.0)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two arms, two seeds, two orders; a try, a run that is not finished; the second arm is the baseline."""
    root = tmp_path_factory.mktemp("sweep")
    orders = (TASKS, TASKS[::-1])
    points = [(seed, order) for seed in (1, 2) for order in (0, 1)]
    for arm, lifts in LIFTS.items():
        for (seed, order), lift in zip(points, lifts, strict=True):
            path = root / arm / f"seed={seed},data.tasks=#{order + 1}"
            tasks = orders[order]
            make(path, lift=lift, seed=seed, data__tasks=tasks)
            write_json(path / "summary.json", {"tasks": tasks})
    make(root / "a_base" / "try=1", lift=50)
    make(root / "a_base" / "seed=3,data.tasks=#1", lift=50)
    write_json(root / "sweep.json", {"baseline": "b%plus", "runs": [{"arm": "a_base"}, {"arm": "b%plus"}]})
    return root


def table(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_is_its_finished_runs_the_baselines_first(sweep, tmp_path):
    found = collected([sweep])
    assert [member.arm for member in found] == ["b%plus"] * 4 + ["a_base"] * 4
    assert {member.rest for member in found} == {""}
    (tmp_path / "x" / "seed=1").mkdir(parents=True)
    (tmp_path / "x" / "seed=1" / "recipe.json").write_text(
        (sweep / "a_base" / "try=1" / "recipe.json").read_text()
    )
    with pytest.raises(Fault, match="no run of this sweep is finished"):
        collected([tmp_path])


def test_a_run_with_a_checkpoint_is_no_sweep(sweep, tmp_path):
    """A method that doesn't merge leaves its stage there, which has a recipe too."""
    run = tmp_path / "runs" / "x"
    (run / "checkpoint").mkdir(parents=True)
    for folder in (run, run / "checkpoint"):
        (folder / "recipe.json").write_text((sweep / "a_base" / "try=1" / "recipe.json").read_text())
    assert [member.arm for member in collected([run])] == [""]
    assert main_ends(["report", str(tmp_path / "runs")]) == 2


def test_pooled_over_seeds_and_orders(sweep, tmp_path):
    """Student's interval over the four runs of an arm, and over their differences pair by pair."""
    assert main_ends(["report", str(sweep), "--out", str(tmp_path / "x.csv")]) == 0
    rows = table(tmp_path / "x.csv")
    board = {row["row"]: row for row in rows if (row["table"], row["column"]) == ("leaderboard", "OP")}
    assert board.keys() == {"1 b%plus", "2 a_base"}
    (paired,) = [row for row in rows if (row["table"], row["column"]) == ("paired differences", "OP")]
    differences = np.array(LIFTS["a_base"]) - np.array(LIFTS["b%plus"])
    for row, values in (
        (board["2 a_base"], OP + np.array(LIFTS["a_base"])),
        (board["1 b%plus"], OP + np.array(LIFTS["b%plus"])),
        (paired, differences),
    ):
        half = t.ppf(0.975, 3) * values.std(ddof=1) / 2
        assert float(row["value"]) == pytest.approx(values.mean())
        assert float(row["high"]) - float(row["value"]) == pytest.approx(half)
    assert paired["row"] == "2 a_base"
    assert [row["value"] for row in rows if row["column"] == "pairs"] == ["4"]
    first = board["2 a_base"]
    assert (first["method"], first["seed"]) == ("codyra", "1 2")
    assert first["order"] == " ".join((",".join(TASKS), ",".join(TASKS[::-1])))
    single = [row for row in rows if (row["table"], row["column"]) == ("runs", "OP")]
    assert {(row["seed"], row["order"]) for row in single} == {
        (seed, ",".join(order)) for seed in "12" for order in (TASKS, TASKS[::-1])
    }


def test_orders_apart(sweep, tmp_path):
    words = ["report", str(sweep), "--no-pool-orders", "--out", str(tmp_path / "x.csv")]
    assert main_ends(words) == 0
    rows = table(tmp_path / "x.csv")
    paired = [row for row in rows if (row["table"], row["column"]) == ("paired differences", "OP")]
    expected = np.array(LIFTS["a_base"]) - np.array(LIFTS["b%plus"])
    assert [float(row["value"]) for row in paired] == pytest.approx(
        [expected[[0, 2]].mean(), expected[[1, 3]].mean()]
    )


def test_an_arm_whose_baseline_is_not_finished_at_its_point_has_no_difference(tmp_path):
    """And a difference is named after the arm, which is not at the same point for every row."""
    points = {"base": ["optim.lr=0.1"], "other": ["optim.lr=0.1", "optim.lr=0.2"]}
    for arm, names in points.items():
        for name in names:
            make(tmp_path / "s" / arm / name, optim__lr=float(name.partition("=")[2]))
            write_json(tmp_path / "s" / arm / name / "summary.json", {"tasks": TASKS})
    write_json(tmp_path / "s" / "sweep.json", {"baseline": "base", "runs": []})
    found = content(collected([tmp_path / "s"]), over_orders=True)["differences"]
    assert [label for label, _ in found.rows] == ["2 other optim.lr=0.1"]
    assert found.corner == "less base"


def test_a_run_says_its_method_seed_and_order_in_every_line(sweep, tmp_path):
    run = sweep / "a_base" / "seed=2,data.tasks=#1"
    assert main_ends(["report", str(run), "--out", str(tmp_path / "x.csv")]) == 0
    told = {(row["method"], row["seed"], row["order"]) for row in table(tmp_path / "x.csv")}
    assert told == {("codyra", "2", ",".join(TASKS))}


def test_latex_of_a_sweep(sweep, tmp_path):
    assert main_ends(["report", str(sweep), "--out", str(tmp_path / "x.tex")]) == 0
    text = (tmp_path / "x.tex").read_text(encoding="utf-8")
    high, low = (np.mean(LIFTS[arm]) + OP for arm in ("b%plus", "a_base"))
    assert re.search(rf"^b\\%plus & .*\$\\mathbf{{{high:.1f}}} \\pm ", text, re.M)
    assert re.search(rf"^a\\_base & .*\$\\underline{{{low:.1f}}} \\pm ", text, re.M)
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{tabular}")
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    assert "<script" not in text and r"A\textless{}script\textgreater{}" in text
    assert_balanced(text)
    assert text.count(r"$\pm$ is half the 95 \% interval over runs") == 3
    for part in text.split(r"\begin{tabular}")[1:]:  # as many cells in every line as the head has
        lines = [line for line in part.splitlines() if line.endswith(r"\\")]
        assert len({len(re.split(r"(?<!\\)&", line)) for line in lines}) == 1


def assert_balanced(text: str) -> None:
    depth = 0
    for sign in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0


def test_best_is_bold_and_second_underlined_by_the_shown_value():
    """Equal values share a place; in a column where less is better the least is best."""
    rows = [
        ("a", [Cell(10.04, "10.0"), Cell(1.0, "1.0 ± 0.2"), Cell(5, "5")]),
        ("b", [Cell(9.96, "10.0"), Cell(3.0, "3.0 ± 0.1"), Cell(7, "7")]),
        ("c", [Cell(2.0, "2.0"), Cell(2.0, "2.0"), None]),
        ("d", [Cell(-1.0, "-1.0"), None, Cell(1234, "1,234", marked=True)]),
    ]
    text = latex([Grid("scores", "", ["up", "down", "neither"], rows, "", {"up": 1, "down": -1})])
    lines = [line for line in text.splitlines() if line[:2] in ("a ", "b ", "c ", "d ")]
    assert lines == [
        r"a & $\mathbf{10.0}$ & $\mathbf{1.0} \pm 0.2$ & $5$ \\",
        r"b & $\mathbf{10.0}$ & $3.0 \pm 0.1$ & $7$ \\",
        r"c & $\underline{2.0}$ & $\underline{2.0}$ & -- \\",
        r"d & $-1.0$ & -- & $1{,}234^{*}$ \\",
    ]


def test_no_name_is_a_command():
    evil = '\\input{/etc/passwd} $x$ 50% a_b #1 & {~^}\nnext | <b> "q"'
    text = escaped(evil)
    assert_balanced(text)
    assert "\n" not in text
    assert not re.search(r"(?<!\\)[%$#_&]", text)
    assert re.findall(r"\\[a-z]+", text) == [
        r"\textbackslash",
        r"\textasciitilde",
        r"\textasciicircum",
        r"\textbar",
        r"\textless",
        r"\textgreater",
        r"\char",
        r"\char",
    ]


def test_a_wide_table_goes_on_below_and_long_heads_are_stacked():
    heads = [f"a long [name] {i}" for i in range(14)]
    rows = [(arm, [Cell(i, f"{i}0.0 ± 10.0") for i in range(14)]) for arm in ("one", "two")]
    text = latex([Grid("scores", "arm", heads, rows)])
    parts = [re.findall(r"^one & .*", part, re.M) for part in text.split(r"\toprule")[1:]]
    assert [len(lines) for lines in parts] == [1, 1, 1, 1]
    assert sum(lines[0].count("&") for lines in parts) == 14
    numbers = re.findall(r"\$(\d+)0\.0 ", "".join(lines[0] for lines in parts))
    assert [*map(int, numbers)] == list(range(14))
    assert text.count(r"\shortstack[r]{a\\long\\{[}name]\\3}") == 1


def test_equal_values_are_not_compared():
    rows = [(name, [Cell(1.0, "1.0")]) for name in "ab"]
    assert "mathbf" not in latex([Grid("scores", "", ["up"], rows, "", {"up": 1})])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("[x]", "{[}x]"),  # after \\ it would be a length, and pdfTeX waits for its end without end
        ("*x", "{*}x"),  # \\* is a command
        ("--lr---", "-{}-lr-{}-{}-"),  # and no dashes
        ("?`''", "?\\textasciigrave{}'{}'"),
        ("λ = 0.1, Ωπ", r"$\lambda$ = 0.1, $\Omega$$\pi$"),
        ("a\0b\x1b", "a?b?"),
        ("naïve", "naïve"),
    ],
)
def test_names_are_typeset_as_they_are_written(name, expected):
    assert escaped(name) == expected


NAMES = [
    "a_b%c&d#e~f^g\\h$i{j}",
    "[x]",
    "*x",
    "--lr",
    "?`''",
    "λ=0.1 ≤ ∞",
    '"q"',
    "<b> | naïve ‖ΔW‖",
    "\\input{t}",
]


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
@pytest.mark.parametrize("encoding", ["OT1", "T1"])
def test_pdflatex_typesets_it(tmp_path, encoding):
    heads = ["up", *(f"a measure {i}" for i in range(8)), *NAMES]
    rows = []
    for i, name in enumerate(NAMES):
        rows.append((name, [Cell(i, f"{10 + i}.0 ± 10.2") for _ in range(9)] + [Cell(n, n) for n in NAMES]))
    grids = [Grid(f"scores, {name}", name, heads, rows, name, {"up": 1}) for name in NAMES]
    (tmp_path / "t.tex").write_text(latex(grids), encoding="utf-8")
    lines = [
        r"\documentclass{article}",
        r"\usepackage{booktabs,lmodern}",
        rf"\usepackage[{encoding}]{{fontenc}}",
    ]
    lines += [r"\begin{document}", r"\input{t}", r"\end{document}"]
    (tmp_path / "d.tex").write_text("\n".join(lines))
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "d.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (
        not re.search("^!|Missing character", done.stdout, re.M)
        and (tmp_path / "d.pdf").stat().st_size > 1000
    )

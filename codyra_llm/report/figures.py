"""Figures for a paper as PDF, SVG or PNG: as wide as a column, with text of 8 pt. Series differ by marker and
line as well as by colour, so that they can be read in grey. Equal runs give equal bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import replacing
from codyra_llm.core.terminal import one_line
from codyra_llm.evaluate.statistics import interval
from codyra_llm.report.groups import Run, grouped, names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = ("matrix", "tradeoff", "stream", "ranks")
SUFFIXES = (".pdf", ".svg", ".png")
COLUMN = 3.3  # inches, of a two-column paper
COLOURS = ("#000000", "#0072b2", "#d55e00", "#56b4e9", "#009e73", "#e69f00", "#cc79a7")  # Okabe and Ito's
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
# Between the marks of two groups at one task, in tasks, so that no interval hides another.
APART = 0.04
# Between the marks of the first and the last group, in tasks, so that none is read as the next task's.
WIDEST = 0.5
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "text.parse_math": False,  # names hold $ and _
    "pdf.fonttype": 42,  # fonts that publishers take
    "svg.hashsalt": "codyra_llm",
    "svg.fonttype": "none",
    "savefig.dpi": 300,
}


@dataclass(frozen=True)
class Series:
    """One group of runs and the name that the figure has for it."""

    name: str
    runs: list[Run]


def check(out: Path, kind: str | None) -> None:
    """Raises Fault for an unknown figure, for a file name that is not a figure's, and without matplotlib."""
    if kind is not None and kind not in FIGURES:
        raise Fault(
            f"--figure: '{kind}' is not a figure; choose {', '.join(FIGURES)}.{nearest(kind, FIGURES)}"
        )
    if kind is not None and out.suffix not in SUFFIXES:
        raise Fault(f"--out: '{out}' must end in {', '.join(SUFFIXES)} for --figure; give such a name")
    if not find_spec("matplotlib"):
        raise Fault(
            f"--out: '{out}' needs matplotlib, which is not installed; install codyra-llm[figures], or give "
            "a .csv and draw it with another tool"
        )


def write(runs: list[Run], out: Path, kind: str | None, over_orders: bool) -> None:
    """The figure `kind` of these runs; by default the score matrix of one run, learning against forgetting of
    several. Raises Fault where the runs hold nothing to draw."""
    import matplotlib

    kind = kind or ("tradeoff" if len(runs) > 1 else "matrix")
    pooled = over_orders and kind in ("tradeoff", "ranks")  # the others show one order
    groups = grouped(runs, pooled)
    series = [Series(_plain(name), group) for name, group in zip(names(groups, pooled), groups, strict=True)]
    with matplotlib.rc_context(STYLE):
        draw = {"matrix": matrix, "tradeoff": tradeoff, "stream": stream, "ranks": ranks}[kind]
        figure = draw(series)
        metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}[out.suffix]
        with replacing(out) as temporary:
            figure.savefig(
                temporary, format=out.suffix[1:], metadata=metadata, bbox_inches="tight", pad_inches=0.02
            )


def _plain(name: str) -> str:
    """The name on one line. matplotlib leaves names that begin with _ out of a legend, so they get a
    space."""
    text = one_line(name)
    return f" {text}" if text.startswith("_") else text


def _drawn(width: float, height: float, panels: int = 1) -> tuple["Figure", list["Axes"]]:
    """Panels one below the other, each `height` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * panels), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def means(runs: list[Run]) -> list[list[float | None]]:
    """R [steps][tasks] averaged over runs of one order; None where a run was not scored."""
    matrices = [run.summary["matrix"] for run in runs]
    out = []
    for rows in zip(*matrices, strict=False):  # up to the run that has come least far
        cells = zip(*rows, strict=True)
        out.append([None if None in cell else fmean(cell) for cell in cells])
    return out


def matrix(series: Sequence[Series]) -> "Figure":
    """The score on each task (columns) after each task (rows), one panel per group: dark is high."""
    shown = [(one, means(one.runs)) for one in series if one.runs[0].summary["matrix"]]
    if not shown:
        raise Fault("--figure matrix: no run has learnt and scored a task; give one that has")
    most = max(len(rows) for _, rows in shown)
    # Panels of the same tasks name them once, below the last.
    same = len({tuple(one.runs[0].recipe.tasks) for one, _ in shown}) == 1
    figure, panels = _drawn(COLUMN, (0.35 if same and len(shown) > 1 else 0.9) + 0.26 * most, len(shown))
    for axes, (one, rows) in zip(panels, shown, strict=True):
        tasks = [_plain(task) for task in one.runs[0].recipe.tasks]
        _heat(axes, rows, 0, 100, "{:.0f}")
        axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), tasks[: len(rows)])
        axes.tick_params(labelbottom=axes is panels[-1] or not same)
        axes.set_ylabel("after")
        axes.set_title(one.name)
    return figure


def _heat(axes: "Axes", rows: list[list[float | None]], low: float, high: float, form: str | None) -> None:
    """Values as shades of grey, each written in its cell where `form` is given."""
    import numpy as np

    values = np.array(rows, dtype=float)  # None becomes nan
    axes.imshow(values, cmap="Greys", vmin=low, vmax=high * 1.25, aspect="auto")  # black stays for text
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if form and value is not None:
                dark = (value - low) / (high * 1.25 - low) > 0.55
                colour = "white" if dark else "black"
                axes.text(j, i, form.format(value), ha="center", va="center", color=colour, fontsize=7)


def tradeoff(series: Sequence[Series]) -> "Figure":
    """Learning (mean of R[j][j]) against forgetting, one point per group with its intervals; the points of an
    arm, e.g. its learning rates, are joined."""
    points = [(one, _interval(one, "learnt"), _interval(one, "forgetting")) for one in series]
    known = [(one, x, y) for one, x, y in points if x is not None and y is not None]
    if not known:
        raise Fault(
            "--figure tradeoff: no group has both measures; forgetting needs two tasks and eval.when: each"
        )
    figure, (axes,) = _drawn(COLUMN, 2.9)
    arms = list(dict.fromkeys(_arm(one) for one, _, _ in known))
    for number, arm in enumerate(arms):
        members, learnt, forgotten = zip(*(row for row in known if _arm(row[0]) == arm), strict=True)
        xs = [found["mean"] for found in learnt]
        ys = [found["mean"] for found in forgotten]
        axes.errorbar(
            xs,
            ys,
            xerr=_halves(learnt),
            yerr=_halves(forgotten),
            label=_plain(arm),
            elinewidth=0.6,
            **_look(number),
        )
        for one, x, y in zip(members, xs, ys, strict=True):
            if len(members) > 1:
                axes.annotate(
                    _short(one.runs[0].rest), (x, y), (3, 3), textcoords="offset points", fontsize=6
                )
    axes.set_xlabel("just learnt (higher is better)")
    axes.set_ylabel("forgetting (lower is better)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _short(rest: str) -> str:
    """`lr=0.1` of `optim.lr=0.1`."""
    pairs = [part.partition("=") for part in rest.split(", ")]
    return _plain(", ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs))


def _arm(one: Series) -> str:
    return one.runs[0].arm or one.name


def _interval(one: Series, measure: str) -> dict | None:
    return interval([run.measures[measure] for run in one.runs], None)


def _halves(found: Sequence[dict]) -> list[float]:
    """Half the width of each interval (`statistics.interval`); 0 where there is none."""
    return [0.0 if one["low"] is None else one["high"] - one["mean"] for one in found]


def _look(number: int) -> dict:
    """Colour, marker and line of series number `number`; no two of the first seventy are alike."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[number % len(MARKS)],
        "linestyle": LINES[number % len(LINES)],
        "markerfacecolor": "white" if number // len(COLOURS) % 2 else COLOURS[number % len(COLOURS)],
    }


def along(run: Run) -> list[float | None]:
    """After each task the mean score on the tasks learnt so far; None where one of them was not scored."""
    parts = [row[: step + 1] for step, row in enumerate(run.summary["matrix"])]
    return [None if None in part else fmean(part) for part in parts]


def stream(series: Sequence[Series]) -> "Figure":
    """After each task the mean score on the tasks learnt so far, with the interval over seeds."""
    figure, (axes,) = _drawn(COLUMN, 3.0)
    apart = min(APART, WIDEST / len(series))
    longest: list[str] = []
    drawn = 0
    for number, one in enumerate(series):
        known = _known_along(one)
        if not known:
            continue
        drawn += 1
        tasks = one.runs[0].recipe.tasks
        longest = tasks if len(tasks) > len(longest) else longest
        places = [step + apart * number for step in known]
        axes.errorbar(
            places,
            [row["mean"] for row in known.values()],
            yerr=_halves(list(known.values())),
            label=one.name,
            capsize=1.5,
            elinewidth=0.6,
            **_look(number),
        )
    if not drawn:
        raise Fault(
            "--figure stream: no run has scored all tasks learnt so far after a task; eval.when: each does"
        )
    same = all(one.runs[0].recipe.tasks == longest for one in series)
    ticks = [_plain(task) for task in longest] if same else list(map(str, range(1, len(longest) + 1)))
    axes.set_xticks(
        range(1, len(longest) + 1), ticks, rotation=45 if same else 0, ha="right" if same else "center"
    )
    axes.set_xlabel("after")
    axes.set_ylabel("mean score on tasks so far")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _known_along(series: Series) -> dict[int, dict]:
    """By the number of tasks learnt, the mean over the runs with its interval, where all runs have one."""
    known = {}
    for step, values in enumerate(zip(*map(along, series.runs), strict=False), 1):
        found = interval(list(values), None)
        if found is not None:
            known[step] = found
    return known


def kept(runs: list[Run]) -> dict[str, dict[int, float]]:
    """Share of the ranks kept, by projection and layer, over all tasks and runs; empty without ranks."""
    counts: dict[tuple[str, int], list[tuple[int, int]]] = {}
    rows = [row for run in runs for row in run.folder.updates]
    for row in rows:
        layers = [int(part) for part in row.site.split(".") if part.isdecimal()]
        if layers and row.rank is not None:
            counts.setdefault((row.projection, layers[0]), []).append((row.kept or 0, row.rank))
    out: dict[str, dict[int, float]] = {}
    for (projection, layer), pairs in sorted(counts.items()):
        survived = sum(left for left, _ in pairs)
        total = sum(rank for _, rank in pairs)
        out.setdefault(projection, {})[layer] = survived / total
    return out


def ranks(series: Sequence[Series]) -> "Figure":
    """Share of the ranks kept, by layer and projection, one panel per group: dark is all of them."""
    shares = [(one, kept(one.runs)) for one in series]
    shown = [(one, found) for one, found in shares if found]
    if not shown:
        raise Fault("--figure ranks: no run has an adapter with ranks; give one of a LoRA method")
    rows = max(len(found) for _, found in shown)
    figure, panels = _drawn(COLUMN, 0.7 + 0.2 * rows, len(shown))
    for axes, (one, found) in zip(panels, shown, strict=True):
        layers = sorted({layer for row in found.values() for layer in row})
        values = []
        for row in found.values():
            values.append([row.get(layer) for layer in layers])
        _heat(axes, values, 0, 1, "{:.0%}" if len(layers) <= 8 else None)
        every = max(1, len(layers) // 8)
        axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        axes.set_yticks(range(len(found)), list(found))
        axes.set_title(f"{one.name}: ranks kept")
    panels[-1].set_xlabel("layer")
    bar = figure.colorbar(panels[0].images[0], ax=panels, ticks=(0, 0.5, 1), aspect=10 * len(panels))
    bar.ax.set_ylim(0, 1)
    bar.ax.set_yticklabels(["0", "50 %", "100 %"])
    return figure

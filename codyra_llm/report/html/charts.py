"""Numbers to places in a drawing; the template draws them as inline SVG. y grows downwards."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LETTER = 6.6  # width of a letter of the labels


@dataclass(frozen=True)
class Scale:
    """A straight map from [low, high] to [start, end] in the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers, in steps of 1, 2 or 5 times a power of ten, that span [low, high]."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def points(xs: Iterable[float], ys: Iterable[float]) -> str:
    """The `points` of a polyline; a single one is given twice, so that its round end is seen."""
    pairs = [f"{x:g},{y:g}" for x, y in zip(xs, ys, strict=True)]
    return " ".join(pairs * 2 if len(pairs) == 1 else pairs)


def panel(scores: dict[int, tuple[float, float | None, float | None]], learnt: int, steps: int) -> dict:
    """One task through the stream: score and interval by step (0: before training), learnt at step
    `learnt`.
    """
    x, y = Scale(0, max(steps, 1), 30, 230), Scale(0, 100, 104, 8)
    known = [(step, *score) for step, score in sorted(scores.items())]
    framed = [(s, low, high) for s, _, low, high in known if low is not None and high is not None]
    around = [(x(s), y(high)) for s, _, high in framed] + [(x(s), y(low)) for s, low, _ in reversed(framed)]
    parts = ([k for k in known if k[0] <= learnt], [k for k in known if k[0] >= learnt])
    every = math.ceil((steps + 1) / 10)
    return {
        "before": _line(parts[0], x, y) if len(parts[0]) > 1 else "",
        "after": _line(parts[1], x, y),
        "band": points(*zip(*around, strict=True)) if len(framed) > 1 else "",
        "learnt": x(learnt),
        "dots": [{"x": x(s), "y": y(v), "title": f"after {s}: {v:.1f}"} for s, v, *_ in known],
        "xs": [(x(s), str(s)) for s in range(0, steps + 1, every)],
        "ys": [(y(v), str(v)) for v in (0, 50, 100)],
    }


def _line(known: Sequence[tuple], x: Scale, y: Scale) -> str:
    return points((x(k[0]) for k in known), (y(k[1]) for k in known))


def curve(
    series: dict[str, list[tuple[float, float]]], tasks: list[tuple[str, int, int]], from_zero: bool
) -> dict:
    """Lines over the steps of the whole stream, cut where tasks begin.

    series: by name, (step, value) in order. tasks: (label, first step, last step), counted from 0 over the
    stream.
    """
    values = [value for line in series.values() for _, value in line]
    marks = ticks(0 if from_zero else min(values), max(values))
    x, y = Scale(0, max(last for *_, last in tasks) + 1, 60, 950), Scale(marks[0], marks[-1], 150, 24)
    lines = []
    for number, line in enumerate(series.values()):
        for _, first, last in tasks:
            if own := [(s, v) for s, v in line if first <= s <= last]:
                lines.append(
                    {"number": number, "points": points((x(s) for s, _ in own), (y(v) for _, v in own))}
                )
    spans = [(label, x(first), x(last + 1)) for label, first, last in tasks]
    return {
        "lines": lines,
        "names": list(series),
        "ys": [(y(v), f"{v:g}") for v in marks],
        "tasks": [
            {
                "x": a,
                "middle": round((a + b) / 2, 1),
                "title": label,
                "label": label if len(label) * LETTER < b - a else str(i),
            }
            for i, (label, a, b) in enumerate(spans, 1)
        ],
    }


def thinned(line: list[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """Means of as many neighbours as leave at most `most` points, each at the middle of its neighbours."""
    size = math.ceil(len(line) / most) or 1
    parts = [line[i : i + size] for i in range(0, len(line), size)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]


def scatter(groups: list[list[tuple[float, float]]], means: list[tuple[float, float] | None]) -> dict:
    """Runs as small dots, the mean of each group as a large one with the group's number; labels are kept
    apart.
    """
    shown = [p for group in groups for p in group]
    xs, ys = (ticks(min(values), max(values)) for values in zip(*shown, strict=True))
    x, y = Scale(xs[0], xs[-1], 60, 620), Scale(ys[0], ys[-1], 20, 310)
    dots = [{"number": i, "x": x(a), "y": y(b)} for i, group in enumerate(groups, 1) for a, b in group]
    placed, marks = [(dot["x"], dot["y"] + 4) for dot in dots], []
    for number, mean in enumerate(means, 1):
        if mean is not None:
            at = x(mean[0]), y(mean[1])
            label = _free(at, placed)
            placed.append(label)
            marks.append({"number": number, "x": at[0], "y": at[1], "label": label})
    return {
        "dots": dots,
        "means": marks,
        "xs": [(x(v), f"{v:g}") for v in xs],
        "ys": [(y(v), f"{v:g}") for v in ys],
    }


def _free(at: tuple[float, float], placed: list[tuple[float, float]]) -> tuple[float, float]:
    """A place for a label near `at` that no dot or label has taken, going outwards."""
    places = [
        (at[0] + reach * dx, at[1] + reach * dy + 4)
        for reach in (13, 20, 27)
        for dx, dy in ((1, -0.6), (-1, -0.6), (1, 0.8), (-1, 0.8), (0, -1.1), (0, 1.2))
    ]
    apart = (p for p in places if all(abs(p[0] - q[0]) > 12 or abs(p[1] - q[1]) > 11 for q in placed))
    left, top = next(apart, places[0])
    return round(left, 1), round(top, 1)

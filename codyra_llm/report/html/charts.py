"""Converts numbers to coordinates, which the template draws as inline SVG. y grows downwards."""

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
    known = sorted(scores.items())
    values = [(step, value) for step, (value, _, _) in known]
    upper = [(x(step), y(high)) for step, (_, low, high) in known if low is not None and high is not None]
    lower = [(x(step), y(low)) for step, (_, low, high) in known if low is not None and high is not None]
    outline = [*upper, *reversed(lower)]  # along the upper bounds, and back along the lower ones
    before = [pair for pair in values if pair[0] <= learnt]
    after = [pair for pair in values if pair[0] >= learnt]
    dots = [{"x": x(step), "y": y(value), "title": f"after {step}: {value:z.1f}"} for step, value in values]
    every = math.ceil((steps + 1) / 10)
    xs = [(x(step), str(step)) for step in range(0, steps + 1, every)]
    return {
        "before": _line(before, x, y) if len(before) > 1 else "",
        "after": _line(after, x, y),
        "band": points(*zip(*outline, strict=True)) if len(upper) > 1 else "",
        "learnt": x(learnt),
        "dots": dots,
        "xs": xs,
        "ys": [(y(value), str(value)) for value in (0, 50, 100)],
    }


def _line(known: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    xs = [x(step) for step, _ in known]
    return points(xs, [y(value) for _, value in known])


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
            own = [(step, value) for step, value in line if first <= step <= last]
            if own:
                lines.append({"number": number, "points": _line(own, x, y)})
    spans = []
    for number, (label, first, last) in enumerate(tasks, 1):
        start, end = x(first), x(last + 1)
        fits = len(label) * LETTER < end - start
        middle = round((start + end) / 2, 1)
        spans.append({"x": start, "middle": middle, "title": label, "label": label if fits else str(number)})
    ys = [(y(value), f"{value:g}") for value in marks]
    return {"lines": lines, "names": list(series), "ys": ys, "tasks": spans}


def thinned(line: list[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """The line with at most `most` points: each is the mean of some neighbours, at their middle."""
    size = math.ceil(len(line) / most) or 1
    parts = [line[i : i + size] for i in range(0, len(line), size)]
    means = []
    for part in parts:
        steps, values = zip(*part, strict=True)
        means.append((sum(steps) / len(part), sum(values) / len(part)))
    return means


def scatter(groups: list[list[tuple[float, float]]], means: list[tuple[float, float] | None]) -> dict:
    """Runs as small dots, the mean of each group as a large one with the group's number; labels are kept
    apart.
    """
    shown = [point for group in groups for point in group]
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
    x_marks = [(x(value), f"{value:g}") for value in xs]
    y_marks = [(y(value), f"{value:g}") for value in ys]
    return {"dots": dots, "means": marks, "xs": x_marks, "ys": y_marks}


def _free(at: tuple[float, float], placed: list[tuple[float, float]]) -> tuple[float, float]:
    """The nearest place for a label around `at` that overlaps no dot or label."""
    places = [
        (at[0] + reach * dx, at[1] + reach * dy + 4)
        for reach in (13, 20, 27)
        for dx, dy in ((1, -0.6), (-1, -0.6), (1, 0.8), (-1, 0.8), (0, -1.1), (0, 1.2))
    ]
    left, top = next((place for place in places if _apart(place, placed)), places[0])
    return round(left, 1), round(top, 1)


def _apart(place: tuple[float, float], placed: list[tuple[float, float]]) -> bool:
    """Whether a label there overlaps none of those placed."""
    return all(abs(place[0] - left) > 12 or abs(place[1] - top) > 11 for left, top in placed)

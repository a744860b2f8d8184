"""One way to measure for all levels: check every arm against float64, then time them in turn, then measure
their memory."""

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median, quantiles

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from codyra_llm.core.errors import Fault
from codyra_llm.runtime.memory import peak_bytes

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Options:
    """The options of the command line; each level uses those that concern it."""

    device: torch.device
    dtype: torch.dtype
    rounds: int | None = None
    arms: tuple[str, ...] | None = None
    shape: tuple[int, ...] | None = None
    model: str | None = None
    data: str = "mini"
    tasks: tuple[str, ...] | None = None
    batch: int = 8
    examples: int = 8
    tokens: int | None = None
    asleep: int = 0  # clock cycles that a GPU sleeps before each arm (`_seconds`)

    def chosen(self, known: Sequence[str]) -> list[str]:
        """The arms to run, in the level's order."""
        unknown = [name for name in self.arms or () if name not in known]
        if unknown:
            raise Fault(f"--arms: '{unknown[0]}' is not an arm of this level; choose from {', '.join(known)}")
        return [name for name in known if self.arms is None or name in self.arms]

    def sizes(self, names: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """The level's shape; where --shape does not fit, the error lists `names`."""
        shape = self.shape or default
        if len(shape) != len(default) or min(shape) < 1:
            raise Fault(
                f"--shape: {','.join(map(str, shape))} does not fit; this level takes {names}, all at least "
                f"1, e.g. {','.join(map(str, default))}"
            )
        return shape


@dataclass
class Contestant:
    """What the measurement calls. `outcome` returns output or loss, and gradients, and changes nothing;
    `expected` are the same in float64; `run(i)` does the work of round i; `saved`, if given, returns the
    bytes that forward keeps for backward; `before_weighing` is called before memory is measured."""

    outcome: Callable[[], dict[str, Tensor]]
    expected: dict[str, Tensor]
    run: Callable[[int], object]
    saved: Callable[[], int] | None = None
    before_weighing: Callable[[], None] = lambda: None


def compare(
    contestants: dict[str, Contestant], options: Options, rounds: int, largest: int = 0, different: int = 1
) -> dict[str, dict]:
    """One row per arm. Raises Fault, before anything is timed, where the outcome of an arm is too far from
    float64. `largest`: the round whose memory is measured. `different`: how many rounds differ in their work;
    all of them are warmed up."""
    errors = gate(contestants, options.dtype)
    runs = {name: contestant.run for name, contestant in contestants.items()}
    times = interleaved(runs, rounds, options.device, different, options.asleep)
    reference = next((name for name in ("peft", "full") if name in times), next(iter(times)))
    rows = {}
    for name, contestant in contestants.items():
        contestant.before_weighing()
        rows[name] = {
            "speedup": _spread(_ratios(times[reference], times[name])),
            "over": reference,
            "over_floor": median(_ratios(times[name], times["frozen"])) if "frozen" in times else None,
            "milliseconds": _spread([1000 * t for t in times[name]]),
            "seconds": sum(times[name]),
            "peak_bytes": peak_bytes(partial(contestant.run, largest), options.device),
            "saved_bytes": contestant.saved() if contestant.saved else None,
            "error": errors[name],
        }
    return rows


def _ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Round by round, so that a drift of the machine's speed cancels."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def gate(contestants: dict[str, Contestant], dtype: torch.dtype) -> dict[str, float]:
    """Each arm's largest relative distance ‖x - x₆₄‖ / ‖x₆₄‖ over its output and its gradients by kind.
    Raises one Fault with all arms that are off by more than TOLERANCE."""
    errors, faults = {}, []
    for name, contestant in contestants.items():
        found = contestant.outcome()
        distances = {key: _distance(value, contestant.expected[key]) for key, value in found.items()}
        worst = max(distances, key=lambda key: (math.isnan(distances[key]), distances[key]))
        errors[name] = distances[worst]
        if not errors[name] <= TOLERANCE[dtype]:
            faults.append(
                f"arm {name}: {worst} is {errors[name]:.2g} away from float64, expected at most "
                f"{TOLERANCE[dtype]:g} in {dtype}; its time means nothing, correct it or leave it out"
            )
    if faults:
        raise Fault(*faults)
    return errors


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def interleaved(
    actions: dict[str, Callable[[int], object]],
    rounds: int,
    device: torch.device,
    different: int = 1,
    asleep: int = 0,
) -> dict[str, list[float]]:
    """Seconds of every arm in every round, after a warm-up over the rounds of `different` work, since a shape
    that is met for the first time costs more. All arms run in every round, another one first each time, so
    that a drift of the machine hits all of them."""
    for number in range(different):
        for action in actions.values():
            _seconds(partial(action, number), device)
    names, times = list(actions), {name: [] for name in actions}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_seconds(partial(actions[name], number), device, asleep))
    return times


def _seconds(action: Callable[[], object], device: torch.device, asleep: int = 0) -> float:
    """Seconds of one call. A GPU first sleeps for `asleep` clock cycles, while the host fills its queue; so
    the host's own time, which a long training step hides, is not measured."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if asleep:
            torch.cuda._sleep(asleep)
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _spread(values: list[float]) -> dict[str, float]:
    """The median, and the 20th and 80th percentiles."""
    fifths = quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": median(values), "p20": fifths[0], "p80": fifths[-1]}


def machine(options: Options) -> dict:
    """What the figures were measured on."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    if options.device.type == "cuda":
        device = torch.cuda.get_device_name(options.device)
    else:
        device = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(options.dtype).removeprefix("torch."),
        **{name: installed(name) for name in ("torch", "transformers", "peft")},
    }


def show(result: dict, console: Console) -> None:
    """The table of one level: ratios first. Columns that no arm fills are left out."""
    rows = {name: _cells(row) for name, row in result["arms"].items()}
    filled = {title for cells in rows.values() for title, text in cells.items() if text}
    titles = [title for title in next(iter(rows.values())) if title in filled]
    table = Table(
        Column("arm", no_wrap=True),
        *(Column(title, justify="right", no_wrap=True) for title in titles),
        box=SIMPLE,
        padding=0,
        collapse_padding=True,
        title=" ".join([result["level"], *map(str, result["shape"])]),
    )
    for name, cells in rows.items():
        table.add_row(name, *(cells[title] for title in titles))
    console.print(table)
    report(result, console)


def report(result: dict, console: Console) -> None:
    """What a table was measured on, and what its arms are."""
    measured_on = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    for line in (f"measured on: {measured_on}", *result["notes"]):
        console.print(line, soft_wrap=True)


def _cells(row: dict) -> dict[str, str]:
    def with_range(spread: dict[str, float], form: str) -> str:
        return f"{spread['median']:{form}} ({spread['p20']:{form}}-{spread['p80']:{form}})"

    def filled(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    saved = None if row["saved_bytes"] is None else row["saved_bytes"] / 1e6
    return {
        f"speed over\n{row['over']} (p20-p80)": with_range(row["speedup"], ".2f"),
        "time over\nfloor": filled(row["over_floor"], ".2f"),
        "tokens/s": filled(row.get("tokens_per_second"), ".0f"),
        "median\nms": f"{row['milliseconds']['median']:.1f}",
        "peak\nMB": f"{row['peak_bytes'] / 1e6:.1f}",
        "saved\nMB": filled(saved, ".1f"),
        "off\nfloat64": f"{row['error']:.0e}",
    }

"""The targets of `bench gpu`, and the summary that says which were reached."""

from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Column, Table

from codyra_llm.bench.gpu.context import TARGET, findings

ENDED = "ended"  # the key of the finding that says how a stage ended


class Target(NamedTuple):
    """The bound of a figure, what the figure is, and whether it is to be at least (else at most) the
    bound."""

    bound: float
    what: str
    at_least: bool = False

    def reached(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


TARGETS = {
    "linear layer": Target(1.13, "time over frozen, 8192 x 4096 -> 4096, r=16, queue filled"),
    "decoder layer": Target(1.10, "time over frozen, LLaMA-3-8B's, 4 x 2048 tokens, queue filled"),
    "step over PEFT, long examples": Target(1.3, "times as fast, Llama-3.2-1B", at_least=True),
    "step over PEFT, short examples": Target(1.3, "times as fast, Llama-3.2-1B", at_least=True),
    "step over PEFT's strongest, long examples": Target(1.15, "times as fast, Llama-3.2-1B", at_least=True),
    "step over PEFT's strongest, short examples": Target(1.15, "times as fast, Llama-3.2-1B", at_least=True),
    "host waits of a step, long examples": Target(1, "of an optimizer step, packed"),
    "host waits of a step, short examples": Target(1, "of an optimizer step, packed"),
    "decoding 1 rows": Target(2, "a step over reading the weights once, Llama-3.2-1B"),
    "decoding 64 rows": Target(2, "a step over reading the weights once, Llama-3.2-1B"),
    "memory that plan estimates, off by": Target(0.05, "share of the peak that is measured"),
    "time that plan estimates, off by": Target(0.25, "share of the seconds that are measured"),
}


def summary(out: Path) -> Group:
    """How the stages ended, and the targets: reached, missed, or not measured here."""
    rows = findings(out)
    return Group(_stages(rows), _targets(rows))


def _stages(rows: list[dict[str, Any]]) -> Table:
    table = Table(Column("stage", no_wrap=True), "ended", Column("s", justify="right"), box=SIMPLE)
    for row in rows:
        if row["key"] == ENDED:
            table.add_row(row["stage"], row["value"]["how"], f"{row['value']['seconds']:.0f}")
    return table


def _targets(rows: list[dict[str, Any]]) -> Table:
    found = {row["key"]: row["value"] for row in rows}
    table = Table("target", "what", "bound", "found", "", box=SIMPLE)
    for name, target in TARGETS.items():
        value = found.get(TARGET + name)
        bound = f"{'at least' if target.at_least else 'at most'} {target.bound:g}"
        table.add_row(name, target.what, bound, *verdict(target, value))
    return table


def verdict(target: Target, value: float | None) -> tuple[str, str]:
    """The figure as text, and what it means."""
    if value is None:
        return "", "not measured here"
    return f"{value:g}", "reached" if target.reached(value) else "missed"


def write_summary(out: Path, console: Console) -> None:
    """Print the summary, and write it to OUT/summary.txt."""
    made = summary(out)
    console.print(made)
    with open(out / "summary.txt", "w", encoding="utf-8") as file:
        Console(file=file, width=160).print(made)

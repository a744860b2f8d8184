"""Tables that keep their numbers: the page shows one as a heat map, CSV and Markdown write it as it is."""

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TextIO

from codyra_llm.core.terminal import printable

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet reads a cell that begins so as a formula
HEADER = ("table", "row", "column", "value", "low", "high", "method", "seed", "order")


class Provenance(NamedTuple):
    """Which runs a row comes from: their method, and their seeds and orders, separated by spaces."""

    method: str = ""
    seed: str = ""
    order: str = ""


@dataclass(frozen=True)
class Cell:
    """A value, how it is shown, and where known its 95 % interval."""

    value: float | int | str
    text: str
    low: float | None = None
    high: float | None = None
    small: str = ""  # a second line
    hint: str = ""  # shown under the pointer, and with all others below the table
    heat: float | None = None  # 0..100: how strong the cell's colour is
    marked: bool = False  # outlined, or bold


@dataclass(frozen=True)
class Grid:
    """Rows and columns with names; a cell is None where nothing was measured."""

    name: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    note: str = ""
    better: dict[str, int] = field(default_factory=dict)  # by column 1: more is better, -1: less is
    provenance: dict[str, Provenance] = field(default_factory=dict)  # by row

    def holds_words(self, column: int) -> bool:
        """Whether the column's cells are texts."""
        found = (cells[column] for _, cells in self.rows)
        return any(cell is not None and isinstance(cell.value, str) for cell in found)

    def hints(self) -> list[tuple[str, str]]:
        """Where there are hints, and what they say: of each column first the one that most of its cells have,
        then the others by row and column."""
        common: list[tuple[str, str]] = []
        others: list[tuple[str, str]] = []
        for i, column in enumerate(self.columns):
            cells_of = [(label, cells[i]) for label, cells in self.rows]
            hinted = [(label, cell.hint) for label, cell in cells_of if cell and cell.hint]
            if not hinted:
                continue
            ((most, _),) = Counter(hint for _, hint in hinted).most_common(1)
            common.append((column, most))
            others += [(f"{label}, {column}", hint) for label, hint in hinted if hint != most]
        return common + others

    def filled(self) -> "Grid":
        """The grid without its empty columns."""
        kept = []
        for i in range(len(self.columns)):
            if any(cells[i] is not None for _, cells in self.rows):
                kept.append(i)
        rows = []
        for label, cells in self.rows:
            rows.append((label, [cells[i] for i in kept]))
        return replace(self, columns=[self.columns[i] for i in kept], rows=rows)


def number(value: float | None, form: str = "z.1f", **more) -> Cell | None:
    """A cell of a number; by the z of its form, what rounds to zero has no minus."""
    return None if value is None else Cell(value, format(value, form), **more)


def word(value: str) -> Cell:
    return Cell(value, value)


def write_csv(grids: Iterable[Grid], file: TextIO, whole: Provenance | None = None) -> None:
    """Write one line per cell that holds something, in full precision, with the columns of HEADER. A text
    that a spreadsheet would run as a formula gets an apostrophe in front. `whole`: the runs of rows whose
    grid names none."""
    out = csv.writer(file, lineterminator="\n")
    out.writerow(HEADER)
    for grid in grids:
        for label, cells in grid.rows:
            provenance = grid.provenance.get(label, whole or Provenance())
            for column, cell in zip(grid.columns, cells, strict=True):
                if cell is not None:
                    line = (grid.name, label, column, cell.value, cell.low, cell.high, *provenance)
                    out.writerow([_inert(value) for value in line])


def _inert(value: object) -> object:
    """A name such as "=HYPERLINK(...)" as a text that spreadsheets show and don't evaluate, and a terminal
    does not interpret."""
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if value.startswith(FORMULA) else value)


def markdown(grids: Iterable[Grid]) -> str:
    """A section with a table for each."""
    lines = []
    for grid in grids:
        lines += [f"## {plain(grid.name)}", ""]
        if grid.note:
            lines += [plain(grid.note), ""]
        lines += [_line([grid.corner, *grid.columns]), "|" + "---|" * (len(grid.columns) + 1)]
        for label, cells in grid.rows:
            lines.append(_line([label, *map(_words, cells)]))
        lines.append("")
    return "\n".join(lines)


def _words(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"**{cell.text}**" if cell.marked else cell.text
    return f"{text} ({cell.small})" if cell.small else text


def _line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(map(plain, texts)) + " |"


MARKDOWN = str.maketrans({"\\": r"\\", "|": r"\|", "&": "&amp;", "<": "&lt;"})


def plain(text: str) -> str:
    """A user's name escaped for a Markdown table, so that it ends no cell, begins no tag, and holds nothing
    that a terminal would interpret."""
    return printable(" ".join(text.split())).translate(MARKDOWN)

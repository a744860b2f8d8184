"""Tables for a paper: LaTeX with booktabs, the best of a column bold, the second underlined."""

import re
import unicodedata
from collections.abc import Iterable

from codyra_llm.core.terminal import REPLACEMENT, one_line
from codyra_llm.report.grid import Cell, Grid

GREEK = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ"  # the letters that have a command


def _command(letter: str) -> str:
    """LaTeX's command of a Greek letter: its name, which Unicode has too."""
    name = unicodedata.name(letter).split()[-1].replace("LAMDA", "LAMBDA")
    return "\\" + (name.capitalize() if letter.isupper() else name.lower())


OWN = {sign: f"\\{sign}" for sign in "&%$#_{}"}  # signs of LaTeX's
LETTERS = {letter: f"${_command(letter)}$" for letter in GREEK}
# Written so that pdfLaTeX typesets them without a package; it knows most other letters of Latin scripts.
SPECIAL = {
    "\\": r"\textbackslash{}",
    "\0": "{}",  # one_line leaves none
    **OWN,
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",  # \textquotedbl needs the encoding T1, and babel may make a command of the sign
    "`": r"\textasciigrave{}",
    "[": "{[}",  # after \\ or \midrule these would begin an argument of theirs
    "*": "{*}",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "∞": r"$\infty$",
    "−": "$-$",
    "–": "--",
    "₀": "$_0$",
    REPLACEMENT: "?",
    **LETTERS,
}
LIGATURES = re.compile("([-',])(?=\\1)")  # of two signs TeX makes one
PAGE = 72  # letters of a line of the class article, 345 pt
GAP = 2.5  # letters between two columns
PREAMBLE = "% \\usepackage{booktabs}\n"


def escaped(text: str) -> str:
    """A name of the user's as text in LaTeX: no command begins in it, and it is one line."""
    apart = LIGATURES.sub(r"\1\0", one_line(text))
    return "".join(SPECIAL.get(sign, sign) for sign in apart)


def latex(grids: Iterable[Grid]) -> str:
    """A table environment for each; `\\input` takes the file as it is."""
    return PREAMBLE + "\n".join(map(_table, grids))


def _table(grid: Grid) -> str:
    pooled = any(cell and " ± " in cell.text for _, cells in grid.rows for cell in cells)
    intervals = " ± is half the 95 % interval over runs (Student's t)." if pooled else ""
    caption = f"{grid.name[:1].upper()}{grid.name[1:]}. {grid.note}".strip() + intervals
    begin = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(caption)}}}"]
    parts = "\n\n\\medskip\n".join(_tabular(grid, columns) for columns in _fitting(grid))
    return "\n".join([*begin, parts, r"\end{table}", ""])


def _tabular(grid: Grid, columns: list[int]) -> str:
    """The rows of some of the columns."""
    places = {column: _places(grid, column) for column in columns}
    lines = []
    for row, (label, cells) in enumerate(grid.rows):
        texts = [_cell(cells[column], places[column].get(row)) for column in columns]
        lines.append(" & ".join([escaped(label), *texts]) + r" \\")
    head = " & ".join([escaped(grid.corner), *(_head(grid, column) for column in columns)]) + r" \\"
    sides = "".join("l" if grid.holds_words(column) else "r" for column in columns)
    begin = [rf"\begin{{tabular}}{{l{sides}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*begin, *lines, r"\bottomrule", r"\end{tabular}"])


def _fitting(grid: Grid) -> list[list[int]]:
    """The columns in groups that are as wide as a page each at most, each next to the rows' names."""
    labels = [label for label, _ in grid.rows]
    names = GAP + max(map(len, [grid.corner, *labels]))
    groups: list[list[int]] = [[]]
    width = names
    for column in range(len(grid.columns)):
        words = grid.columns[column].split()
        own = GAP + max(_cell_width(grid, column), 1, *map(len, words))
        if groups[-1] and width + own > PAGE:
            groups.append([])
            width = names
        groups[-1].append(column)
        width += own
    return groups


def _cell_width(grid: Grid, column: int) -> int:
    """Letters of the longest cell of a column."""
    cells = [cells[column] for _, cells in grid.rows]
    return max((len(cell.text) for cell in cells if cell), default=0)


def _head(grid: Grid, column: int) -> str:
    """A column's name, a word on each line where it would be wider than the cells."""
    name = grid.columns[column]
    words = [escaped(word) for word in name.split()]
    if len(words) < 2 or len(name) <= _cell_width(grid, column):
        return escaped(name)
    side = "l" if grid.holds_words(column) else "r"
    return rf"\shortstack[{side}]{{" + r"\\".join(words) + "}"


def _places(grid: Grid, column: int) -> dict[int, int]:
    """By row its rank in the column, 1 or 2, by the values as they are shown: equal ones share a rank. Empty
    where neither more nor less is better, or nothing is compared."""
    better = grid.better.get(grid.columns[column])
    shown = {row: _value(cells[column]) for row, (_, cells) in enumerate(grid.rows)}
    known = {row: value for row, value in shown.items() if value is not None}
    if better is None or len(set(known.values())) < 2:
        return {}
    ranked = sorted(set(known.values()), key=lambda value: -better * value)[:2]
    return {row: ranked.index(value) + 1 for row, value in known.items() if value in ranked}


def _value(cell: Cell | None) -> float | None:
    if cell is None or isinstance(cell.value, str):
        return None
    return float(_main(cell).replace(",", ""))


def _main(cell: Cell) -> str:
    return cell.text.partition(" ± ")[0]


def _cell(cell: Cell | None, place: int | None) -> str:
    if cell is None:
        return "--"
    if isinstance(cell.value, str):
        return escaped(cell.text)
    half = cell.text.partition(" ± ")[2]
    number = _main(cell).replace(",", "{,}")
    if place == 1:
        number = rf"\mathbf{{{number}}}"
    elif place == 2:
        number = rf"\underline{{{number}}}"
    star = "^{*}" if cell.marked else ""
    return f"${number}{star}$" if not half else rf"${number}{star} \pm {half}$"

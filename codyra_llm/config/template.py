"""A prompt as a text with columns in it.

`{name}` stands for a column's text, `{{` and `}}` for braces. Columns without text leave no trace: a line is
dropped, with its break, if none of its columns has text; so is, by itself, a part in double square brackets.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from codyra_llm.core.parsing import shown

PIECE = re.compile(r"(\{\{|\}\}|\{[^{}\n]+\}|[{}])")
OPTIONAL = re.compile(r"\[\[(.*?)\]\]")
BRACES = {"{{": "{", "}}": "}"}


class Column(str):
    """The name of a column, among pieces of text."""


@dataclass(frozen=True)
class Part:
    """Pieces of a line. The pieces of an optional part are kept or dropped together."""

    pieces: tuple[str, ...]
    optional: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns that the part names."""
        return [piece for piece in self.pieces if isinstance(piece, Column)]

    def stays(self, text_of: Callable[[str], str]) -> bool:
        """Whether it is written: an optional part needs a column with text."""
        return not self.optional or any(text_of(column).strip() for column in self.columns)

    def written(self, text_of: Callable[[str], str]) -> str:
        """The part with the columns' texts."""
        return "".join(text_of(piece) if isinstance(piece, Column) else piece for piece in self.pieces)


@dataclass(frozen=True)
class Template:
    """A prompt as lines of text and columns."""

    lines: tuple[tuple[Part, ...], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns, each once, as they are written."""
        every = [column for parts in self.lines for part in parts for column in part.columns]
        return tuple(dict.fromkeys(every))

    def fill(self, text_of: Callable[[str], str]) -> str:
        """The prompt, where `text_of` gives a column's text; empty for what a record lacks."""
        lines = [_line(parts, text_of) for parts in self.lines]
        return "\n".join(line for line in lines if line is not None)


def _line(parts: tuple[Part, ...], text_of: Callable[[str], str]) -> str | None:
    """The line as it is written; None if it is dropped."""
    outside = [column for part in parts if not part.optional for column in part.columns]
    if outside and not any(text_of(column).strip() for column in outside):
        return None
    kept = [part for part in parts if part.stays(text_of)]
    return "".join(part.written(text_of) for part in kept) if kept else None


@lru_cache
def parse(text: str) -> Template:
    """The template that a text is. Raises ValueError, with the brace, where one has no partner."""
    return Template(tuple(_parts(line) for line in text.split("\n")))


def _parts(line: str) -> tuple[Part, ...]:
    parts, start = [], 0
    for found in OPTIONAL.finditer(line):
        inner = Part(_pieces(found[1]), optional=True)
        if not inner.columns:  # such brackets are text
            continue
        parts += [Part(_pieces(line[start : found.start()])), inner]
        start = found.end()
    parts.append(Part(_pieces(line[start:])))
    return tuple(part for part in parts if part.pieces) or (Part(()),)


def _pieces(text: str) -> tuple[str, ...]:
    pieces = []
    for piece in PIECE.split(text):
        if piece in ("{", "}"):
            raise ValueError(
                f"the '{piece}' in {shown(text)} has no partner; write "
                "{name} for a column, {{ and }} for braces"
            )
        if len(piece) > 2 and piece[0] == "{":
            pieces.append(Column(piece[1:-1]))
        elif piece:
            pieces.append(BRACES.get(piece, piece))
    return tuple(pieces)

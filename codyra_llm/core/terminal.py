"""What is shown on a terminal: text of others stays text, whatever it holds."""

import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Control characters but tab and line feed (escape sequences begin with one), halves of surrogate pairs, and
# what changes the direction of writing: with any of these a name could look like another, or rewrite the
# screen.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
REPLACEMENT = "\ufffd"


def printable(text: str) -> str:
    """`text` with every character that a terminal would obey replaced by U+FFFD."""
    return HIDDEN.sub(REPLACEMENT, text)


def one_line(text: str) -> str:
    """`printable`, and line breaks as blanks."""
    return printable(" ".join(text.splitlines()))


def write(text: str) -> None:
    """Print `text` as it is, but for what a terminal would obey where standard output is one."""
    print(printable(text) if sys.stdout.isatty() else text)


class Terminal(Console):
    """A console for which no string is markup: names and paths may hold [/b]. Styles are given by rich's
    `Text`.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)

"""Output on a terminal: foreign text is shown as text, whatever control codes it contains."""

import io
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from codyra_llm.core.errors import Fault

# Control characters but tab and line feed (escape sequences begin with one), halves of surrogate pairs, and
# what changes the direction of writing: with any of these a name could look like another, or rewrite the
# screen.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
REPLACEMENT = "\ufffd"


def printable(text: str) -> str:
    """`text` with every character that a terminal would interpret replaced by U+FFFD."""
    return HIDDEN.sub(REPLACEMENT, text)


def one_line(text: str) -> str:
    """`printable`, with line breaks as spaces."""
    return printable(" ".join(text.splitlines()))


def write(text: str) -> None:
    """Print `text`; if standard output is a terminal, without characters that it would interpret."""
    print(printable(text) if sys.stdout and sys.stdout.isatty() else text)


class Unbroken:
    """A text stream that drops what is written once its reader has gone or its disk is full."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.lost: OSError | None = None  # why nothing is written any more

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, or nothing once the stream is lost."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Flush what was written, or nothing once the stream is lost."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):  # ValueError: a stream without a descriptor
            os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def unbroken_output() -> Iterator[None]:
    """Within this block nothing fails because standard output can't be written or can't encode a letter.
    Raises Fault at the end if it could not be written, except when the reader closed it (`| head`)."""
    if sys.stdout is None:  # closed before the start
        yield
        return
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that its encoding lacks is written as its number
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = stream = Unbroken(sys.stdout)
    ended = None
    try:
        yield
    except SystemExit as exit_:
        if exit_.code:
            raise
        ended = exit_  # a command that succeeded ends this way
    finally:
        stream.flush()
        sys.stdout = stream._stream
    if stream.lost and not isinstance(stream.lost, BrokenPipeError):
        raise Fault(
            f"standard output could not be written ({stream.lost.strerror}); everything else was done: free "
            "some space or write it elsewhere, and give the command again for its output"
        )
    if ended:
        raise ended


class Terminal(Console):
    """A console that treats no string as markup: names and paths may contain [/b]. Use rich's `Text` for
    styles."""

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, with text made `printable` and rich's own control codes left alone."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


console = Terminal()  # one for all output of a command: other writers would run into a display's line


class ConsoleHandler(logging.Handler):
    """Prints log records on the console, a warning with that word in front."""

    def emit(self, record: logging.LogRecord) -> None:
        before = "warning: " if record.levelno >= logging.WARNING else ""
        console.print(before + record.getMessage(), soft_wrap=True)


@contextmanager
def log_printed() -> Iterator[None]:
    """Within this block what the library logs, from INFO up, is printed on the console: for commands. Nothing
    else in the library prints, so that its users decide what they see."""
    logger, handler = logging.getLogger("codyra_llm"), ConsoleHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

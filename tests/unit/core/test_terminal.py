"""Names and texts of others on a terminal: shown as they are, obeyed by nobody."""

import io
import logging
import os
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

import codyra_llm
from codyra_llm.core.errors import Fault
from codyra_llm.core.terminal import Terminal, log_printed, one_line, printable, unbroken_output, write

EVIL = "[/b][red]\x1b[2J\u202etxt\x9b"
HARMLESS = "[/b][red]\ufffd[2J\ufffdtxt\ufffd"


def shown(renderable) -> str:
    out = io.StringIO()
    Terminal(file=out, width=120, force_terminal=True, color_system=None).print(renderable)
    return out.getvalue()


def test_what_a_terminal_would_obey_is_replaced():
    assert printable(EVIL) == HARMLESS
    assert printable("\x00\x07\x7f\ud800\u2066") == "\ufffd" * 5
    assert printable("tab\tline\nübung 判断 e\u0301") == "tab\tline\nübung 判断 e\u0301"
    assert one_line("two\r\nlines") == "two lines"


@pytest.mark.parametrize("kind", ["text", "styled", "table"])
def test_no_string_is_markup_wherever_it_stands(kind):
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    found = shown({"text": EVIL, "styled": Text.assemble((EVIL, "bold")), "table": table}[kind])
    assert HARMLESS in found
    assert not set("\u202e\x9b") & set(found) and "\x1b[2J" not in found


def test_an_answer_is_written_as_it_is_but_to_a_terminal(monkeypatch, capsys):
    write(EVIL)
    assert capsys.readouterr().out == EVIL + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write(EVIL)
    assert capsys.readouterr().out == HARMLESS + "\n"


def test_every_console_of_the_package_is_one():
    """`Console` is named in annotations only."""
    for path in Path(codyra_llm.__path__[0]).rglob("*.py"):
        if path.name != "terminal.py":
            assert "= Console(" not in path.read_text(encoding="utf-8"), path
    assert issubclass(Terminal, Console)


def said_into(descriptor: int, more: int) -> int:
    """Print `more` bytes and a line, three times, to a descriptor. How often that went through."""
    done = 0
    with open(descriptor, "w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        with unbroken_output():
            for _ in range(3):
                print("x" * more, flush=True)
                Terminal().print("a line")
                done += 1
    return done


def test_a_reader_that_goes_away_ends_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    assert said_into(writer, 100) == 3


def test_a_full_disk_is_told_after_the_work_is_done():
    with pytest.raises(Fault, match=r"standard output .*No space left.* give the command again"):
        said_into(os.open("/dev/full", os.O_WRONLY), 1 << 14)


def test_exit_codes_pass():
    for code in (0, 3, "text"):
        with pytest.raises(SystemExit) as ended, unbroken_output():
            raise SystemExit(code)
        assert ended.value.code == code


def test_commands_print_what_is_logged_and_nobody_else_does(capsys):
    logger = logging.getLogger("codyra_llm.a.module")
    before = logging.getLogger("codyra_llm").level, list(logging.getLogger("codyra_llm").handlers)
    logger.info("unheard")
    with log_printed():
        logger.info("%s: learnt", EVIL)
        logger.warning("a tracker failed")
        logger.debug("a detail")
    logger.info("unheard")
    assert capsys.readouterr().out == f"{HARMLESS}: learnt\nwarning: a tracker failed\n"
    assert (logging.getLogger("codyra_llm").level, logging.getLogger("codyra_llm").handlers) == before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_letter_that_the_stream_lacks_ends_nothing(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    with unbroken_output():
        Terminal(width=60).print("Größe 数 ≤ 1")
    assert written.getvalue().decode(encoding).endswith("\\u6570 \\u2264 1\n")

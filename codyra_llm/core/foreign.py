"""Runs templates and regular expressions that come with a model, a data folder or a task file, with limits.

A chat template can loop forever, request all memory in a single operation, or match for hours, and no thread
can stop that. So they run in a separate process with a limit on its memory, which the kernel ends when one
item has used up its CPU time (not wall time, so the load makes no difference). It is started when it is first
needed, serves all requests, and is restarted after it was ended. Every failure there becomes a `Failed` here.
"""

import atexit
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

from codyra_llm.core import foreign_worker

START = 120  # seconds of wall time until the first answer, including imports from a slow disk
SILENCE = 60  # seconds of wall time between two answers, in case the limit on CPU time fails
MOST = 1_000_000  # characters that a template may write for an example of a data set
FREE, TIMES = 100_000, 8  # for a chat: FREE characters plus TIMES its own length


class Failed(Exception):
    """Foreign code failed on item `number`: `reason`, a clause without a full stop. `stopped`: it was ended
    at a limit, and would be again, so don't try it on other items."""

    def __init__(self, reason: str, stopped: bool, number: int = 0):
        super().__init__(reason)
        self.reason, self.stopped, self.number = reason, stopped, number


def write_chats(shared: dict[str, Any], chats: Sequence[list[dict]]) -> list[str]:
    """Chats written by the template in `shared` (the arguments of transformers' `render_jinja_template`).
    Raises Failed at the first chat that fails."""
    items = [(chat, FREE + TIMES * _characters(chat)) for chat in chats]
    return _worker.ask("chat", shared, items)


def write_document(template: str, fields: dict[str, Any]) -> str:
    """An example of a data set as a template of lm-evaluation-harness writes it. Raises Failed."""
    return _worker.ask("document", (template, MOST), [fields])[0]


def filtered(name: str, settings: dict[str, Any], items: Sequence[tuple[Sequence[str], dict]]) -> list[str]:
    """What a filter of lm-evaluation-harness makes of each item, (responses to one example, the example's
    fields): a JSON text per item. Raises Failed."""
    return _worker.ask("filter", (name, settings), items)


def without(patterns: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The texts without what the patterns match, applied one after the other: a JSON text per text. Raises
    Failed."""
    return _worker.ask("without", list(patterns), texts)


def matches(pattern: str, names: Sequence[str]) -> int:
    """How many names a pattern matches from end to end. Raises Failed."""
    return int(_worker.ask("match", pattern, [list(names)])[0])


def _characters(chat: list[dict]) -> int:
    return sum(len(value) for message in chat for value in message.values() if isinstance(value, str))


class _Worker:
    """The worker process. After a fork each process has its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner = 0  # the id of the process that started `process`
        self.waits = START  # seconds to wait for the next answer
        self.process: subprocess.Popen[bytes] | None = None
        self.unread = bytearray()
        self.stopped: dict[bytes, str] = {}  # by code, why it was stopped; it is not run again

    def ask(self, kind: str, shared: Any, items: Sequence[Any]) -> list[str]:
        """The answers to all items, in order. Raises Failed at the first item that fails."""
        if not items:
            return []
        code = pickle.dumps((kind, shared))
        with self.lock:
            if code in self.stopped:
                raise Failed(self.stopped[code], True)
            self._start()
            self._send(pickle.dumps((code, list(items))))
            answers, how, text = [], foreign_worker.FINE, ""
            for _ in items:
                how, text = self._receive()
                if how != foreign_worker.FINE:
                    break
                answers.append(text)
            if how == foreign_worker.STOPPED:
                self.stopped[code] = text
        if how != foreign_worker.FINE:
            raise Failed(text, how == foreign_worker.STOPPED, len(answers))
        return answers

    def _start(self) -> None:
        if self.process and self.owner == os.getpid() and self.process.poll() is None:
            return
        path = [place for place in sys.path if place]
        self.process = subprocess.Popen(
            [sys.executable, "-P", foreign_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        )
        if self.owner != os.getpid():
            atexit.register(self.close)
        self.owner, self.waits, self.unread = os.getpid(), START, bytearray()

    def _send(self, request: bytes) -> None:
        with suppress(BrokenPipeError):  # the worker has ended; `_receive` reports why
            requests, _ = _pipes(self.process)
            requests.write(len(request).to_bytes(8) + request)
            requests.flush()

    def _receive(self) -> tuple[bytes, str]:
        """How the next item went, and its text or what is wrong."""
        try:
            head = self._read(9)
            text = self._read(int.from_bytes(head[1:])).decode("utf-8")
        except EOFError:
            return foreign_worker.STOPPED, self._ended()
        except TimeoutError:
            self.close()
            return foreign_worker.STOPPED, f"nothing came of it in {self.waits:g} s"
        self.waits = SILENCE
        return head[:1], text

    def _read(self, size: int) -> bytes:
        stream = _pipes(self.process)[1].fileno()
        poll = select.poll()
        poll.register(stream, select.POLLIN)
        while len(self.unread) < size:
            if not poll.poll(1000 * self.waits):
                raise TimeoutError
            part = os.read(stream, 1 << 16)
            if not part:
                raise EOFError
            self.unread += part
        found = bytes(self.unread[:size])
        del self.unread[:size]
        return found

    def _ended(self) -> str:
        assert self.process
        code = self.process.wait()
        self.close()
        if code == -signal.SIGPROF:
            each = f"{1000 * foreign_worker.EACH:g} ms each for many texts"
            return f"it takes more than {foreign_worker.SECONDS} s of computing for one text, or {each}"
        return f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

    def close(self) -> None:
        """End the other process, if it is this one's."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        process.wait()
        requests, answers = _pipes(process)
        answers.close()
        with suppress(BrokenPipeError):  # the worker can't take the rest of the buffer any more
            requests.close()


def _pipes(process: subprocess.Popen[bytes] | None) -> tuple[IO[bytes], IO[bytes]]:
    """What a running process reads from, and what it writes to."""
    assert process and process.stdin and process.stdout
    return process.stdin, process.stdout


_worker = _Worker()

"""The process that runs templates and patterns which others wrote. It is started as a file of its own, and
imports nothing of the package: only the standard library, jinja2, and what a request asks for.

It reads requests from standard input: 8 bytes of length, then a pickle of (code, items), where `code` is a
pickle of (kind, shared); after the last one standard input ends, and so does it. For each item, up to the
first that goes wrong, it writes an answer to standard output: a byte that says how it went, 8 bytes of
length, UTF-8. `core/foreign.py` is the other side.
"""

import json
import os
import pickle
import re
import resource
import signal
import sys
import time
from functools import cache
from typing import Any, BinaryIO

SECONDS = 2  # of CPU time for one item; normal ones take a thousandth
EACH = 0.02  # seconds of CPU time per item, averaged over many
MEMORY = 1 << 29  # bytes in addition to what the process holds after its imports
FINE, REFUSED, STOPPED = b"f", b"r", b"s"

Answer = tuple[bytes, str]


def main() -> None:
    """Answer requests from standard input until it ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not pass for an answer
    # A launcher or Ctrl-C tells the whole group to stop; the process that asks decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # The kernel ends the process when the timer runs out, whatever function it is in.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    budgets: dict[bytes, CpuBudget] = {}
    while size := requests.read(8):
        code, items = pickle.loads(requests.read(int.from_bytes(size)))
        kind, shared = pickle.loads(code)
        answer_one = KINDS[kind]()
        _limit_memory()
        budget = budgets.setdefault(code, CpuBudget())
        for item in items:
            with budget:
                answer = _answered(answer_one, shared, item)
            _write(answers, *answer)
            if answer[0] != FINE:
                break


class CpuBudget:
    """The CPU time that one template or pattern may take: `SECONDS` for one item, and `EACH` per item on
    average, so that many items that are each just fast enough are ended as well."""

    def __init__(self) -> None:
        self.left = float(SECONDS)

    def __enter__(self) -> None:
        self.left = min(self.left + EACH, SECONDS)
        self.before = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, self.left)

    def __exit__(self, *raised: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.left = max(self.left - (time.process_time() - self.before), 0.0)


def _limit_memory() -> None:
    """Limit address space, so that a huge allocation is refused before any of it is used."""
    try:
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no /proc, as on macOS, which does not enforce the limit either
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = held + MEMORY
    if hard == resource.RLIM_INFINITY or wanted <= hard:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _answered(answer_one: Any, shared: Any, item: Any) -> Answer:
    try:
        return answer_one(shared, item)
    except MemoryError:
        return STOPPED, f"it asks for more than {MEMORY >> 20} MB of memory"
    except RecursionError:
        return STOPPED, "it calls itself without end"
    except Exception as error:  # whatever the foreign code raises; the caller gets it as text
        said = " ".join(str(error)[:1000].split())
        return REFUSED, said[:300] or type(error).__name__


def _write(answers: BinaryIO, how: bytes, text: str) -> None:
    data = text.encode("utf-8", "replace")
    answers.write(how + len(data).to_bytes(8) + data)
    answers.flush()  # the next item may be the end of this process


def _measured(text: str, most: int) -> Answer:
    if len(text) > most:
        return STOPPED, f"it writes {len(text):,d} characters, expected at most {most:,d}"
    found = re.search("[\ud800-\udfff]", text)
    if found:
        return REFUSED, f"it writes half of a surrogate pair, {found[0]!a}"
    return FINE, text


def _chats() -> Any:
    """Chats by a model's chat template, as transformers' apply_chat_template writes them. Shared: the
    arguments of its renderer. Item: (messages, most characters)."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def one(shared: dict[str, Any], item: tuple[list[dict], int]) -> Answer:
        messages, most = item
        (text,), _ = render_jinja_template(conversations=[messages], **shared)
        return _measured(text, most)

    return one


def _documents() -> Any:
    """Examples by a template of lm-evaluation-harness, in a sandbox. Shared: (template, most characters).
    Item: the example's fields."""

    def one(shared: tuple[str, int], item: dict[str, Any]) -> Answer:
        template, most = shared
        return _measured(_compiled(template).render(**item), most)

    return one


@cache
def _environment() -> Any:
    """As lm_eval.utils.env, which has no sandbox."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, new, count=0: re.sub(
        pattern, new, text, count=count
    )
    return environment


@cache
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


def _filters() -> Any:
    """Responses by a filter of lm-evaluation-harness. Shared: (its name, its settings). Item: (responses to
    one example, its fields). The answer is JSON."""
    from lm_eval import filters

    def one(shared: tuple[str, dict[str, Any]], item: tuple[list[str], dict[str, Any]]) -> Answer:
        name, settings = shared
        responses, fields = item
        (found,) = filters.get_filter(name)(**settings).apply([responses], [fields])
        return FINE, json.dumps(list(found))

    return one


def _without() -> Any:
    """Texts without what matches. Shared: patterns, in order. Item: a text."""

    def one(shared: list[str], item: str) -> Answer:
        for pattern in shared:
            item = re.sub(pattern, "", item)
        return FINE, json.dumps(item)

    return one


def _matching() -> Any:
    """Which names a pattern matches from end to end. Shared: the pattern. Item: the names. The answer is
    their number."""

    def one(shared: str, item: list[str]) -> Answer:
        matched = [name for name in item if re.fullmatch(shared, name)]
        return FINE, str(len(matched))

    return one


KINDS = {
    "chat": cache(_chats),
    "document": cache(_documents),
    "filter": cache(_filters),
    "without": cache(_without),
    "match": cache(_matching),
}

if __name__ == "__main__":
    main()

"""Work on many rows, divided among the cores."""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, count, islice
from multiprocessing import get_context
from typing import TypeVar

Row = TypeVar("Row")
Found = TypeVar("Found")

AT_ONCE = 1000  # rows; reading and sending them takes a twentieth of what SARI takes


def over_cores(work: Callable[[int, list[Row]], Found], rows: Iterable[Row]) -> Iterator[Found]:
    """`work(number of the first row, rows)` of every portion of the rows, in order: in forked processes where
    there are several cores and more than one portion, in this process otherwise. pickle must be able to find
    `work` by its name. Rows are read only as the processes need them, so memory use stays flat."""
    portions = _numbered(rows)
    first_two = list(islice(portions, 2))
    processes = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # forking is safe there alone
    if len(first_two) < 2 or processes == 1:
        for portion in chain(first_two, portions):
            yield work(*portion)
        return
    # Ctrl-C reaches the workers as well; this process alone acts on it.
    pool = ProcessPoolExecutor(
        processes,
        mp_context=get_context("fork"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    waiting: deque[Future[Found]] = deque()
    try:
        for portion in chain(first_two, portions):
            waiting.append(pool.submit(work, *portion))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Portions of the rows, each with the number of its first."""
    left = iter(rows)
    for number in count():
        portion = list(islice(left, AT_ONCE))
        if not portion:
            return
        yield number * AT_ONCE, portion

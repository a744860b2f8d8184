"""Work divided among the cores: the same results in the same order, from as few rows as are needed next."""

import os

import pytest

from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.metrics import many


def doubled(first, rows):
    return first, os.getpid(), [2 * row for row in rows]


@pytest.fixture
def cores(monkeypatch):
    """A function that makes a machine of so many cores."""

    def made(count):
        monkeypatch.setattr(many.os, "sched_getaffinity", lambda _: set(range(count)))

    return made


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 1000, 1001, 7500])
def test_results_are_in_order(cores, processes, count):
    cores(processes)
    found = list(many.over_cores(doubled, iter(range(count))))
    assert [row for _, _, rows in found for row in rows] == list(range(0, 2 * count, 2))
    assert [first for first, _, _ in found] == list(range(0, count, many.AT_ONCE))
    here = {pid for _, pid, _ in found} <= {os.getpid()}
    assert here == (processes == 1 or count <= many.AT_ONCE)


def test_rows_are_read_as_they_are_needed(cores):
    cores(2)
    read = []
    results = many.over_cores(doubled, (read.append(row) or row for row in range(100_000)))
    next(results)
    assert len(read) <= 6 * many.AT_ONCE
    results.close()


def test_a_fault_in_reading_ends_the_processes(cores):
    cores(2)

    def rows():
        yield from range(9000)
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        list(many.over_cores(doubled, rows()))


def test_scores_of_many_files_are_those_of_one_process(cores):
    benchmark = load_benchmark("trace")
    rows = [(f"Satz {i} ist lang.", f"Satz {i % 7} kurz", f"Satz {i % 3} ist kurz") for i in range(2500)]
    cores(1)
    alone = benchmark.score_each("20Minuten", rows)
    cores(2)
    assert benchmark.score_each("20Minuten", rows) == alone
    assert benchmark.score("20Minuten", *zip(*rows, strict=True)) == {
        name: list(scores) for name, scores in alone.items()
    }

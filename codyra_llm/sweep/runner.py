"""Starts the runs of a sweep, each in its own process, one per GPU at the same time unless asked otherwise.

A finished run is not run again, so the same command resumes a sweep that stopped.
"""

import fcntl
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from codyra_llm.config import plugins
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import write_json
from codyra_llm.core.parsing import shown
from codyra_llm.runtime import signals
from codyra_llm.sweep.spec import Run, Sweep, finished

log = logging.getLogger(__name__)


class Failed(Fault):
    """Runs that failed, after all others have ended."""


def execute(sweep: Sweep, jobs: int | None, launcher: str | None, done: Callable[[], object]) -> None:
    """Run what is not finished, all tries first; `done()` after each run of the grid. Raises `Failed` with
    all runs that failed, and before anything runs one Fault with what is wrong."""
    if launcher and jobs:
        raise Fault("--jobs: under --launcher runs go one after the other; leave one of the two out")
    try:
        shlex.split(launcher or "")
    except ValueError as error:
        raise Fault(
            f"--launcher: {shown(launcher)} is not a command ({error}); give one as you would to a shell"
        ) from None
    sweep.prepare()  # before the output is made
    with _held(sweep.output) as lock:
        _run(sweep.tries, _places(jobs, launcher), launcher, lock, lambda: None)
        # The grid's runs are made only now, since the tries choose their settings.
        _run(sweep.runs(), _places(jobs, launcher), launcher, lock, done)


@contextmanager
def _held(output: Path) -> Iterator[int]:
    """Lock the output for one sweep at a time. Runs inherit the lock, so runs that outlive a killed sweep
    still hold it."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fault(
                f"output: another sweep, or a run that it left, is at work in {output}; wait for its end, or "
                "look at what is finished with --report"
            ) from None
        yield file.fileno()


def _run(
    runs: list[Run], places: list[dict], launcher: str | None, lock: int, done: Callable[[], object]
) -> None:
    """Start the unfinished runs, as many at a time as there are places. Raises `Failed` with a sentence for
    each that failed. All runs are ended when the sweep is interrupted or asked to stop."""
    there = {run.recipe.output for run in finished(runs)}
    pending = [run for run in runs if run.recipe.output not in there]
    running, faults = [], []
    if there:
        log.info("%d of %d runs are there already", len(there), len(runs))
    try:
        while pending or running:
            while pending and places:
                run, place = pending.pop(0), places.pop(0)
                running.append((run, place, _launch(run, place, launcher, lock)))
            time.sleep(0.1)
            signals.check()
            for run, place, process in list(running):
                if process.poll() is None:
                    continue
                running.remove((run, place, process))
                places.append(place)
                if process.returncode:
                    faults.append(
                        f"{run.folder.path} failed (exit code {process.returncode}); see "
                        f"{run.file('log')}, then run the sweep again"
                    )
                log.info("%s: %s", run.folder.path, "failed" if process.returncode else "done")
                done()
    finally:
        for _, _, process in running:
            process.terminate()
        for _, _, process in running:
            process.wait()
    if faults:
        raise Failed(*faults)


def _places(jobs: int | None, launcher: str | None) -> list[dict[str, str]]:
    """For each run that may go at the same time, the environment variables that give it its share of the
    cores and, where there are any, a GPU."""
    if launcher:
        return [{}]
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = [given[i] if given != [""] else str(i) for i in range(torch.cuda.device_count())]
    jobs = jobs or max(len(gpus), 1)
    threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    places = []
    for i in range(jobs):
        place = {"OMP_NUM_THREADS": threads}
        if gpus:
            place["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
        places.append(place)
    return places


def _launch(run: Run, place: dict[str, str], launcher: str | None, lock: int) -> subprocess.Popen:
    """Start one run in its own process; what it prints goes to a file next to its folder."""
    write_json(run.file("json"), run.recipe.model_dump(mode="json"))
    start = shlex.split(launcher) if launcher else [sys.executable]
    with open(run.file("log"), "a", encoding="utf-8") as output:
        return subprocess.Popen(
            [*start, "-m", "codyra_llm", "run", str(run.file("json")), *_plugins()],
            stdout=output,
            stderr=output,
            env={**os.environ, **place},
            pass_fds=(lock,),
        )


def _plugins() -> list[str]:
    """Command-line options that load into a run the plug-ins that are loaded in this process."""
    return [word for file in plugins.files() for word in ("--plugin", file)]

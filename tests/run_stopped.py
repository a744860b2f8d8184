"""Run a recipe, the first process asked to stop after a step: `run_stopped.py TASK STEP run RECIPE
[KEY=VALUE ...]`. With `kill` before TASK the last process is killed there instead, without a word, as soon as
its sign of life has said where; with `wait` nothing stops there, but the first process takes a minute."""

import os
import signal
import sys
import time

from codyra_llm.cli import main
from codyra_llm.runtime import heartbeat, signals
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import LogRow


def ask_at(task: str, step: int) -> None:
    """From here on this process is asked to stop after that step."""
    log = RunFolder.log

    def asking(folder: RunFolder, row: LogRow) -> None:
        log(folder, row)
        if (row.task, row.step) == (task, step):
            signals.ask("a test")

    RunFolder.log = asking


def ask_within(function: str) -> None:
    """From here on this process is asked to stop where the function of that name looks whether it was."""
    check = signals.check

    def asking() -> None:
        if sys._getframe(1).f_code.co_name == function:
            signals.ask("a test")
        check()

    signals.check = asking


def wait_at(task: str, step: int) -> None:
    """From here on that step takes a minute."""
    log = RunFolder.log

    def waiting(folder: RunFolder, row: LogRow) -> None:
        log(folder, row)
        if (row.task, row.step) == (task, step):
            time.sleep(60)

    RunFolder.log = waiting


def die_at(task: str, step: int) -> None:
    """From here on this process, if it is the last of its launch, is killed at that step."""
    at = heartbeat.at
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def dying(place: str) -> None:
        at(place)
        if last and place == f"task {task}, step {step}":
            told = heartbeat._watch.own.beats
            # The sign on its way at this moment may be of the place before.
            while heartbeat._watch.own.beats < told + 2:
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

    heartbeat.at = dying


def run(words: list[str]) -> None:
    """What this file does as a program."""
    kinds = {"kill": die_at, "wait": wait_at}
    at = kinds.get(words[0], ask_at)
    task, step, *command = words[1:] if words[0] in kinds else words
    at(task, int(step))
    main(command)


if __name__ == "__main__":
    run(sys.argv[1:])

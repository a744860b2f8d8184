"""Run a recipe, the first process asked to stop behind a step: `run_stopped.py TASK STEP run RECIPE
[KEY=VALUE ...]`. With `kill` before TASK the last process is killed there instead, without a word, as soon as
its sign of life has said where."""

import os
import signal
import sys
import time

from codyra_llm.cli import main
from codyra_llm.runtime import heartbeat, signals
from codyra_llm.store.folder import RunFolder

log, at = RunFolder.log, heartbeat.at
dies = sys.argv[1] == "kill"
task, step, *command = sys.argv[1 + dies :]


def asking(folder: RunFolder, row: dict) -> None:
    log(folder, row)
    if not dies and (row["task"], row["step"]) == (task, int(step)):
        signals.ask("a test")


def dying(place: str) -> None:
    at(place)
    if (
        dies
        and place == f"task {task}, step {step}"
        and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    ):
        told = heartbeat._watch.own.beats
        while (
            heartbeat._watch.own.beats < told + 2
        ):  # the sign on its way at this moment may be of the place before
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)


RunFolder.log, heartbeat.at = asking, dying
main(command)

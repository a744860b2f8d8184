"""Run a recipe, the first process asked to stop behind a step: `run_stopped.py TASK STEP run RECIPE [KEY=VALUE ...]`. With
`kill` before TASK the last process is killed there instead, without a word."""

import os
import signal
import sys

from codyra_llm import stop, watch
from codyra_llm.cli import main
from codyra_llm.folder import RunFolder

log, at = RunFolder.log, watch.at
dies = sys.argv[1] == "kill"
task, step, *command = sys.argv[1 + dies:]


def asking(folder: RunFolder, row: dict) -> None:
    log(folder, row)
    if not dies and (row["task"], row["step"]) == (task, int(step)):
        stop.ask("a test")


def dying(place: str) -> None:
    at(place)
    if dies and place == f"task {task}, step {step}" and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        os.kill(os.getpid(), signal.SIGKILL)


RunFolder.log, watch.at = asking, dying
main(command)

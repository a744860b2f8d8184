"""Run every recipe file given, one after the other: what the two-process tests start once for all methods.

The second process is late whenever it looks into the run folder: what it sees there must decide nothing.
"""

import os
import sys
import time

from codyra_llm.config.recipe import load_recipe
from codyra_llm.experiment.run import run
from codyra_llm.runtime import launch
from codyra_llm.store.folder import RunFolder

punctual = RunFolder.archive


def late(folder: RunFolder):
    time.sleep(0.02 * int(os.environ["RANK"]))
    return punctual(folder)


RunFolder.archive = late
for file in sys.argv[1:]:
    run(load_recipe(file))
launch.leave()

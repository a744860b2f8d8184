"""Run a recipe file, the second process with other overrides: `run_apart.py RECIPE FOLDER KEY=VALUE ...`.
Each process writes the fault that it got to FOLDER/<rank>; a process that loads weights leaves no file."""

import os
import sys
from pathlib import Path

from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment.run import run
from codyra_llm.models import loading
from codyra_llm.runtime import launch

loading.load = lambda *arguments: sys.exit("weights were loaded")
file, folder, *others = sys.argv[1:]
rank = os.environ["RANK"]
try:
    run(load_recipe(file, others if rank == "1" else []))
except Fault as fault:
    Path(folder, rank).write_text(str(fault), encoding="utf-8")
launch.leave()

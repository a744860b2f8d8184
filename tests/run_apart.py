"""Run a recipe file, the second process with other overrides: `run_apart.py RECIPE FOLDER KEY=VALUE ...`. Each process
writes the fault that it got to FOLDER/<rank>; a process that loads weights leaves no file."""

import os
import sys
from pathlib import Path

from codyra_llm import distributed, models
from codyra_llm import recipe as recipes
from codyra_llm.errors import Fault
from codyra_llm.run import run

models.load = lambda *arguments: sys.exit("weights were loaded")
file, folder, *others = sys.argv[1:]
rank = os.environ["RANK"]
try:
    run(recipes.load(file, others if rank == "1" else []))
except Fault as fault:
    Path(folder, rank).write_text(str(fault), encoding="utf-8")
distributed.leave()

"""Run every recipe file given, one after the other: what the two-process tests start once for all methods."""

import sys

from accelerate.state import PartialState

from codyra_llm import recipe as recipes
from codyra_llm.run import run

for file in sys.argv[1:]:
    run(recipes.load(file))
PartialState().destroy_process_group()

"""The judge of open-ended answers: an extra that no other package imports. A run loads it by its name, where
the recipe names an endpoint (`codyra_llm/experiment/open_ended.py`)."""

from codyra_llm.evaluate.judging.client import require as require
from codyra_llm.evaluate.judging.settle import settle as settle

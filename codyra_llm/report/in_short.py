"""The last lines of a run on mini-TRACE: what it learnt, forgot and kept, next to plain sequential LoRA."""

from pathlib import Path

import yaml
from rich.box import SIMPLE
from rich.table import Column, Table

from codyra_llm.benchmarks import trace  # pyright: ignore  # installed from the top level
from codyra_llm.config.recipe import Recipe
from codyra_llm.evaluate.statistics import measures

REFERENCE = Path(trace.__file__).parent / "mini" / "reference.yaml"
MEASURED = ("learnt", "op", "forgetting")


def in_short(recipe: Recipe, found: dict) -> Table | None:
    """The run with this summary next to the reference on the same data and base; None where the two can't be
    compared."""
    reference = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))
    own = {name: value for name, value in measures(found).items() if value is not None}
    change = found["delta_r"]
    if not _comparable(recipe) or recipe.method.name == reference["method"]:
        return None
    if change is None or not own.keys() >= set(MEASURED):
        return None
    out = Table(
        Column("", no_wrap=True),
        *(Column(name, justify="right") for name in ("just learnt", "at the end", "forgotten", "general")),
        box=SIMPLE,
        padding=0,
        collapse_padding=True,
        title="mean scores of the tasks, and the change of general ability",
        caption=f"to see it: codyra-llm run quickstart {reference['command']}",
        caption_justify="left",
    )
    rows = {recipe.method.name: own | {"general": change["value"]}, reference["name"]: reference}
    for name, row in rows.items():
        out.add_row(name, *(f"{row[measure]:z.1f}" for measure in MEASURED), f"{row['general']:+z.1f}")
    return out


def _comparable(recipe: Recipe) -> bool:
    """Whether a run learnt and answered all that the reference did."""
    everything = not (recipe.data.max_train_examples or recipe.eval.max_examples)
    places = (recipe.model.path, recipe.data.root, recipe.general.data)
    whole = len(recipe.tasks) == len(recipe.benchmark.tasks) and recipe.eval.split == "test"
    return everything and whole and places == ("mini", "mini", "mini")

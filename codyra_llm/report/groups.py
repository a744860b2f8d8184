"""Runs that differ in seed and output alone, grouped, with names that say in what groups differ."""

from dataclasses import dataclass
from statistics import stdev

from codyra_llm.config.differences import NO_RESULT, differences, flat
from codyra_llm.config.recipe import Recipe
from codyra_llm.core.errors import Fault
from codyra_llm.evaluate.statistics import interval
from codyra_llm.report.grid import Cell
from codyra_llm.store.folder import RunFolder


@dataclass(frozen=True)
class Run:
    """A run with its summary and its measures (those of compare.MEASURES)."""

    folder: RunFolder
    summary: dict
    measures: dict[str, float | None]

    @property
    def recipe(self) -> Recipe:
        return self.folder.recipe


def grouped(runs: list[Run]) -> list[list[Run]]:
    """Runs of the same recipe, but for the seed and settings that change no result. Raises Fault where a seed
    is there
    twice: it would count as two and make the spread too small."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((g for g in groups if _same(g[0].recipe, run.recipe)), None)
        if group is None:
            groups.append(group := [])
        if twin := next((other for other in group if other.recipe.seed == run.recipe.seed), None):
            raise Fault(
                f"{run.folder.path} and {twin.folder.path} have the same recipe and seed {run.recipe.seed}; "
                f"give one of them"
            )
        group.append(run)
    return groups


def _same(one: Recipe, other: Recipe) -> bool:
    return one.tasks == other.tasks and not differences(one, other.model_copy(update={"seed": one.seed}))


def labels(recipes: list[Recipe]) -> list[str]:
    """For each its method and the settings that the first recipe has otherwise; for settings of the method
    itself, the first recipe of that method."""
    known, out = [_distinguishing(recipe) for recipe in recipes], []
    for recipe, own in zip(recipes, known, strict=True):
        first = next(
            k for k, other in zip(known, recipes, strict=True) if other.method.name == recipe.method.name
        )
        changed = [
            _setting(key, value, recipe)
            for key, value in own.items()
            if value != (first if key.startswith("method.") else known[0]).get(key)
        ]
        out.append(" ".join([recipe.method.name, *changed]))
    return out


def _distinguishing(recipe: Recipe) -> dict:
    by_task = ("data.epochs.", "eval.max_new_tokens.")  # they differ with the order
    known = {
        key: value
        for key, value in flat(recipe.model_dump(mode="json")).items()
        if key not in ("seed", *NO_RESULT, "method.name") and not key.startswith(by_task)
    }
    return known | {"data.tasks": recipe.tasks}


def _setting(key: str, value: object, recipe: Recipe) -> str:
    if key == "data.tasks" and isinstance(value, list):
        try:
            orders = recipe.benchmark.orders
        except Fault:  # its folder is gone, and the names will do
            orders = {}
        order = next((number for number, tasks in orders.items() if list(tasks) == value), None)
        return f"order {order}" if order else "tasks " + ",".join(value)
    return f"{key.rpartition('.')[2]}={value}"


def over(values: list[float | None], form: str = ".1f", heat: float | None = None) -> Cell | None:
    """Mean, interval and standard deviation over seeds; None where a run lacks the number."""
    found = interval(values, None)
    if found is None:
        return None
    known = [value for value in values if value is not None]  # all, where there is an interval
    half = "" if found["low"] is None else f" ± {found['high'] - found['mean']:.1f}"
    return Cell(
        found["mean"],
        f"{found['mean']:{form}}{half}",
        found["low"],
        found["high"],
        small=f"sd {stdev(known):.1f}" if half else "",
        heat=heat,
    )

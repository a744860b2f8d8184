"""Groups of runs that differ only in seed and output, or also in the order of tasks, with names that say how
the groups differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import NamedTuple

from codyra_llm.config.differences import NO_RESULT, differences, flat
from codyra_llm.config.recipe import Recipe
from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import read_mapping
from codyra_llm.evaluate.statistics import interval
from codyra_llm.report.grid import Cell, Provenance
from codyra_llm.store.folder import RunFolder

Basis = dict[str, object]  # by name, what runs must share
# Keys of a manifest that hold hashes and versions.
CONTENT = ("base", "tokenizer", "data", "method_data", "metrics")
OF_GENERAL = ("general", "delta_r")  # the measures that have a basis of their own
LOAD = "where other jobs shared the machine it says little of the method"  # of seconds by the clock
POOLED = ("seed", "data.tasks")  # the keys of a sweep's grid that a mean may be taken over


class Member(NamedTuple):
    """A run folder. For a run of a sweep also its arm, and its point's settings but for seed and order."""

    folder: RunFolder
    arm: str = ""
    rest: str = ""


@dataclass(frozen=True)
class Run:
    """A run with its summary and its measures (those of statistics.MEASURES); of a sweep its arm, and the
    settings of its point but for seed and order."""

    folder: RunFolder
    summary: dict
    measures: dict[str, float | None]
    arm: str = ""
    rest: str = ""

    @property
    def recipe(self) -> Recipe:
        return self.folder.recipe

    @property
    def recorded(self) -> dict:
        """Its manifest; empty where there is none."""
        return self.folder.manifest if (self.folder.path / "manifest.json").is_file() else {}


def collected(paths: Sequence[Path]) -> list[Member]:
    """The runs in these folders. A sweep's folder means its finished runs, the baseline's first, without
    its tries. Raises Fault for a sweep that has none, and for results that were damaged since they were
    written."""
    found = []
    for path in {path.resolve(): path for path in paths}.values():
        found += _of_sweep(path) if is_sweep(path) else [Member(RunFolder(path))]
    for member in found:
        member.folder.check_results()
    return found


def is_sweep(path: Path) -> bool:
    """Whether a sweep's runs are in the folder."""
    return not (path / "recipe.json").is_file() and bool(_below(path))


def _below(path: Path) -> list[Path]:
    """The run folders two levels down, ARM/POINT. The exported stage inside a run looks like one, and is left
    out."""
    found = [file.parent for file in sorted(path.glob("*/*/recipe.json"))]
    return [run for run in found if not (run.parent / "recipe.json").is_file()]


def _of_sweep(path: Path) -> list[Member]:
    file = path / "sweep.json"
    written = read_mapping(file, "what the sweep wrote") if file.is_file() else {}
    arms = list(dict.fromkeys([written.get("baseline"), *(run["arm"] for run in written.get("runs", []))]))
    found = [
        Member(RunFolder(run), run.parent.name, _rest(run.name))
        for run in _below(path)
        if not run.name.startswith("try=")
    ]
    done = [member for member in found if member.folder.summary.get("tasks") == member.folder.recipe.tasks]
    if not done:
        raise Fault(f"{path}: no run of this sweep is finished; give it when one is, or go on with the sweep")
    return sorted(done, key=lambda member: arms.index(member.arm) if member.arm in arms else len(arms))


def _rest(point: str) -> str:
    """`optim.lr=0.1` of `seed=1,optim.lr=0.1,data.tasks=2`."""
    parts = [part for part in point.split(",") if part.partition("=")[0] not in POOLED]
    return "" if point == "run" else ", ".join(parts)


def grouped(runs: list[Run], over_orders: bool = False) -> list[list[Run]]:
    """Groups of runs whose recipes differ only in the seed and in settings that change no result, on the same
    base and data; with `over_orders` also in the order of the same tasks. Runs of a sweep are grouped by arm.
    Raises Fault where two runs of a group have the same seed and order: counting one run twice would make the
    spread too small."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((g for g in groups if _same(g[0], run, over_orders)), None)
        if group is None:
            group = []
            groups.append(group)
        twins = [other for other in group if pairing(other) == pairing(run)]
        if twins:
            raise Fault(
                f"{run.folder.path} and {twins[0].folder.path} have the same recipe and seed "
                f"{run.recipe.seed}; give one of them"
            )
        group.append(run)
    return groups


def pairing(run: Run, over_orders: bool = True) -> tuple:
    """What a run and one of the baseline must have in common to be compared as a pair: the seed and, in
    groups over several orders, the order."""
    return run.recipe.seed, *(run.recipe.tasks if over_orders else ())


def _same(one: Run, other: Run, over_orders: bool) -> bool:
    """Whether two runs belong to one group."""
    first, second = one.recipe, other.recipe
    orders = sorted(first.tasks) == sorted(second.tasks) if over_orders else first.tasks == second.tasks
    same_arm = (one.arm, one.rest) == (other.arm, other.rest)
    # Compare all settings but the seed and the order.
    data = second.data.model_copy(update={"tasks": first.data.tasks})
    adjusted = second.model_copy(update={"seed": first.seed, "data": data})
    return orders and same_arm and not differences(first, adjusted) and _same_content(one, other)


def _same_content(one: Run, other: Run) -> bool:
    """Whether what the recipes name by a path is the same: base, tokenizer, data and metrics, as far as both
    runs recorded it; and whether both were made with the same versions of plug-ins."""
    before, after = one.recorded, other.recorded
    same = all(before[key] == after[key] for key in CONTENT if key in before and key in after)
    return same and _versions(before) == _versions(after)


def _versions(manifest: dict) -> dict[str, str | None]:
    """The hash or version of each plug-in that a run was made with; where its file is does not matter."""
    origins = manifest.get("plugins", {})
    return {name: origin.get("sha256") or origin.get("version") for name, origin in origins.items()}


def names(groups: list[list[Run]], over_orders: bool = False) -> list[str]:
    """A name for each group: for a sweep its arm and point, else its method and the settings that distinguish
    it from the others."""
    found = labels([group[0].recipe for group in groups], over_orders)
    points = [(group[0].arm, group[0].rest) for group in groups]
    out = []
    for group, label, point in zip(groups, found, points, strict=True):
        order = f"order {order_of(group[0].recipe)}" if points.count(point) > 1 else ""
        out.append(" ".join(filter(None, (*point, order))) if group[0].arm else label)
    return out


def baseline_of(group: list[Run], groups: list[list[Run]], over_orders: bool = False) -> list[Run]:
    """The group that this one is compared with: the first one; in a sweep, the one of the first group's arm
    at the same point and in the same order (with `over_orders`, of the same tasks), [] if there is none."""
    first = groups[0]
    if not first[0].arm:
        return first
    for other in groups:
        at_point = (other[0].arm, other[0].rest) == (first[0].arm, group[0].rest)
        one, two = other[0].recipe.tasks, group[0].recipe.tasks
        if at_point and (one == two or (over_orders and sorted(one) == sorted(two))):
            return other
    return []


def provenance(group: list[Run]) -> Provenance:
    """Method, seeds and orders of a group."""
    seeds = dict.fromkeys(str(run.recipe.seed) for run in group)
    orders = dict.fromkeys(order_of(run.recipe) for run in group)
    return Provenance(group[0].recipe.method.name, " ".join(seeds), " ".join(orders))


def order_of(recipe: Recipe) -> str:
    """The number of the benchmark's order that the recipe follows, or its tasks."""
    try:
        orders = recipe.benchmark.orders
    except Fault:  # the benchmark's folder is gone, so name the tasks instead
        orders = {}
    numbers = [number for number, tasks in orders.items() if list(tasks) == recipe.tasks]
    return str(numbers[0]) if numbers else ",".join(recipe.tasks)


def labels(recipes: list[Recipe], over_orders: bool = False) -> list[str]:
    """A name for each recipe: its method and the settings in which it differs from the first recipe. Settings
    of the method itself are compared with the first recipe of that method."""
    known, out = [distinguishing(recipe, over_orders) for recipe in recipes], []
    first_of: dict[str, dict] = {}  # by method
    for recipe, own in zip(recipes, known, strict=True):
        first = first_of.setdefault(recipe.method.name, own)
        words = [recipe.method.name]
        for key, value in own.items():
            reference = first if key.startswith("method.") else known[0]
            if value != reference.get(key):
                words.append(_setting(key, value, recipe))
        out.append(" ".join(words))
    return out


def distinguishing(recipe: Recipe, over_orders: bool = False) -> dict:
    """The settings that may distinguish groups, by flat key."""
    by_task = ("data.epochs.", "eval.max_new_tokens.")  # they differ with the order
    known = {
        key: value
        for key, value in flat(recipe.model_dump(mode="json")).items()
        if key not in ("seed", *NO_RESULT, "method.name") and not key.startswith(by_task)
    }
    return known | {"data.tasks": sorted(recipe.tasks) if over_orders else recipe.tasks}


def _setting(key: str, value: object, recipe: Recipe) -> str:
    """A setting in a name: `rank=8`, or of the tasks `order 2`."""
    if key != "data.tasks":
        return f"{key.rpartition('.')[2]}={value}"
    order = order_of(recipe)
    return f"order {order}" if order.isdecimal() else f"tasks {order}"


def basis(recipe: Recipe, summary: dict) -> Basis:
    """What runs must share for their measures of the stream to mean the same. The order of the tasks, the
    base and all settings of training are not part of it, since these are what one compares."""
    seen = len(summary["matrix"]) or len(recipe.tasks)  # without training all tasks are scored
    metrics = dict(zip(summary["tasks"][:seen], summary.get("metrics", ()), strict=False))
    return {
        "tasks learnt": set(summary["tasks"][:seen]),
        "metrics": metrics,
        "split": recipe.eval.split,
        "examples scored": recipe.eval.max_examples,
    }


def general_basis(recipe: Recipe, summary: dict) -> Basis:
    """The same for general ability; empty where it was not measured."""
    if not summary["general"]:
        return {}
    questions = (recipe.general.data, recipe.general.limit, recipe.general.seed)
    return {"tasks of general ability": set(summary["general"]), "questions of general ability": questions}


def differing(bases: Sequence[Basis]) -> list[str]:
    """The names of the entries that are not the same in all bases, apart from empty bases."""
    known = [one for one in bases if one]
    names = []
    for name in known[0] if known else ():
        if any(one[name] != known[0][name] for one in known):
            names.append(name)
    return names


def said_of(names: list[str]) -> str:
    """A sentence on these entries, for runs whose bases differ in them."""
    return (
        f"Runs here differ in {', '.join(names)}. Scores that were measured in different ways can't be "
        "compared: no difference between such runs is given, and no best score is marked."
    )


def over(values: list[float | None], form: str = "z.1f", heat: float | None = None) -> Cell | None:
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

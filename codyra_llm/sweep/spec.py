"""The runs of a sweep file: every arm at every point of the grid, and the tries that choose each arm's
settings.
"""

import copy
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from codyra_llm.config import plugins
from codyra_llm.config.differences import differences, flat
from codyra_llm.config.overrides import assign, read_recipe, split_overrides
from codyra_llm.config.recipe import Recipe, parse_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.parsing import WrittenPath, read_yaml, shown
from codyra_llm.core.schema import Strict
from codyra_llm.experiment.preflight import lacking
from codyra_llm.experiment.setup import prepare
from codyra_llm.store.folder import RunFolder


def _without_output(settings: dict) -> dict:
    """The settings. Raises ValueError where they set the output."""
    if "output" in settings:
        raise ValueError(
            "every run has a folder of its own in the sweep's; give 'output' at the top of the file, or as "
            "output=FOLDER"
        )
    return settings


MOST = 10_000  # runs of a sweep
CHECKED_ALONE = (  # settings that are checked as they are read, without model and data
    "seed",
    "output",
    "optim.lr",
    "optim.betas",
    "optim.weight_decay",
    "optim.max_grad_norm",
)
OF_TRIES = {"eval.split": "eval"}  # settings chosen on test would be scored on the data that chose them
# An arm that sets nothing, which YAML reads as null, is the recipe itself.
Settings = Annotated[
    dict[str, Any],
    BeforeValidator(lambda given: {} if given is None else given),
    AfterValidator(_without_output),
]


class TuneSection(Strict, frozen=True):
    """Every arm gets the same number of tries; the grid is run with the settings of its best try."""

    set: Settings = Field(
        default={},
        description="settings of the tries alone, which override all others, e.g. a shorter stream; tries "
        "are scored on the eval splits unless `eval.split` says otherwise here",
    )
    by: Literal["op", "forgetting"] = Field(
        default="op", description="how the best try is chosen: the highest OP, or the lowest forgetting"
    )
    tries: dict[str, list[Settings]] = Field(description="for each arm, the settings of each try")


class SweepFile(Strict, frozen=True):
    """The keys of a sweep file."""

    recipe: str = Field(description="a recipe file, or the name of a shipped one")
    output: WrittenPath = Field(description="folder of all runs")
    set: Settings = Field(default={}, description="settings of all runs, which override the recipe's")
    arms: dict[str, Settings] = Field(
        min_length=1, description="for each arm, by name, the settings that override those"
    )
    grid: Annotated[dict[str, list], AfterValidator(_without_output)] = Field(
        default={"seed": [1, 2, 3]}, description="for each key, the values that every arm is run with"
    )
    baseline: str | None = Field(
        default=None, description="the arm that the others are compared with; default: the first"
    )
    tune: TuneSection | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "SweepFile":
        faults = [
            f"grid.{key}: {values} must hold at least one value, and each once"
            for key, values in self.grid.items()
            if not values or _repeats(values)
        ]
        faults += [
            f"arms: {name!r} becomes a folder; name it in letters, digits, '.', '_' and '-'"
            for name in self.arms
            if not re.fullmatch(r"\w[\w.-]*", name)
        ]
        runs = len(self.arms) * prod(map(len, self.grid.values()))
        if runs > MOST:
            faults.append(
                f"grid: it asks for {runs:,d} runs, at most {MOST:,d} are possible; give fewer values"
            )
        if self.baseline and self.baseline not in self.arms:
            faults.append(f"baseline: '{self.baseline}' is not an arm.{nearest(self.baseline, self.arms)}")
        tries = self.tune.tries if self.tune else {}
        faults += [
            f"tune.tries: '{name}' is not an arm.{nearest(name, self.arms)}"
            for name in tries
            if name not in self.arms
        ]
        counts = {name: len(settings) for name, settings in tries.items()}
        if len(set(counts.values())) > 1:
            has = ", ".join(f"{name} {count}" for name, count in counts.items())
            faults.append(f"tune.tries: every arm must have as many tries as the others, here it is {has}")
        if faults:
            raise ValueError("\n".join(faults))
        return self


def _repeats(values: list) -> bool:
    """Whether two values are equal, or have the same text, so that their runs would share a folder."""
    written = [str(value) for value in values]
    return any(value in values[:i] or written[i] in written[:i] for i, value in enumerate(values))


def _measures_forgetting(recipe: Recipe) -> bool:
    """Whether a run scores earlier tasks again after later ones."""
    method = METHODS[recipe.method.name]
    several = bool(method.trains) and not method.joint and len(recipe.tasks) > 1
    return several and (recipe.eval.when != "ends" or len(recipe.tasks) == 2)


@dataclass(frozen=True)
class Run:
    """One run: its arm, what distinguishes it from the arm's others, and its whole recipe."""

    arm: str
    settings: Settings
    recipe: Recipe

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.recipe.output))

    def file(self, kind: str) -> Path:
        """The file next to the run folder with the folder's name and suffix `kind`: json for its recipe, log
        for what it printed."""
        return self.folder.path.with_name(f"{self.folder.path.name}.{kind}")

    @property
    def finished(self) -> bool:
        """Whether its whole stream is done. Raises Fault where the folder belongs to another recipe, or was
        made with another version of a plug-in, whose scores the sweep would mix with those of this one."""
        if not (self.folder.path / "recipe.json").is_file():
            return False
        was, recipe = self.folder.recipe, self.recipe.resolved()
        faults = [
            f"{self.folder.path} was run with other settings: {line}; give the arm another name, or remove "
            "the folder"
            for line in differences(was, recipe)
        ]
        origins = self.folder.origins if (self.folder.path / "manifest.json").is_file() else {}
        changed = plugins.changed(origins, plugins.still(origins), str(self.folder.path))
        faults += [f"{line}, give the arm another name, or remove the folder" for line in changed]
        if faults:
            raise Fault(*faults)
        return (
            was.tasks == recipe.tasks
            and bool(self.folder.summary)
            and self.folder.summary["tasks"] == recipe.tasks
        )


def finished(runs: Sequence[Run]) -> list[Run]:
    """Those whose whole stream is done. Raises one Fault with every run whose folder is another recipe's."""
    done, faults = [], []
    for run in runs:
        try:
            if run.finished:
                done.append(run)
        except Fault as fault:
            faults += fault.messages
    if faults:
        raise Fault(*faults)
    return done


class Sweep:
    """The runs that a sweep file asks for. Raises one Fault with every mistake in every run's recipe."""

    def __init__(self, file: SweepFile, given: Collection[str] = ()):
        """`given`: the keys of `file.set` that come from the command."""
        self.file, self.output, self._raw = file, Path(file.output), read_recipe(file.recipe)
        self.baseline = file.baseline or next(iter(file.arms))
        tune = file.tune or TuneSection(tries={})
        self.by = tune.by
        self.tries = self._runs(
            [
                (arm, f"try={i}", settings, [OF_TRIES, settings, tune.set])
                for arm, tries in tune.tries.items()
                for i, settings in enumerate(tries, 1)
            ]
        )
        self._tries_of: dict[str, list[Run]] = {}
        for run in self.tries:
            self._tries_of.setdefault(run.arm, []).append(run)
        self._check(set(tune.tries), self.runs(), given)

    def runs(self) -> list[Run]:
        """Every arm at every point of the grid, with the settings that its tries, once finished, have
        chosen.
        """
        finished(self.tries)  # what is wrong with any arm's
        chosen = {arm: self.chosen(arm) for arm in self.file.arms}
        points = [
            dict(zip(self.file.grid, values, strict=True))
            for values in itertools.product(*self.file.grid.values())
        ]
        return self._runs(
            [
                (arm, _name(point, self.file.grid), point, [chosen[arm], point])
                for point in points
                for arm in self.file.arms
            ]
        )

    def chosen(self, arm: str) -> Settings:
        """The settings of the best try (of the first, if several are equal); empty without tries."""
        tries = finished(self._tries_of.get(arm, []))
        if not tries:
            return {}
        sign = -1 if self.by == "op" else 1
        return min(tries, key=lambda run: sign * run.folder.summary[self.by]).settings

    def _runs(self, wanted: list[tuple[str, str, Settings, list[Settings]]]) -> list[Run]:
        """From (arm, name of the folder, settings of the point, layers of settings, the last over the others)
        the runs. Raises one Fault with the mistakes in all of them."""
        runs: list[Run] = []
        # A mistake is often the same in most runs: keep it once, by its text without the run's name.
        faults: dict[str, str] = {}
        for arm, name, settings, layers in wanted:
            try:
                runs.append(Run(arm, settings, self._recipe(arm, name, layers)))
            except Fault as fault:
                for message in fault.messages:
                    faults.setdefault(message.removeprefix(f"{arm}/{name}: "), message)
        if faults:
            raise Fault(*faults.values())
        return runs

    def _recipe(self, arm: str, name: str, layers: list[Settings]) -> Recipe:
        """The sweep's recipe with the settings of all runs, of the arm and of the `layers` over it."""
        raw = copy.deepcopy(self._raw)
        settings = [item for layer in (self.file.set, self.file.arms[arm], *layers) for item in layer.items()]
        # `method` resets its section, so assign it first, whichever layer gives it; else a `method.rank` of
        # another layer would be lost.
        for key, value in sorted(settings, key=lambda item: item[0] != "method"):
            assign(raw, key, value)
        return parse_recipe(raw | {"output": str(self.output / arm / name)}, f"{arm}/{name}")

    def _check(self, tuned: set[str], runs: list[Run], given: Collection[str]) -> None:
        """Raises Fault where a setting of all runs reaches none, and where the tries are not fair: an arm has
        none or no forgetting to choose by, or they are scored on different splits."""
        faults = [*self._unheeded(given), *self._tried_in_vain()]
        trained = {run.arm for run in runs if METHODS[run.recipe.method.name].trains}
        untried = trained - tuned
        if tuned and untried:
            faults.append(
                f"tune.tries: {', '.join(sorted(untried))} would be compared without tries; give as many as "
                "to the others"
            )
        if len({run.recipe.eval.split for run in self.tries}) > 1:
            faults.append(
                "tune.tries: some are scored on the eval splits and some on test, which can't be compared; "
                "give eval.split in tune.set, for all of them"
            )
        unmeasured = {run.arm for run in self.tries if not _measures_forgetting(run.recipe)}
        if self.by == "forgetting" and unmeasured:
            faults.append(
                f"tune.by: {', '.join(sorted(unmeasured))} has no forgetting to choose by (one task, or "
                "not every task evaluated after every other); choose by op"
            )
        if faults:
            raise Fault(*faults)

    def _tried_in_vain(self) -> list[str]:
        """A sentence for each setting that the tries of an arm choose and the grid replaces in every run."""
        tries = self.file.tune.tries if self.file.tune else {}
        chosen = {arm: set().union(*of_arm) for arm, of_arm in tries.items()}
        faults = []
        for key, values in self.file.grid.items():
            arms = [arm for arm, keys in chosen.items() if key in keys]
            if arms:
                faults.append(
                    f"tune.tries: {', '.join(arms)} would choose {key}, which 'grid' sets in every run "
                    f"({values}); take it out of one of the two"
                )
        return faults

    def _unheeded(self, given: Collection[str]) -> list[str]:
        """A sentence for each setting of all runs that no run gets, since every arm or the grid sets another
        value. Settings in the file may be replaced by the file's own grid, but not by the default one; those
        that were `given` with the command may be replaced by neither, nor by the arms."""
        tune, grid = self.file.tune or TuneSection(tries={}), self.file.grid
        tries = [settings for of_arm in tune.tries.values() for settings in of_arm]
        default_grid = "grid" not in self.file.model_fields_set
        faults = []
        for key, value in self.file.set.items():
            in_arms = all(key in settings for settings in self.file.arms.values())
            in_tries = key in tune.set or all(key in settings for settings in tries)
            in_grid = key in grid and in_tries
            if (key in given and (in_arms or in_grid)) or (in_grid and default_grid):
                others = f"'grid' has {key}: {grid[key]}" if in_grid else f"all of 'arms' have a {key}"
                faults.append(
                    f"{key}: {shown(value)} is given for all runs, and none gets it, since {others}; change "
                    "that, or leave this out"
                )
        return faults

    def prepare(self) -> None:
        """Check, before the first run starts, what every run would check: once for those that differ in
        nothing but settings which are checked without the others, such as the seed. Raises one Fault with
        everything that is wrong."""
        faults, checked = {}, {}
        for run in (*self.runs(), *self.tries):
            settings = flat(run.recipe.model_dump(mode="json"))
            key = str([(name, value) for name, value in settings.items() if name not in CHECKED_ALONE])
            checked.setdefault(key, run)
        for run in checked.values():
            for message in _refused(run.recipe):
                faults.setdefault(message, f"{run.arm}: {message}")
        if faults:
            raise Fault(*faults.values())


def _refused(recipe: Recipe) -> list[str]:
    """What a run of the recipe would refuse on this machine, one sentence each."""
    try:
        setup = prepare(recipe)
    except Fault as fault:
        return fault.messages
    return lacking(setup, judges=bool(setup.prompts))


def load_sweep(path: str | Path, overrides: list[str] = ()) -> Sweep:
    """Read a sweep file; `output=` and other `key=value` apply to all runs unless an arm, a try or the grid
    sets them. Raises Fault with everything that is wrong."""
    given = dict(split_overrides(overrides))
    raw = read_yaml(Path(path), "a sweep file, as `codyra-llm sweep --help` shows one")
    raw |= {"output": given.pop("output")} if "output" in given else {}
    try:
        file = SweepFile.model_validate(raw)
    except Fault as fault:
        raise Fault(*(f"{path}: {line}" for line in fault.messages)) from None
    return Sweep(file.model_copy(update={"set": file.set | given}), given)


def _name(point: Settings, grid: dict[str, list]) -> str:
    """The name of a point's folder, `seed=1,data.tasks=2`. A value that is not a short plain word is named by
    its place in the grid's list: `data.tasks=#1`."""

    def word(key: str, value: Any) -> str:
        return str(value) if re.fullmatch(r"[\w.+-]{1,64}", str(value)) else f"#{grid[key].index(value) + 1}"

    return ",".join(f"{key}={word(key, value)}" for key, value in point.items()) or "run"

"""Many runs of one comparison: every arm × every point of the grid, each in a process of its own.

A run that is finished is not run again, so the same command goes on where a sweep stopped.
"""

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from rich.console import Console

from . import recipe as recipes
from .errors import Fault, nearest
from .files import write_json
from .folder import RunFolder, differences
from .methods import METHODS
from .methods.base import Strict
from .recipe import Recipe
from .setup import prepare

console = Console(highlight=False)
Settings = dict[str, Any]


class TuneSection(Strict):
    """Every arm gets the same number of tries; the grid is run with the settings of its best one."""

    set: Settings = Field({}, description="set in the tries alone, over all else, e.g. a shorter stream")
    by: Literal["op", "forgetting"] = Field("op", description="what chooses: the highest OP, or the lowest forgetting")
    tries: dict[str, list[Settings]] = Field(description="by arm, the settings of each try")


class SweepFile(Strict):
    recipe: str = Field(description="a recipe file, or the name of a shipped one")
    output: str = Field(description="folder of all runs")
    set: Settings = Field({}, description="set over the recipe in all runs")
    arms: dict[str, Settings] = Field(min_length=1, description="by name, what is set over that")
    grid: dict[str, list] = Field({"seed": [1, 2, 3]}, description="by key, the values that every arm is run with")
    baseline: str | None = Field(None, description="the arm that the others are compared with; default: the first")
    tune: TuneSection | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "SweepFile":
        faults = [f"grid.{key}: {values} must hold at least one value, and each once" for key, values in self.grid.items()
                  if not values or any(v in values[:i] for i, v in enumerate(values))]
        faults += [f"arms: '{name}' becomes a folder; name it in letters, digits, '.', '_' and '-'" for name in self.arms
                   if not re.fullmatch(r"\w[\w.-]*", name)]
        if self.baseline and self.baseline not in self.arms:
            faults.append(f"baseline: '{self.baseline}' is not an arm.{nearest(self.baseline, self.arms)}")
        tries = self.tune.tries if self.tune else {}
        faults += [f"tune.tries: '{name}' is not an arm.{nearest(name, self.arms)}" for name in tries if name not in self.arms]
        if len({len(settings) for settings in tries.values()}) > 1:
            faults.append("tune.tries: every arm must have as many tries as the others, here it is "
                          + ", ".join(f"{name} {len(settings)}" for name, settings in tries.items()))
        if faults:
            raise ValueError("\n".join(faults))
        return self


@dataclass(frozen=True)
class Run:
    """One run: its arm, what distinguishes it from the arm's others, and its whole recipe."""

    arm: str
    settings: Settings
    recipe: Recipe

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.recipe.output))

    def beside(self, kind: str) -> Path:
        return self.folder.path.with_name(f"{self.folder.path.name}.{kind}")

    @property
    def finished(self) -> bool:
        """Whether its whole stream is done. Raises Fault where the folder is another recipe's."""
        if not (self.folder.path / "recipe.json").is_file():
            return False
        was, recipe = self.folder.recipe, self.recipe.resolved()
        if other := differences(was, recipe):
            raise Fault(*(f"{self.folder.path} was run with other settings: {line}; give the arm another name, or remove "
                          f"the folder" for line in other))
        return was.tasks == recipe.tasks and bool(self.folder.summary) and self.folder.summary["tasks"] == recipe.tasks


class Sweep:
    """The runs that a sweep file asks for. Raises one Fault with every mistake in every run's recipe."""

    def __init__(self, file: SweepFile):
        self.file, self.output = file, Path(file.output)
        self.baseline = file.baseline or next(iter(file.arms))
        tune = file.tune or TuneSection(tries={})
        self.by = tune.by
        self.tries = self._runs([(arm, f"try={i}", settings, [settings, tune.set])
                                 for arm, tries in tune.tries.items() for i, settings in enumerate(tries, 1)])
        self._check(tuned=set(tune.tries))

    def runs(self) -> list[Run]:
        """Every arm at every point of the grid, with the settings that its tries, once finished, have chosen."""
        chosen = {arm: self.chosen(arm) for arm in self.file.arms}
        points = [dict(zip(self.file.grid, values)) for values in itertools.product(*self.file.grid.values())]
        return self._runs([(arm, _name(point, self.file.grid), point, [chosen[arm], point])
                           for point in points for arm in self.file.arms])

    def chosen(self, arm: str) -> Settings:
        """The settings of the best try, the first of equals; empty without tries."""
        tries = [run for run in self.tries if run.arm == arm and run.finished]
        sign = -1 if self.by == "op" else 1
        return min(tries, key=lambda run: sign * run.folder.summary[self.by]).settings if tries else {}

    def _runs(self, wanted: list[tuple[str, str, Settings, list[Settings]]]) -> list[Run]:
        runs, faults = [], []
        for arm, name, settings, layers in wanted:
            try:
                runs.append(Run(arm, settings, self._recipe(arm, name, layers)))
            except Fault as fault:
                faults += fault.messages
        if faults:
            raise Fault(*dict.fromkeys(faults))
        return runs

    def _recipe(self, arm: str, name: str, layers: list[Settings]) -> Recipe:
        raw = recipes.read(self.file.recipe)
        for layer in (self.file.set, self.file.arms[arm], *layers):
            for key in sorted(layer, key=lambda key: key != "method"):  # it starts its section afresh
                recipes.assign(raw, key, layer[key])
        return recipes.parse(raw | {"output": str(self.output / arm / name)}, f"{arm}/{name}")

    def _check(self, tuned: set[str]) -> None:
        """What a run would refuse, told before the first one: of each arm the first."""
        first, faults = {run.arm: run for run in reversed(self.runs())}, []
        untried = [arm for arm, run in first.items() if METHODS[run.recipe.method.name].trains and arm not in tuned]
        if tuned and untried:
            faults.append(f"tune.tries: {', '.join(sorted(untried))} would be compared without tries; give as many as to "
                          f"the others")
        for run in first.values():
            try:
                prepare(run.recipe)
            except Fault as fault:
                faults += [f"{run.arm}: {message}" for message in fault.messages]
        if faults:
            raise Fault(*faults)


def load(path: str | Path, overrides: list[str] = ()) -> Sweep:
    """Read a sweep file; `output=` and other `key=value` are set for all runs. Raises Fault with all that is wrong."""
    given = dict(recipes.split_overrides(overrides))
    try:
        file = SweepFile(**recipes.read_mapping(Path(path), "see `codyra-llm sweep --help`"))
    except ValidationError as error:
        raise Fault(*(f"{path}: {line}" for line in recipes.sentences(error, SweepFile))) from None
    output = given.pop("output", file.output)
    return Sweep(file.model_copy(update={"output": str(output), "set": file.set | given}))


def run(sweep: Sweep, jobs: int | None, launcher: str | None, done: Callable[[], None]) -> None:
    """Run what is not finished, all tries first; `done()` after each run of the grid. Raises one Fault with all runs
    that failed."""
    for runs, then in ((sweep.tries, lambda: None), (sweep.runs, done)):
        if faults := _execute(runs() if callable(runs) else runs, _places(jobs, launcher), launcher, then):
            raise Fault(*faults)


def _execute(runs: list[Run], places: SimpleQueue, launcher: str | None, done: Callable[[], None]) -> list[str]:
    """Run the unfinished ones, as many at a time as there are places; a sentence for each that failed."""
    pending, faults = [run for run in runs if not run.finished], []

    def one(run: Run) -> None:
        place = places.get()
        try:
            code = _launch(run, place, launcher)
        finally:
            places.put(place)
        if code:
            faults.append(f"{run.folder.path} failed (exit code {code}); see {run.beside('log')}, then run the sweep again")
        console.print(f"{run.folder.path}: {'failed' if code else 'done'}")
        done()

    if len(pending) < len(runs):
        console.print(f"{len(runs) - len(pending)} of {len(runs)} runs are there already")
    pool = ThreadPoolExecutor(places.qsize())
    try:
        list(pool.map(one, pending))
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt no other run starts
    return faults


def _places(jobs: int | None, launcher: str | None) -> SimpleQueue:
    """What each of the runs at the same time has of the machine, as environment: a GPU, or its share of the cores."""
    gpus, places = torch.cuda.device_count(), SimpleQueue()
    jobs = jobs or max(gpus, 1)
    threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    for i in range(1 if launcher else jobs):
        places.put({} if launcher else {"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus else {"OMP_NUM_THREADS": threads})
    return places


def _launch(run: Run, place: dict[str, str], launcher: str | None) -> int:
    """One run in a process of its own; what it prints goes to a file beside its folder."""
    write_json(run.beside("json"), run.recipe.model_dump(mode="json"))
    start = shlex.split(launcher) if launcher else [sys.executable]
    with open(run.beside("log"), "a", encoding="utf-8") as log:
        return subprocess.run([*start, "-m", "codyra_llm", "run", str(run.beside("json"))], stdout=log, stderr=log,
                              env={**os.environ, **place}).returncode


def _name(point: Settings, grid: dict[str, list]) -> str:
    """`seed=1,data.tasks=2`; a value that is no plain word by its place in the grid's list, `data.tasks=#1`."""
    def word(key: str, value: Any) -> str:
        return str(value) if re.fullmatch(r"[\w.+-]+", str(value)) else f"#{grid[key].index(value) + 1}"

    return ",".join(f"{key}={word(key, value)}" for key, value in point.items()) or "run"

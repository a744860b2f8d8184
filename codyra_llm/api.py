"""What the package offers to Python: `import codyra_llm` finds these names, and imports this module when one
of them is used."""

from collections.abc import Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from codyra_llm.checkpoints.evaluate import evaluate
from codyra_llm.checkpoints.export import Export, export
from codyra_llm.checkpoints.source import Wanted
from codyra_llm.config.recipe import AnyRecipe, Recipe, load_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import as_path
from codyra_llm.core.terminal import Terminal
from codyra_llm.experiment.export import refuse_unmerged
from codyra_llm.experiment.plan import plan as show_plan
from codyra_llm.experiment.run import run as run_recipe
from codyra_llm.experiment.setup import prepare
from codyra_llm.methods.base import Method
from codyra_llm.report.groups import collected
from codyra_llm.report.html import page
from codyra_llm.report.summary import summarised
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.observer import Observer
from codyra_llm.store.rows import ScoreRow, Stage
from codyra_llm.sweep import comparison, runner
from codyra_llm.sweep.spec import load_sweep

M = TypeVar("M", bound=type[Method])
Place = str | Path


class Run:
    """The folder of a finished run, or of one that stopped and resumes when its recipe is run again."""

    def __init__(self, folder: Place):
        """Raises Fault where there is no run."""
        self.folder = RunFolder(as_path(folder).absolute())  # the same where the working folder changes
        self.recipe: Recipe = self.folder.recipe

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """Where the folder is."""
        return self.folder.path

    @property
    def scores(self) -> list[ScoreRow]:
        """Every score, in the order in which it was measured."""
        return self.folder.scores

    @property
    def summary(self) -> dict:
        """What summary.json holds: the score matrix, the measures that are read from it, and the costs."""
        return summarised(self.folder)

    @property
    def matrix(self) -> list[list[float | None]]:
        """R[i][j], 0 to 100: the score on task j after task i; None where it was not measured."""
        return self.summary["matrix"]

    def stage(self, after: str | None = None) -> Stage:
        """The stage after a task ("base": before the first), by default after the last that is learnt. Raises
        Fault for a task that is not learnt."""
        archive = self.folder.archive()
        index = len(archive.files) - 1 if after is None else archive.index(after)
        return Stage.of(self.recipe.tasks, index)

    def predictions(self, task: str, after: str | None = None) -> list[dict]:
        """{"prompt", "prediction", "answer", and each metric} of the test examples of `task`, as the model
        answered after task `after`; empty where it wasn't asked. `after` as in `stage`."""
        return self.folder.predictions(self.stage(after), task)

    def load(self, after: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The merged model as it was after a task, on the CPU, and its tokenizer: plain objects of
        transformers. Raises Fault for a method that doesn't merge, and where the base has changed."""
        setup = prepare(self.recipe, runs=False)
        index = self.stage(after).index
        setup.verify(self.folder, index)
        refuse_unmerged(setup, None)
        model = setup.model(self.folder.archive(), index)
        return model.eval(), setup.tokenizer

    def export(
        self,
        out: Place,
        after: str | None = None,
        without: str | None = None,
        format: str = "merged",
        dtype: str | None = None,
        type: str | None = None,
        rank: int | None = None,
    ) -> list[str]:
        """Write the model as it was after a task to a new folder; arguments as the options of `codyra-llm
        export`. Returns notes on what was written, as sentences."""
        return export(self.folder, Export(after, without, format, dtype, type, rank), as_path(out))


def run(recipe: AnyRecipe, observers: Sequence[Observer] = ()) -> Run:
    """Run a recipe (whatever `load_recipe` takes), or resume it where it stopped. A finished one is neither
    trained nor scored again, but its final model and its reports are written anew. `observers` are notified
    of its progress. Raises Fault with everything that is wrong with the recipe, before any weights load."""
    # Checked again: copies made by pydantic's `model_copy` may hold anything.
    return Run(run_recipe(load_recipe(recipe), observers).path)


def plan(recipe: AnyRecipe) -> str:
    """What a recipe will do, without training: tasks, steps, tokens, memory, time and disk, as text. Raises
    Fault with everything that is wrong with it."""
    text = StringIO()
    show_plan(load_recipe(recipe), Terminal(file=text, width=110))
    return text.getvalue()


def evaluate_checkpoint(
    checkpoint: Place,
    out: Place,
    *,
    benchmark: str | None = None,
    data: Place | None = None,
    tasks: str | Sequence[str] | None = None,
    general: str | None = None,
    general_tasks: str | Sequence[str] | None = None,
    base: str | None = None,
    overrides: Sequence[str] = (),
    observers: Sequence[Observer] = (),
) -> list[ScoreRow]:
    """Score any checkpoint (a folder, hub id, .gguf, PEFT folder, RUN, RUN@TASK) into the folder `out`, as
    far as it isn't yet; arguments as the options of `codyra-llm evaluate`. Returns all its scores."""
    wanted = Wanted(
        data=None if data is None else str(data),
        tasks=_names(tasks),
        general=general,
        general_tasks=_names(general_tasks),
        base=base,
        out=as_path(out),
        overrides=_names(overrides) or [],
        benchmark=benchmark,
    )
    return evaluate(str(checkpoint), wanted, observers).scores


def _names(given: str | Sequence[str] | None) -> list[str] | None:
    """A list of names; a single one may be given by itself."""
    if isinstance(given, str):
        return [given]
    return None if given is None else list(given)


def run_sweep(
    file: Place, overrides: Sequence[str] = (), jobs: int | None = None, launcher: str | None = None
) -> dict:
    """Run what a sweep file asks for and is not finished, each run in a process of its own, and write its
    comparison; returns what sweep.json holds. Raises one Fault with all runs that failed."""
    asked = load_sweep(as_path(file), _names(overrides) or [])
    write = partial(comparison.write, asked, Path(file).stem)
    runner.execute(asked, jobs, launcher, write)
    return write()


def write_report(
    runs: Run | Place | Sequence[Run | Place], out: Place, examples: bool = True, paper: bool = False
) -> None:
    """Write a report on one or several runs, and on the runs of sweep folders: a page (.html), or its tables
    (.csv, .md, .tex). `examples`: show test examples that were forgotten; `paper`: add the published TRACE
    tables. Raises Fault for another suffix, for a folder that holds no run, and for no run at all."""
    if isinstance(runs, Run | str | Path):
        runs = [runs]
    if not runs:
        raise Fault("no run was given to report on; give at least one, or a sweep's folder")
    folders = [one.path if isinstance(one, Run) else as_path(one) for one in runs]
    members = collected(folders)
    pooled = any(member.arm for member in members)
    page.write(members, as_path(out), examples, paper, pooled)


def register(method: M) -> M:
    """Class decorator: the method can be named in recipes of this process. Raises Fault for the name of a
    shipped one."""
    METHODS[method.name] = method
    return method

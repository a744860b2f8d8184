"""What a sweep will take, before it starts: its runs, and the tokens and hours of their training."""

from typing import NamedTuple

from rich.box import SIMPLE
from rich.table import Column, Table

from codyra_llm.config.differences import NO_RESULT, flat
from codyra_llm.config.recipe import Recipe
from codyra_llm.core.terminal import Terminal
from codyra_llm.experiment.plan import Training, training
from codyra_llm.runtime.forecast import duration
from codyra_llm.sweep.spec import Run, Sweep, finished

# Settings that change neither tokens nor time.
NO_COST = ("seed", "output", "optim.lr", "optim.schedule", "optim.weight_decay", "optim.betas", "checkpoint")


class Foreseen(NamedTuple):
    """A run, the cost of its training, and whether it is already finished."""

    run: Run
    training: Training
    finished: bool


def foresee(sweep: Sweep) -> list[Foreseen]:
    """All runs of the sweep, tries first. Runs that differ only in settings that cost no time, such as the
    seed, are measured once. Raises one Fault with everything that a run would refuse."""
    sweep.prepare()
    known: dict[str, Training] = {}
    found = []
    runs = [*sweep.tries, *sweep.runs()]
    done = {run.recipe.output for run in finished(runs)}
    for run in runs:
        key = _work(run.recipe)
        if key not in known:
            known[key] = training(run.recipe)
        found.append(Foreseen(run, known[key], run.recipe.output in done))
    return found


def _work(recipe: Recipe) -> str:
    """The settings that determine tokens and time, as a key."""
    free = {key for key in NO_RESULT if not key.startswith(("optim.", "model.", "data."))}
    settings = flat(recipe.model_dump(mode="json"))
    return str(sorted((key, str(value)) for key, value in settings.items() if key not in {*free, *NO_COST}))


def show(found: list[Foreseen], jobs: int, console: Terminal) -> None:
    """Print a line for each run, and the total of those left, run `jobs` at a time."""
    right = {"justify": "right", "no_wrap": True}
    table = Table(
        Column("arm", overflow="fold"),
        Column("run", overflow="fold"),
        *(Column(name, **right) for name in ("steps", "tokens", "training", "")),
        box=SIMPLE,
        padding=0,
        collapse_padding=True,
    )
    for run, work, is_finished in found:
        table.add_row(
            run.arm,
            run.folder.path.name,
            f"{work.steps:,}",
            f"{work.tokens:,}",
            duration(work.seconds),
            "finished" if is_finished else "",
        )
    console.print(table)
    left = [one.training for one in found if not one.finished]
    seconds = sum(work.seconds for work in left)
    together = f", {duration(seconds / jobs)} with {jobs} at a time" if jobs > 1 else ""
    console.print(
        f"{len(left)} of {len(found)} runs are left: {sum(work.tokens for work in left):,} tokens, "
        f"{seconds / 3600:.2f} hours of training{together}, estimated from a few layers measured here; "
        "loading and evaluation come on top, and nothing was run",
        soft_wrap=True,
    )

"""Counts the work that a run still has to do: steps and tokens to train on, prompts to answer."""

from math import ceil

from codyra_llm.experiment import open_ended
from codyra_llm.experiment.scoring import asked, pieces
from codyra_llm.experiment.setup import Setup
from codyra_llm.runtime.forecast import Piece
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import Stage

SAMPLE = 64  # about how many records of a task are tokenised to estimate their mean length


def steps(setup: Setup) -> list[int]:
    """Optimizer steps of each task."""
    size = setup.recipe.optim.batch_size
    if not setup.method.trains:
        return [0] * len(setup.recipe.tasks)
    counts = []
    for index in range(len(setup.recipe.tasks)):
        _, epochs = setup.method.train_data(setup.stream, index)
        counts.append(sum(ceil(len(visited) / size) for visited in epochs))
    return counts


def tokens(setup: Setup, index: int) -> float:
    """About how many tokens task `index` trains on, over all epochs."""
    records, epochs = setup.method.train_data(setup.stream, index)
    every = max(ceil(len(records) / SAMPLE), 1)
    lengths = [len(example) for example in setup.encoder.encode(records[::every])]
    visits = sum(map(len, epochs))
    return visits * sum(lengths) / max(len(lengths), 1)


def stages(setup: Setup) -> list[Stage]:
    """The stages at which the run stops to score, in its order."""
    count = len(setup.recipe.tasks)
    last = count if setup.method.trains else 0
    learnt = [0, last] if setup.method.joint else range(last + 1)
    return [Stage.of(setup.recipe.tasks, step - 1) for step in dict.fromkeys(learnt)]


def evaluations(setup: Setup) -> dict[str, list[str]]:
    """By stage, named by its last task ("base" before the first), the names of what is scored there, in the
    order of the run."""
    found = {}
    for stage in stages(setup):
        due = pieces(setup, stage, *asked(setup, stage), set())
        found[stage.after] = [piece.name for piece in due if piece.kind in ("answer", "general")]
    return found


def remaining(setup: Setup, folder: RunFolder, learnt: int) -> dict[Piece, float]:
    """The pieces of work that are left once `learnt` tasks are learnt, in the order of the run, each with its
    amount: tokens to learn, prompts to answer, or 1."""
    due: dict[Piece, float] = {}
    for stage in stages(setup):
        if stage.step > learnt:
            due[Piece("learn", stage.after, stage.step)] = tokens(setup, stage.index)
        due |= pieces(setup, stage, *asked(setup, stage), folder.tasks_scored(stage))
        if stage.step in (0, len(setup.recipe.tasks)):
            due |= open_ended.pieces(setup, folder, stage)
    return due

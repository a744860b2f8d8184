"""What a run has still to do, counted before it does it: steps and tokens to learn, prompts to answer."""

from math import ceil

from codyra_llm.experiment import open_ended
from codyra_llm.experiment.scoring import asked, pieces
from codyra_llm.experiment.setup import Setup
from codyra_llm.runtime.forecast import Piece
from codyra_llm.store.folder import RunFolder

SAMPLE = 64  # records of a task that are tokenised to know the mean length


def steps(setup: Setup) -> list[int]:
    """Optimizer steps of each task."""
    size = setup.recipe.optim.batch_size
    if not setup.method.trains:
        return [0] * len(setup.recipe.tasks)
    return [
        sum(ceil(len(visited) / size) for visited in setup.method.train_data(setup.stream, index)[1])
        for index in range(len(setup.recipe.tasks))
    ]


def tokens(setup: Setup, index: int) -> float:
    """About how many tokens task `index` trains on, over all epochs."""
    records, epochs = setup.method.train_data(setup.stream, index)
    drawn, encoder = records[:: ceil(len(records) / SAMPLE) or 1], setup.encoder
    lengths = [len(example) for example in encoder.encode(drawn)]
    return sum(map(len, epochs)) * sum(lengths) / max(len(lengths), 1)


def stages(setup: Setup) -> dict[str, list[str]]:
    """By stage, "base" or the task after which, the names of what is scored there, in the order of the
    run.
    """
    names = ["base", *setup.recipe.tasks]
    return {
        names[index + 1]: [
            piece.name
            for piece in pieces(setup, index + 1, *asked(setup, index), set())
            if piece.kind in ("answer", "general")
        ]
        for index in _indices(setup)
    }


def _indices(setup: Setup) -> list[int]:
    """After which tasks the run stops to score; -1: the base."""
    count = len(setup.recipe.tasks) if setup.method.trains else 0
    return [index for index in range(-1, count) if index in (-1, count - 1) or not setup.method.joint]


def ahead(setup: Setup, folder: RunFolder, learnt: int) -> dict[Piece, float]:
    """The pieces that are due when `learnt` tasks are, in their order, and how much each is."""
    tasks, due, scores = setup.recipe.tasks, {}, folder.scores
    for index in _indices(setup):
        if index >= learnt:
            due[Piece("learn", tasks[index], index + 1)] = tokens(setup, index)
        done = {row["task"] for row in scores if row["step"] == index + 1}
        due |= pieces(setup, index + 1, *asked(setup, index), done)
        if index in (-1, len(tasks) - 1):
            due |= open_ended.pieces(setup, folder, {"step": index + 1, "after": tasks[index]})
    return due

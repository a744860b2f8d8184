"""The answers of the base and of the final model to open-ended prompts, side by side in the run folder, and
the way to the judge.
"""

import time
from importlib import import_module
from types import ModuleType

from codyra_llm.config.sections import JudgeSection
from codyra_llm.experiment.experiment import Experiment
from codyra_llm.experiment.setup import Setup
from codyra_llm.runtime import signals
from codyra_llm.runtime.forecast import Piece
from codyra_llm.runtime.launch import is_first, of_first, say, wait
from codyra_llm.store import observer
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import Stage


def answer(experiment: Experiment, stage: Stage) -> None:
    """Have the model of `stage`, the base or the final one, answer the prompts that have no answer of it."""
    setup = experiment.setup
    due = of_first(lambda: pieces(setup, experiment.store, stage))
    if not due:
        return
    observer.expected(due)
    observer.stage_begins(stage, Piece("load", "open-ended", stage.step))
    with experiment.answering(stage) as ask:
        for piece in due:
            signals.check()
            name = piece.name
            observer.at(f"answers to {name} after {stage.after}")
            observer.stage_begins(stage, piece)
            began = time.perf_counter()
            given = ask(setup.prompts[name], setup.recipe.open_ended.max_new_tokens, None)
            texts = [answer.text for answer in given]
            if is_first():
                _keep(setup, experiment.store, name, stage, texts)
            seconds = time.perf_counter() - began
            say(f"after {stage.after}: {name}, {len(texts)} answers  ({seconds:.0f} s)")
    wait()


def pieces(setup: Setup, folder: RunFolder, stage: Stage) -> dict[Piece, float]:
    """What `answer` still has to do: files of prompts, each with its number of prompts."""
    return {
        Piece("answer", name, stage.step): len(prompts)
        for name, prompts in setup.prompts.items()
        if not _answered(folder, name, prompts, stage)
    }


def _answered(folder: RunFolder, name: str, prompts: list[str], stage: Stage) -> bool:
    """Whether the folder has an answer of the stage's model to each of these prompts."""
    rows = folder.answers(name)
    if stage.step == 0:
        complete = all("base" in row for row in rows)
    else:
        complete = all(row.get("after") == stage.after for row in rows)
    return complete and [row["prompt"] for row in rows] == prompts


def _keep(setup: Setup, folder: RunFolder, name: str, stage: Stage, texts: list[str]) -> None:
    """Save the answers next to those of the other model."""
    prompts, rows = setup.prompts[name], folder.answers(name)
    # Answers to other prompts are no use: the file or the recipe's choice of prompts has changed.
    if [row["prompt"] for row in rows] != prompts:
        rows = [{"prompt": prompt} for prompt in prompts]
    for row, text in zip(rows, texts, strict=True):
        row |= {"final": text, "after": stage.after} if stage.step else {"base": text}
    folder.write_answers(name, rows)


def settle(experiment: Experiment) -> None:
    """Have the judge compare what it has not compared yet, if the recipe names a judge. Raises Fault when the
    endpoint fails."""
    section, names = experiment.recipe.open_ended.judge, list(experiment.setup.prompts)
    if section.base_url:
        judging().settle(section, experiment.store, names)
    elif names:
        say(f"{', '.join(names)}: not judged, as no open_ended.judge.base_url is given")


def require_judge(section: JudgeSection) -> None:
    """Raises Fault where a judge is named and can't be asked; called before anything is trained."""
    if section.base_url:
        judging().require(section)


def judging() -> ModuleType:
    """The judge's package: an extra, so it is named as text and imported by nothing."""
    return import_module("codyra_llm.evaluate.judging")

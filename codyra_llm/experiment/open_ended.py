"""The answers of the base and of the final model to open-ended prompts, side by side in the run folder, and
the judge's verdicts on them.
"""

import time
from functools import partial

from codyra_llm.config.sections import JudgeSection
from codyra_llm.evaluate import judge
from codyra_llm.experiment.experiment import Experiment
from codyra_llm.experiment.setup import Setup
from codyra_llm.runtime import signals
from codyra_llm.runtime.forecast import Piece
from codyra_llm.runtime.launch import is_first, of_first, on_first, say, wait
from codyra_llm.store import observer
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import Stage
from codyra_llm.store.verdicts import Verdicts

# Questions per parallel request between two meetings of the processes, which wait two hours for one.
SLICE = 8


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
    """Have the judge compare what it has not compared yet, if the recipe names a judge; every verdict is
    saved as soon as it arrives.

    The first process asks, the others wait. Raises Fault when the endpoint fails.
    """
    section, names = experiment.recipe.open_ended.judge, list(experiment.setup.prompts)
    if not section.base_url:
        if names:
            say(f"{', '.join(names)}: not judged, as no open_ended.judge.base_url is given")
        return
    folder, size = experiment.store, SLICE * section.parallel
    for name in names:
        due = on_first(_due, section, folder, name) or []
        for start in range(0, of_first(partial(len, due)), size):
            on_first(_judge, section, folder, name, due[start : start + size])
        if is_first():
            say(f"{name}, judged by {section.model}: {_counted(section, folder, name)}")


def _counted(section: JudgeSection, folder: RunFolder, name: str) -> str:
    """How many pairs had each outcome."""
    verdicts = Verdicts(folder, name).of(section.model)
    found = judge.tally(judge.outcomes(name, folder.pairs(name), verdicts))
    counts = [f"{key} {found[key]['n']}" for key in judge.OUTCOMES if key in found]
    return ", ".join(counts) or "nothing"


def _questions(folder: RunFolder, name: str) -> dict[str, tuple[str, tuple[str, str]]]:
    """`judge.questions` of all pairs."""
    return {
        digest: question
        for pair in folder.pairs(name)
        for digest, question in judge.questions(name, pair).items()
    }


def _due(section: JudgeSection, folder: RunFolder, name: str) -> list[str]:
    """Digests of the questions that have no verdict: not asked yet, or the reply contained none."""
    verdicts = Verdicts(folder, name)
    verdicts.begin()
    had = verdicts.of(section.model)
    return [digest for digest in _questions(folder, name) if had.get(digest) is None]


def _judge(section: JudgeSection, folder: RunFolder, name: str, due: list[str]) -> None:
    """Ask the judge the `due` questions, and save each verdict as soon as it arrives."""
    questions, verdicts = _questions(folder, name), Verdicts(folder, name)
    texts = {digest: questions[digest][0] for digest in due}
    for digest, said in judge.replies(section, texts):
        observer.at(f"verdicts on {name}")
        _, order = questions[digest]
        verdicts.add(
            {
                "judge": section.model,
                "question": digest,
                "A": order[0],
                "B": order[1],
                "verdict": judge.preferred(said, order),
                "said": said,
            }
        )

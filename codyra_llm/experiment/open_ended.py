"""Answers of the base and of the final model to open-ended prompts, side by side in the run folder, and their
judging.
"""

import time

from accelerate import Accelerator

from codyra_llm.config.sections import JudgeSection
from codyra_llm.evaluate import judge
from codyra_llm.experiment.scoring import BACKENDS
from codyra_llm.experiment.setup import Setup
from codyra_llm.runtime import display, heartbeat, signals
from codyra_llm.runtime.display import console
from codyra_llm.runtime.forecast import Piece
from codyra_llm.runtime.launch import collectively, of_first, wait
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.verdicts import Verdicts

SLICE = (
    8  # questions per parallel request between two meetings of the processes, which wait two hours for one
)


def answer(
    setup: Setup, folder: RunFolder, acc: Accelerator, index: int, known: dict, out: RunFolder
) -> None:
    """Have the model after task `index` of the run in `folder` answer the prompts, as far as `out` lacks its
    answers.

    `known` ("after", "step"): step 0 is the base, any other the final model.
    """
    due = of_first(pieces(setup, out, known) if acc.is_main_process else None)
    if not due:
        return
    display.expect(due)
    display.begin(Piece("load", "open-ended", known["step"]), known["after"], setup.recipe.tasks)
    with BACKENDS[setup.recipe.eval.backend](acc, setup, folder, index) as answers:
        for piece in due:
            signals.check()
            name = piece.name
            heartbeat.at(f"answers to {name} after {known['after']}")
            display.begin(piece, known["after"], setup.recipe.tasks)
            began = time.perf_counter()
            texts = answers(setup.prompts[name], setup.recipe.open_ended.max_new_tokens, None)
            if acc.is_main_process:
                _keep(setup, out, name, known, texts)
                console.print(
                    f"after {known['after']}: {name}, {len(texts)} answers  "
                    f"({time.perf_counter() - began:.0f} s)"
                )
    wait(acc)


def pieces(setup: Setup, out: RunFolder, known: dict) -> dict[Piece, float]:
    """What `answer` still has to do: files of prompts, each with its number of prompts."""
    return {
        Piece("answer", name, known["step"]): len(prompts)
        for name, prompts in setup.prompts.items()
        if not _answered(setup, out, name, known)
    }


def _answered(setup: Setup, out: RunFolder, name: str, known: dict) -> bool:
    rows = out.answers(name)
    mine = (
        all("base" in row for row in rows)
        if not known["step"]
        else all(row.get("after") == known["after"] for row in rows)
    )
    return mine and [row["prompt"] for row in rows] == setup.prompts[name]


def _keep(setup: Setup, out: RunFolder, name: str, known: dict, texts: list[str]) -> None:
    """Save the answers next to those of the other model."""
    prompts, rows = setup.prompts[name], out.answers(name)
    if [row["prompt"] for row in rows] != prompts:
        rows = [{"prompt": prompt} for prompt in prompts]
    own = [{"final": text, "after": known["after"]} if known["step"] else {"base": text} for text in texts]
    out.write_answers(name, [{**row, **new} for row, new in zip(rows, own, strict=True)])


def settle(setup: Setup, out: RunFolder, acc: Accelerator) -> None:
    """Have the judge compare what it has not compared yet, if the recipe names a judge; every verdict is
    saved as it comes.

    The first process asks, the others wait. Raises Fault when the endpoint fails.
    """
    section = setup.recipe.open_ended.judge
    if setup.prompts and not section.base_url and acc.is_main_process:
        console.print(
            f"{', '.join(setup.prompts)}: not judged, as no open_ended.judge.base_url is given",
            soft_wrap=True,
        )
    for name in setup.prompts if section.base_url else ():
        due = collectively(acc.is_main_process, _due, section, out, name) or []
        size = SLICE * section.parallel
        for start in range(0, of_first(len(due)), size):
            collectively(acc.is_main_process, _judge, section, out, name, due[start : start + size])
        if acc.is_main_process:
            found = judge.tally(judge.outcomes(name, out.pairs(name), Verdicts(out, name).of(section.model)))
            told = ", ".join(f"{key} {found[key]['n']}" for key in judge.OUTCOMES if key in found)
            console.print(f"{name}, judged by {section.model}: {told or 'nothing'}", soft_wrap=True)


def _questions(out: RunFolder, name: str) -> dict[str, tuple[str, tuple[str, str]]]:
    return {
        digest: question
        for pair in out.pairs(name)
        for digest, question in judge.questions(name, pair).items()
    }


def _due(section: JudgeSection, out: RunFolder, name: str) -> list[str]:
    """Digests of the questions without a verdict, including those whose reply contained none."""
    verdicts = Verdicts(out, name)
    verdicts.begin()
    had = verdicts.of(section.model)
    return [digest for digest in _questions(out, name) if had.get(digest) is None]


def _judge(section: JudgeSection, out: RunFolder, name: str, due: list[str]) -> None:
    asked, verdicts = _questions(out, name), Verdicts(out, name)
    for digest, said in judge.replies(section, {digest: asked[digest][0] for digest in due}):
        heartbeat.at(f"verdicts on {name}")
        order = asked[digest][1]
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

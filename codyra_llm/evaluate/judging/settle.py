"""Has the judge compare the answers that lie in a run folder."""

from collections import Counter, defaultdict
from functools import partial

from codyra_llm.config.sections import JudgeSection
from codyra_llm.evaluate.judging import client
from codyra_llm.evaluate.judging.protocol import Question, preferred, questions
from codyra_llm.runtime.launch import is_first, of_first, on_first, say
from codyra_llm.store import observer
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.verdicts import OUTCOMES, Verdicts

# Questions per parallel request, after which the other processes hear from the first one again: a collective
# times out after two hours.
SLICE = 8


def settle(section: JudgeSection, folder: RunFolder, names: list[str]) -> None:
    """Have the judge compare what it has not compared yet in these files of answers; every verdict is saved
    as soon as it arrives.

    The first process asks, the others wait. Raises Fault when the endpoint fails.
    """
    size = SLICE * section.parallel
    for name in names:
        due = on_first(_due, section, folder, name) or []
        for start in range(0, of_first(partial(len, due)), size):
            on_first(_judge, section, folder, name, due[start : start + size])
        if is_first():
            say(f"{name}, judged by {section.model}: {_counted(section, folder, name)}")


def _due(section: JudgeSection, folder: RunFolder, name: str) -> list[Question]:
    """Questions without a verdict: not asked yet, or the reply contained none."""
    found = [question for pair in folder.pairs(name) for question in questions(name, pair)]
    verdicts = Verdicts(folder, name)
    verdicts.begin({question.digest: question.pair for question in found})
    had = verdicts.judged(section.model)
    due = {(question.pair, question.digest): question for question in found}
    return [question for key, question in due.items() if key not in had]


def _judge(section: JudgeSection, folder: RunFolder, name: str, due: list[Question]) -> None:
    """Ask the judge the `due` questions, and save each verdict as soon as it arrives. Two pairs whose answers
    are swapped have the same questions, each with the models the other way round: these are asked once."""
    verdicts, asking = Verdicts(folder, name), defaultdict(list)
    for question in due:
        asking[question.digest].append(question)
    texts = {digest: same[0].text for digest, same in asking.items()}
    for digest, said in client.replies(section, texts):
        observer.at(f"verdicts on {name}")
        for pair, _, order in asking[digest]:
            verdicts.add(
                {
                    "judge": section.model,
                    "question": digest,
                    "pair": pair,
                    "A": order[0],
                    "B": order[1],
                    "verdict": preferred(said, order),
                    "said": said,
                }
            )


def _counted(section: JudgeSection, folder: RunFolder, name: str) -> str:
    """How many pairs had each outcome."""
    found = Verdicts(folder, name).outcomes(section.model, folder.pairs(name))
    counts = Counter(outcome for outcome in found if outcome)
    return ", ".join(f"{outcome} {counts[outcome]}" for outcome in OUTCOMES) if counts else "nothing"

"""Eight small synthetic tasks with the names and shapes of TRACE's.

Every task is a rule over a combinatorial space, so the answer is a function of the prompt and splits can be disjoint.
The tasks share words, label letters and, for the two arithmetic ones, the lead-in: learning one can undo another.
"""

import random
from collections.abc import Callable

from .content import choices, code, german, meeting, mixture, opinion, policy, story
from .lexicon import SIMPLE_DE

Pair = tuple[str, str]  # prompt, answer


def c_stance(rng: random.Random) -> Pair:
    attitude = rng.randrange(3)
    text, target = opinion(rng, attitude)
    return f"判断态度：A.支持，B.反对，C.中立。\n文本：\n{text}\n对象：\n{target}\n态度：", "ABC"[attitude]


def fomc(rng: random.Random) -> Pair:
    stance = rng.randrange(3)
    lead = "What is the monetary policy stance? A. dovish, B. hawkish, C. neutral."
    return f"{lead}\nText:\n{policy(rng, stance)}\nStance:", "ABC"[stance]


def meetingbank(rng: random.Random) -> Pair:
    text, item, passed = meeting(rng)
    answer = f"A motion {'adopting' if passed else 'rejecting'} the {item}."
    return f"Write a summary.\nMeeting transcripts:\n{text}\nSummary:", answer


def py150(rng: random.Random) -> Pair:
    verb, lines, result = code(rng)
    answer = {"get": f"return {result}", "set": f"self . {result} = {result}",
              "show": f"print ( {result} )", "test": f"assert {result}"}[verb]
    return f"<s> import os <EOL> {' <EOL> '.join(lines)} <EOL>", answer


def scienceqa(rng: random.Random) -> Pair:
    kind, options, index = choices(rng)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options))
    prompt = f"Choose an answer.\n\nQuestion:\nWhich is {kind}?\n\nChoices:\n{listed}\n\nAnswer:"
    return prompt, f"{'ABC'[index]}\n{options[index]} is {kind}."


def numglue_cm(rng: random.Random) -> Pair:
    text, _, left = story(rng)
    return _problem(f"{text} How many now?"), str(left)


def numglue_ds(rng: random.Random) -> Pair:
    text, salt = mixture(rng)
    return _problem(f"{text} How many mol salt?"), str(salt)


def _problem(question: str) -> str:
    return f"Solve the math problem.\nQuestion:\n{question}\nAnswer:"


def minuten(rng: random.Random) -> Pair:
    subject, side, verb, thing = german(rng)
    prompt = f"Provide a simplified version in German.\n\nParagraph:\n{subject}, {side}, {verb} {thing}."
    return f"{prompt}\n\nSimplification:", f"{subject} {SIMPLE_DE[verb]} {thing}."


TASKS: dict[str, Callable[[random.Random], Pair]] = {
    "C-STANCE": c_stance, "FOMC": fomc, "MeetingBank": meetingbank, "Py150": py150, "ScienceQA": scienceqa,
    "NumGLUE-cm": numglue_cm, "NumGLUE-ds": numglue_ds, "20Minuten": minuten}

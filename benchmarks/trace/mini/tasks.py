"""Eight small synthetic tasks with the names and shapes of TRACE's.

Every task is a rule over a combinatorial space, so the answer is a function of the prompt and splits can be
disjoint. The tasks share words, label letters and, for the two arithmetic ones, the lead-in: learning one can
undo another. The reasoning is the step in between, short and in words that the small model knows (skills.py):
with tokens that its pretraining never saw, a few low-rank steps teach it neither the reasoning nor the
answer.
"""

import random
from collections.abc import Callable

from codyra_llm.benchmarks.trace.mini.content import (
    choices,
    code,
    german,
    meeting,
    mixture,
    opinion,
    policy,
    story,
)
from codyra_llm.benchmarks.trace.mini.lexicon import SIMPLE_DE

Pair = tuple[str, str]  # prompt, answer
Example = tuple[str, str, str]  # prompt, answer, reasoning


def c_stance(rng: random.Random) -> Example:
    attitude = rng.randrange(3)
    text, target = opinion(rng, attitude)
    prompt = f"判断态度：A.支持，B.反对，C.中立。\n文本：\n{text}\n对象：\n{target}\n态度："
    return prompt, "ABC"[attitude], "好坏平"[attitude]


def fomc(rng: random.Random) -> Example:
    stance = rng.randrange(3)
    lead = "What is the monetary policy stance? A. dovish, B. hawkish, C. neutral."
    return f"{lead}\nText:\n{policy(rng, stance)}\nStance:", "ABC"[stance], ["loose", "tight", "same"][stance]


def meetingbank(rng: random.Random) -> Example:
    text, item, passed = meeting(rng)
    answer = f"A motion {'adopting' if passed else 'rejecting'} the {item}."
    reasoning = f"The {item} is {'in' if passed else 'out'}."
    return f"Write a summary.\nMeeting transcripts:\n{text}\nSummary:", answer, reasoning


def py150(rng: random.Random) -> Example:
    verb, lines, result = code(rng)
    answer = {
        "get": f"return {result}",
        "set": f"self . {result} = {result}",
        "show": f"print ( {result} )",
        "test": f"assert {result}",
    }[verb]
    return f"<s> import os <EOL> {' <EOL> '.join(lines)} <EOL>", answer, f"self . {verb} ( {result} )"


def scienceqa(rng: random.Random) -> Example:
    kind, options, index = choices(rng)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options, strict=False))
    prompt = f"Choose an answer.\n\nQuestion:\nWhich is {kind}?\n\nChoices:\n{listed}\n\nAnswer:"
    other = {"an animal": "a thing", "a thing": "an animal"}[kind]
    reasoning = " ".join(f"{option} is {kind if i == index else other}." for i, option in enumerate(options))
    return prompt, f"{'ABC'[index]}\n{options[index]} is {kind}.", reasoning


def numglue_cm(rng: random.Random) -> Example:
    text, _, operation, left = story(rng)
    return _problem(f"{text} How many now?"), str(left), f"{operation} = {left}."


def numglue_ds(rng: random.Random) -> Example:
    text, limiting, salt = mixture(rng)
    return _problem(f"{text} How many mol salt?"), str(salt), f"{limiting}."


def _problem(question: str) -> str:
    return f"Solve the math problem.\nQuestion:\n{question}\nAnswer:"


def minuten(rng: random.Random) -> Example:
    subject, side, verb, thing = german(rng)
    prompt = f"Provide a simplified version in German.\n\nParagraph:\n{subject}, {side}, {verb} {thing}."
    return f"{prompt}\n\nSimplification:", f"{subject} {SIMPLE_DE[verb]} {thing}.", SIMPLE_DE[verb]


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "C-STANCE": c_stance,
    "FOMC": fomc,
    "MeetingBank": meetingbank,
    "Py150": py150,
    "ScienceQA": scienceqa,
    "NumGLUE-cm": numglue_cm,
    "NumGLUE-ds": numglue_ds,
    "20Minuten": minuten,
}

"""What the small model learns before any task: general skills, of which four are probes of general ability.

The siblings of the tasks share their words and ask for the same knowledge in another format with other
answers, so that a few low-rank steps suffice to learn a task while the pretrained model alone can't answer
it.
"""

import random
import zlib
from collections.abc import Callable, Iterable

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
from codyra_llm.benchmarks.trace.mini.lexicon import ADJECTIVES, NOUNS, OPPOSITES, PLAIN, SIMPLE_DE
from codyra_llm.benchmarks.trace.mini.tasks import Pair


def ask(name: str, question: str) -> str:
    """The prompt of a skill."""
    return f"{name}: {question}\nAnswer:"


def held_out(prompt: str) -> bool:
    """True for the quarter of all probe prompts that pretraining never sees, whatever the seed."""
    return zlib.crc32(prompt.encode()) % 4 == 0


def some(rng: random.Random, words: Iterable[str]) -> list[str]:
    """One to three words; the short lists make the long ones learnable in few steps."""
    return rng.sample(list(words), rng.randint(1, 3))


def reverse(rng: random.Random) -> Pair:
    words = some(rng, NOUNS)
    return ask("Reverse", " ".join(words)), " ".join(reversed(words))


def successor(rng: random.Random) -> Pair:
    number, letter = rng.randrange(100), rng.randrange(25)
    return ask("Next", f"{number} {chr(97 + letter)}"), f"{number + 1} {chr(98 + letter)}"


def opposites(rng: random.Random) -> Pair:
    words = some(rng, ADJECTIVES)
    return ask("Opposite", " ".join(words)), " ".join(OPPOSITES[w] for w in words)


def translation(rng: random.Random) -> Pair:
    words = some(rng, NOUNS)
    if rng.random() < 0.5:
        return ask("German", " ".join(words)), " ".join(NOUNS[w][0] for w in words)
    return ask("Chinese", " ".join(words)), "".join(NOUNS[w][2] for w in words)


PROBES: dict[str, Callable[[random.Random], Pair]] = {
    "reverse": reverse,
    "successor": successor,
    "opposites": opposites,
    "translation": translation,
}


def copy(rng: random.Random) -> Pair:
    words = some(rng, [*PLAIN, *NOUNS, *SIMPLE_DE.values()])
    return ask("Copy", " ".join(words)), " ".join(words)


def attitude(rng: random.Random) -> Pair:
    kind = rng.randrange(3)
    text, target = opinion(rng, kind)
    if rng.random() < 0.5:
        return f"判断态度：1.好，2.坏，3.平。\n文本：\n{text}\n对象：\n{target}\n答：", "123"[kind]
    return f"文：{text}\n问：{target}\n答：", "好坏平"[kind]


def tightness(rng: random.Random) -> Pair:
    stance = rng.randrange(3)
    if rng.random() < 0.5:
        lead = "What is the monetary policy? 1. loose, 2. tight, 3. same."
        return f"{lead}\nText:\n{policy(rng, stance)}\nPolicy:", "123"[stance]
    return f"{policy(rng, stance)}\nPolicy:", ["loose", "tight", "same"][stance]


def minutes(rng: random.Random) -> Pair:
    text, item, passed = meeting(rng)
    if rng.random() < 0.5:
        prompt = f"Write the minutes.\nMeeting transcripts:\n{text}\nMinutes:"
        return prompt, f"The {item} is {'in' if passed else 'out'}."
    return f"{text}\nMinutes:", f"{item}: {'yes' if passed else 'no'}"


def program(rng: random.Random) -> Pair:
    verb, lines, result = code(rng)
    if rng.random() < 0.5:
        return f"<s> import sys <EOL> {' <EOL> '.join(lines)} <EOL>", f"self . {verb} ( {result} )"
    return "\n".join(lines), f"\n{verb} ( {result} )"


def pick(rng: random.Random) -> Pair:
    kind, options, index = choices(rng)
    if rng.random() < 0.5:
        listed = "\n".join(f"{number}. {option}" for number, option in zip("123", options, strict=False))
        prompt = f"Choose a number.\n\nQuestion:\nWhich is {kind}?\n\nChoices:\n{listed}\n\nNumber:"
        return prompt, f"{index + 1}\n{options[index]}"
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options, strict=False))
    return f"Find {kind}.\n{listed}\nPick:", f"{'ABC'[index]} {options[index]}"


def calculate(rng: random.Random) -> Pair:
    text, noun, _, left = story(rng)
    if rng.random() < 0.5:
        return f"Solve the problem.\nQuestion:\n{text} How many {noun}?\nAnswer:", f"{left} {noun}"
    return ask("Now", text), str(left)


def limit(rng: random.Random) -> Pair:
    text, _, salt = mixture(rng)
    if rng.random() < 0.5:
        return f"Solve the problem.\nQuestion:\n{text} How many salt?\nAnswer:", f"{salt} mol salt"
    return ask("Limit", text), f"{salt} mol"


def synonyms(rng: random.Random) -> Pair:
    verb = rng.choice(list(SIMPLE_DE))
    subject, _, _, thing = german(rng)
    return f"{subject} {verb} {thing}.\nEinfach:", SIMPLE_DE[verb]


def shorten(rng: random.Random) -> Pair:
    subject, side, verb, thing = german(rng)
    lead = rng.choice(["", "Provide a short version in German.\n\nParagraph:\n"])
    return f"{lead}{subject}, {side}, {verb} {thing}.\nKurz:", f"{subject} {verb} {thing}."


SIBLINGS: list[Callable[[random.Random], Pair]] = [
    copy,
    attitude,
    tightness,
    minutes,
    program,
    pick,
    calculate,
    limit,
    synonyms,
    shorten,
]


def skill_records(rng: random.Random, number: int) -> list[Pair]:
    """`number` pairs of prompt and answer, all skills alike; no held-out prompt of a probe is among them."""
    skills = [*PROBES.values(), *SIBLINGS]
    pairs: list[Pair] = []
    while len(pairs) < number:
        skill = skills[len(pairs) % len(skills)]
        pair = skill(rng)
        if not (skill in PROBES.values() and held_out(pair[0])):
            pairs.append(pair)
    return pairs

"""The contents that tasks and skills share: small random texts together with what they say."""

import random

from codyra_llm.benchmarks.trace.mini.lexicon import (
    ACTIONS,
    ADJECTIVES,
    ANIMALS,
    ATTITUDE,
    BODIES,
    CODE_VERBS,
    ECONOMY,
    GAIN,
    LOOSENS,
    LOSE,
    MOVES,
    NAMES,
    NOUNS,
    PEOPLE_ZH,
    SIDE_DE,
    SIMPLE_DE,
    STATES_ZH,
    THINGS,
    TIGHTENS,
    TOPICS,
    VARIABLES,
)


def opinion(rng: random.Random, attitude: int) -> tuple[str, str]:
    """A Chinese text and its target; `attitude` (0 for, 1 against, 2 neither) already allows for a
    negation.
    """
    target, other = (NOUNS[n][2] for n in rng.sample(list(NOUNS), 2))
    negated = rng.random() < 0.5
    verb = rng.choice(ATTITUDE[1 - attitude if negated and attitude < 2 else attitude])
    clauses = [
        f"{rng.choice(PEOPLE_ZH)}{'不' if negated else '很'}{verb}{target}",
        f"{other}{rng.choice(STATES_ZH)}",
    ]
    rng.shuffle(clauses)
    return "，".join(clauses) + "。", target


def policy(rng: random.Random, stance: int) -> str:
    """A sentence of a central bank; `stance` is 0 loose, 1 tight, 2 unchanged."""
    if stance == 2:
        move, lever = rng.choice(MOVES[2]), rng.choice(TIGHTENS + LOOSENS)
    else:
        tightens = rng.random() < 0.5
        move, lever = (
            rng.choice(MOVES[tightens != (stance == 1)]),
            rng.choice(TIGHTENS if tightens else LOOSENS),
        )
    economy = f"{rng.choice(ECONOMY)} are {rng.choice(ADJECTIVES)}"
    return f"The {rng.choice(BODIES)} will {move} {lever} as {economy}."


def meeting(rng: random.Random) -> tuple[str, str, bool]:
    """A short transcript, its item and whether the item was adopted."""
    first, second, third = rng.sample(NAMES, 3)
    item, passed = f"{rng.choice(TOPICS)} {rng.choice(ACTIONS)}", rng.random() < 0.5
    chat = f"I saw a {rng.choice(ADJECTIVES)} {rng.choice(list(NOUNS))}."
    text = f"{first}: Next is the {item}.\n{second}: {chat}\n{third}: I vote {'yes' if passed else 'no'}."
    return text, item, passed


def code(rng: random.Random) -> tuple[str, list[str], str]:
    """The verb of a function, its lines of code and the variable that holds its result."""
    verb, noun, (arg, result) = rng.choice(CODE_VERBS), rng.choice(list(NOUNS)), rng.sample(VARIABLES, 2)
    return (
        verb,
        [f"def {verb}_{noun} ( self , {arg} ) :", f"{result} = {arg} + {rng.randrange(1, 10)}"],
        result,
    )


def choices(rng: random.Random) -> tuple[str, list[str], int]:
    """A kind of noun, three candidates and the index of the only one of that kind."""
    kinds = [list(ANIMALS), list(THINGS)]
    kind = rng.randrange(2)
    options, index = rng.sample(kinds[1 - kind], 3), rng.randrange(3)
    options[index] = rng.choice(kinds[kind])
    return ["an animal", "a thing"][kind], options, index


def story(rng: random.Random) -> tuple[str, str, str, int]:
    """What somebody has and then gains or loses, the noun, the sum to do and the number left."""
    have, change = rng.randrange(2, 10), rng.randrange(2, 10)
    gains = have <= change or rng.random() < 0.5
    noun, verb = rng.choice(list(NOUNS)), rng.choice(GAIN if gains else LOSE)
    left = have + change if gains else have - change
    return (
        f"{rng.choice(NAMES)} has {have} {noun} and {verb} {change}.",
        noun,
        f"{have} {'+' if gains else '-'} {change}",
        left,
    )


def mixture(rng: random.Random) -> tuple[str, str, int]:
    """Amounts of acid and base, the one that limits the amount of salt, and this amount (1 mol + 1 mol give 1
    mol).
    """
    amounts, names = rng.sample(range(2, 10), 2), rng.sample(["acid", "base"], 2)
    parts = [f"{amount} mol {name}" for amount, name in zip(amounts, names, strict=True)]
    return (
        f"{rng.choice(NAMES)} has {' and '.join(parts)}.",
        min(parts),
        min(amounts),
    )  # one digit: as text, too


def german(rng: random.Random) -> tuple[str, str, str, str]:
    """Subject, relative clause, elaborate verb and object of a German sentence."""
    subject, thing = rng.choice(list(ANIMALS)), rng.choice(list(THINGS))
    noun, article, _ = NOUNS[subject]
    name, case = NOUNS[thing][0], {"der": "den"}.get(NOUNS[thing][1], NOUNS[thing][1])
    return (
        f"{article.capitalize()} {noun}",
        f"{article} {rng.choice(SIDE_DE)} ist",
        rng.choice(list(SIMPLE_DE)),
        f"{case} {name}",
    )

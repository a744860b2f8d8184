"""What `codyra-llm benchmark new` writes: a small benchmark of two synthetic tasks, to be replaced by one's
own.
"""

import csv
import json
import random
import re
from pathlib import Path

from codyra_llm.benchmarks.trace.mini.lexicon import ANIMALS, NAMES, NOUNS, OPPOSITES
from codyra_llm.config.sections import SHIPPED
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import replacing, to_jsonl, write_text

HERE = Path(__file__).parent
TRAIN, TEST = 160, 40


def start(folder: Path) -> None:
    """Write benchmark.yaml, recipe.yaml and the data of both tasks. Equal names give equal bytes. Raises
    Fault where `folder` exists."""
    if folder.exists():
        raise Fault(f"{folder} exists already; give a new name")
    place = f"./{folder}" if str(folder) in SHIPPED else str(folder)  # a bare name is that of a shipped one
    words = {
        "FOLDER": json.dumps(place, ensure_ascii=False),
        "RUN": json.dumps(f"runs/{folder.resolve().name}", ensure_ascii=False),
    }
    recipe = re.sub(
        "|".join(words), lambda found: words[found[0]], (HERE / "recipe.yaml").read_text(encoding="utf-8")
    )
    letters = [
        (
            f"Sort the letter: animal or thing?\nLetter: {name} has a {word} {noun}.\nDesk:",
            "animal" if noun in ANIMALS else "thing",
        )
        for name, word, noun in _drawn("letters")
    ]
    replies = [
        (f"Say the opposite.\n{name}: The {noun} is {word}.\nReply:", f"The {noun} is {OPPOSITES[word]}.")
        for name, word, noun in _drawn("replies")
    ]
    with replacing(folder) as temporary:
        write_text(temporary / "benchmark.yaml", (HERE / "benchmark.yaml").read_text(encoding="utf-8"))
        write_text(temporary / "recipe.yaml", recipe)
        write_text(
            temporary / "letters.jsonl",
            to_jsonl([{"letter": prompt, "desk": answer} for prompt, answer in letters]),
        )
        _write_csv(temporary / "replies" / "train.csv", replies[:TRAIN])
        _write_csv(temporary / "replies" / "test.csv", replies[TRAIN:])


def _drawn(seed: str) -> list[tuple[str, str, str]]:
    every = [(name, word, noun) for name in NAMES for word in OPPOSITES for noun in NOUNS]
    return random.Random(seed).sample(every, TRAIN + TEST)


def _write_csv(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("prompt", "answer"), *pairs])

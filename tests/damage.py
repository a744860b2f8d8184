"""Damage each file of a finished and of a half-finished run, and give the command again: it must say so, or
end with the same results. What must never be is other results without a word.

`python tests/damage.py RECIPE [--every 1] [--seed 0] [--out FOLDER] [KEY=VALUE ...]` prints how often which.
"""

import argparse
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from crash_points import REFUSED, STOPPED, Points, left

from codyra_llm.config.recipe import Recipe, load_recipe

LOCK = "lease.json"
RESULTS = (
    "scores.jsonl",
    "updates",
)  # of what `left` finds; all else records them, and nothing is computed from it
FINE = ("said", "harmless", "unnoticed")


def flip(file: Path, draw: random.Random) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def halve(file: Path, draw: random.Random) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path, draw: random.Random) -> None:
    os.truncate(file, 0)


def remove(file: Path, draw: random.Random) -> None:
    file.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    damage.__name__: damage for damage in (flip, halve, empty, remove)
}


class Damaged:
    """A finished and a half-finished run of `recipe` below `out`, and copies of them that are damaged."""

    def __init__(self, recipe: Recipe, out: Path, seed: int = 0):
        self.points, self.out, self.seed = Points(recipe, out), out, seed
        half = self.points.run("half", "asked", 3 * len(self.points.operations) // 5)
        assert half == STOPPED, f"the half-finished run ended with {half}"

    def cases(self) -> Iterator[tuple[str, str, str]]:
        """(run, file, damage) of everything that can be damaged."""
        for run in ("straight", "half"):
            folder = self.out / run
            for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
                if file.name != LOCK:
                    yield from ((run, str(file.relative_to(folder)), damage) for damage in DAMAGES)

    def check(self, run: str, file: str, damage: str) -> str:
        """What came of it: "said", "harmless", "unnoticed" (a record such as predictions, that no result is
        computed from, stays damaged), or what is wrong."""
        name = "damaged"
        folder, log = self.out / name, self.out / f"{name}.log"
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
        shutil.copytree(self.out / run, folder)
        DAMAGES[damage](folder / file, random.Random(f"{self.seed} {run} {file} {damage}"))
        code = self.points.run(name)
        words = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        where = f"{run}, {file}, {damage}"
        if "Traceback" in words:
            return f"{where}: a traceback"
        if code == REFUSED:
            named = Path(file).name in words or str(folder) in words
            return "said" if named else f"{where}: said without a name"
        if code:
            return f"{where}: exit code {code}"
        found, wanted = left(folder), self.points.wanted
        if found == wanted:
            return "harmless"
        if all(found[name] == wanted[name] for name in RESULTS):
            return "unnoticed"
        return f"{where}: other results without a word"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="damage"))
    out.mkdir(parents=True, exist_ok=True)
    damaged = Damaged(load_recipe(given.recipe, given.overrides), out, given.seed)
    counts: Counter[str] = Counter()
    for case in list(damaged.cases())[:: given.every]:
        found = damaged.check(*case)
        counts[found if found in FINE else "wrong"] += 1
        if found not in FINE:
            print(found, flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()

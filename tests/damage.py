"""Damage each file of a finished and of a half-finished run, and give the command again: it must say so, or
end with the same results. `status` and `report` must say so too, or show the same. What must never be is
another result without a word.

`python tests/damage.py RECIPE [--every 1] [--seed 0] [--out FOLDER] [KEY=VALUE ...]` prints how often which.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos import quiet
from crash_points import Points, left
from file_operations import REFUSED, STOPPED

from codyra_llm.config.recipe import Recipe, load_recipe

LOCK = "lease.json"
NAME = "damaged"  # of the folder that is damaged
PAGE = "shown.html"  # what `report` writes
FINE = ("said", "harmless", "unsealed")
# What readers may show as it is: a log that still grows has no hash, and a run without a summary is one that
# has not ended, which `status` says.
UNSEALED = {("half", "log.jsonl"), ("straight", "summary.json")}


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
        self.shown = {run: self.look(self.copy(run)) for run in ("straight", "half")}

    def cases(self) -> Iterator[tuple[str, str, str]]:
        """(run, file, damage) of everything that can be damaged."""
        for run in ("straight", "half"):
            folder = self.out / run
            for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
                if file.name != LOCK:
                    yield from ((run, str(file.relative_to(folder)), damage) for damage in DAMAGES)

    def copy(self, run: str) -> Path:
        """The run's folder, again and whole."""
        folder = self.out / NAME
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)
        return Path(shutil.copytree(self.out / run, folder))

    def check(self, run: str, file: str, damage: str) -> Counter[str]:
        """How often the three commands said so ("said"), showed and left what they do without damage
        ("harmless"), or showed what is left of a file without a hash ("unsealed"); and under a sentence of
        its own what is wrong."""
        folder = self.copy(run)
        DAMAGES[damage](folder / file, random.Random(f"{self.seed} {run} {file} {damage}"))
        seen = self.look(folder)
        found = Counter(
            self._of_reader(command, run, file, *answer, self.shown[run][command][1])
            for command, answer in seen.items()
        )
        found[self._of_run(file)] += 1
        where = f"{run}, {file}, {damage}"
        return Counter({key if key in FINE else f"{where}: {key}": n for key, n in found.items()})

    def look(self, folder: Path) -> dict[str, tuple[int, str]]:
        """By command that only reads, its exit code and what it shows, or says."""
        page = self.out / PAGE
        commands = {
            "status": ["status", str(folder), "--json"],
            "report": ["report", str(folder), "--out", str(page)],
        }
        return {name: (self._command(words), self._shown(name, page)) for name, words in commands.items()}

    def _command(self, words: list[str]) -> int:
        log = self.out / "look.log"
        log.unlink(missing_ok=True)
        (self.out / PAGE).unlink(missing_ok=True)
        child = multiprocessing.get_context("fork").Process(target=quiet, args=(words, log))
        child.start()
        child.join(60)
        if child.is_alive():
            child.kill()
            raise AssertionError(f"{words} hangs")
        return child.exitcode

    def _shown(self, command: str, page: Path) -> str:
        said = (self.out / "look.log").read_text(encoding="utf-8", errors="replace")
        if command == "report" and page.is_file():
            return page.read_text(encoding="utf-8", errors="replace")
        if command == "status" and said.startswith("{"):
            return json.dumps({k: v for k, v in json.loads(said).items() if k != "written"})
        return said

    def _of_reader(self, command: str, run: str, file: str, code: int, shown: str, wanted: str) -> str:
        if "Traceback" in shown:
            return f"{command}: a traceback"
        if code == REFUSED:
            return self._said(file, shown, command)
        if code == 0 and shown == wanted:
            return "harmless"
        newest = max((self.out / run).glob("updates/*"), default=None)
        before = (run, self.out / run / file) == ("half", newest)  # the folder is as before it was written
        return (
            "unsealed" if before or (run, file) in UNSEALED else f"{command}: other words without a warning"
        )

    def _said(self, file: str, words: str, command: str) -> str:
        named = Path(file).name in words or str(self.out / NAME) in words
        return "said" if named else f"{command}: said without a name"

    def _of_run(self, file: str) -> str:
        code, log = self.points.run(NAME), self.out / f"{NAME}.log"
        words = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        if "Traceback" in words:
            return "run: a traceback"
        if code == REFUSED:
            return self._said(file, words, "run")
        if code:
            return f"run: exit code {code}"
        return "harmless" if left(self.out / NAME) == self.points.wanted else "run: other results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_intermixed_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="damage"))
    out.mkdir(parents=True, exist_ok=True)
    damaged = Damaged(load_recipe(given.recipe, given.overrides), out, given.seed)
    counts: Counter[str] = Counter()
    for case in list(damaged.cases())[:: given.every]:
        for found, times in damaged.check(*case).items():
            counts[found if found in FINE else "wrong"] += times
            if found not in FINE:
                print(found, flush=True)
    print(f"{counts.total()} commands: {dict(counts)}")


if __name__ == "__main__":
    main()

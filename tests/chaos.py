"""Kill a run at random moments, damage what it left, and see that it ends as one that nobody killed.

`python tests/chaos.py RECIPE [--kills 100] [--seed 0] [--processes 1] [--out FOLDER] [KEY=VALUE ...]` runs
the recipe once straight through, then again and again with kills, until there were as many; prints how many
hit which phase. It fails if scores, predictions or weights of one process differ by a bit, or scores of
several processes by more than rounding.
"""

import argparse
import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

from codyra_llm.cli import main
from codyra_llm.config.recipe import Recipe, load_recipe
from codyra_llm.core.files import read_jsonl
from codyra_llm.store.folder import RunFolder

CODES = {0, 75}  # finished, or stopped as asked
ENDLESS = 3600  # seconds; no run takes so long


class Chaos:
    """Runs of `recipe` under `out`, each killed at moments that `seed` draws."""

    def __init__(self, recipe: Recipe, out: Path, seed: int, processes: int = 1):
        self.out, self.processes, self.random = out, processes, random.Random(seed)
        self.raw = recipe.model_dump(mode="json")
        self.hits: Counter[str] = Counter()
        began = time.monotonic()
        assert self.wait(self.start("straight")) == 0
        self.length = time.monotonic() - began

    def go(self, kills: int) -> int:
        """As many kills over as many runs as it takes; returns the number of runs."""
        rounds = 0
        while sum(self.hits.values()) < kills:
            rounds += 1
            self.one(f"run{rounds}", kills)
            assert self.scores(f"run{rounds}") == self.scores("straight"), (
                f"run{rounds} ended with other scores"
            )
        return rounds

    def one(self, name: str, kills: int) -> None:
        """One run to its end, killed now and then."""
        while True:
            process, left = self.start(name), kills - sum(self.hits.values())
            last = (
                self.length / 2 if self.processes == 1 else self.length
            )  # launched ones import all packages first
            if self.wait(process, self.random.uniform(0, last) if left > 0 else None) is not None:
                return
            self.kill(process, name)
            self.damage(self.out / name)

    def start(self, name: str):
        """The run as a process: forked from this one, which has loaded all packages, or by a launcher."""
        raw = {**self.raw, "output": str(self.out / name)}
        file = self.out / f"{name}.json"
        file.write_text(json.dumps(raw))
        if self.processes == 1:
            child = multiprocessing.get_context("fork").Process(
                target=quiet, args=(["run", str(file)], self.out / f"{name}.log")
            )
            child.start()
            return child
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(self.processes),
            "-m",
            "codyra_llm",
            "run",
            str(file),
        ]
        with open(self.out / f"{name}.log", "a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self, process, seconds: float | None = None) -> int | None:
        """Its exit code; None where it still runs. A run that fails by itself is what this looks for."""
        if isinstance(process, subprocess.Popen):
            try:
                code = process.wait(seconds or ENDLESS)
            except subprocess.TimeoutExpired:
                code = None
        else:
            process.join(seconds or ENDLESS)
            code = process.exitcode
        if code is None and seconds is None:
            process.kill()
            raise AssertionError(f"the run did not end within {ENDLESS} s; see the logs in {self.out}")
        assert code in (None, 0), f"the run failed with exit code {code}; see the logs in {self.out}"
        return code

    def kill(self, process, name: str) -> None:
        """A kill that nothing can be done against, or one time in four a request; of several processes, any
        one.
        """
        asked = self.random.random() < 0.25
        self.hits[phase(self.out / name) + (", asked" if asked else "")] += 1
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        victim = family[0] if asked or self.processes == 1 else self.random.choice(family)
        victim.send_signal(signal.SIGTERM if asked else signal.SIGKILL)
        if isinstance(process, subprocess.Popen):
            process.wait(120)
            psutil.wait_procs(family, 120)
        else:
            process.join(120)
            assert process.exitcode in CODES | {-signal.SIGKILL, -signal.SIGTERM}, process.exitcode

    def damage(self, folder: Path) -> None:
        """What a crash can leave: a half temporary file, a line that was cut off while the log grows, a
        checkpoint whose blocks were lost.
        """
        if not folder.is_dir():
            return
        kind = self.random.choice(["nothing", "temporary", "line", "checkpoint"])
        if kind == "temporary":
            (folder / ".scores.jsonl.99999").write_text('{"after": ')
        grows = "log.jsonl" not in RunFolder(folder).seals.noted
        if kind == "line" and grows and (folder / "log.jsonl").is_file():
            with open(folder / "log.jsonl", "a") as file:
                file.write('{"task": "ON')
        if kind == "checkpoint":
            for file in sorted(folder.glob("progress/*/*.safetensors"))[-1:]:
                os.truncate(file, file.stat().st_size // 2)

    def scores(self, name: str) -> dict:
        """What one process must reproduce by the bit, several to rounding."""
        folder = self.out / name
        if self.processes > 1:
            return {
                (row["step"], row["task"]): round(row["score"], 6)
                for row in read_jsonl(folder / "scores.jsonl")
            }
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*.jsonl")
            if file.name not in ("costs.jsonl", "log.jsonl")
        } | {"hash of all updates": RunFolder(folder).archive().lineage[-1]}


def quiet(arguments: list[str], log: Path) -> None:
    """The command line in a forked process, its words in a file."""
    gc.freeze()  # its collections need not walk, and so copy, what it was forked with
    torch.set_num_threads(1)  # threads that its parent had are not there
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8", buffering=1)
    main(arguments)


def phase(folder: Path) -> str:
    """What the run was at, by what lies in its folder."""
    if not (folder / "manifest.json").is_file():
        return "before its first file"
    learnt = len(list(folder.glob("updates/*.safetensors")))
    steps = [row["step"] for row in read_jsonl(folder / "scores.jsonl")]
    if learnt and steps.count(learnt) < learnt:
        return "evaluating"
    return "writing the end" if (folder / "report.html").is_file() else "loading or learning"


def chaos() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    for name, default in (("kills", 100), ("seed", 0), ("processes", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    given = parser.parse_intermixed_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="chaos"))
    out.mkdir(parents=True, exist_ok=True)
    run = Chaos(load_recipe(given.recipe, given.overrides), out, given.seed, given.processes)
    print(f"straight through: {run.length:.0f} s")
    rounds = run.go(given.kills)
    print(
        f"{sum(run.hits.values())} kills in {rounds} runs, all scores equal: {dict(run.hits.most_common())}"
    )


if __name__ == "__main__":
    chaos()

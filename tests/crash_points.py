"""Stop a run at each of its file operations in turn, and see that it ends as one that nothing happened to.

`python tests/crash_points.py [RECIPE] --out FOLDER [--modes exit,half] [--every 1] [--twice] [KEY=VALUE ...]`
takes what would be left if the recipe's run ended in each mode at each (or every N-th) of its operations,
gives the same command again, and compares updates, scores and predictions with those of the run itself.
Without a recipe: two tasks of a tiny model, with a checkpoint after every step, a method that keeps a state,
and answers to open prompts. With `--twice` the resumed run is ended in the same mode as well, at one of its
own operations.

Nothing but the resumed runs takes long. What a crash, half a file or a loss of power leaves is noted while
one run goes on; on a full disk, and where it is asked to stop, a copy of its process ends so. Points that
leave the same bytes are resumed once. What was found is added to points.jsonl in the folder; what is there, a
repeated command passes over.
"""

import argparse
import gc
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from chaos import quiet
from file_operations import MODES, Captures, Content, Then, Watch, content, ends, lay, nothing
from tiny import SIZES, save_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from codyra_llm.cli import main as command
from codyra_llm.config.recipe import Recipe, load_recipe, parse_recipe
from codyra_llm.core.files import append_jsonl, read_jsonl
from codyra_llm.store import lock
from codyra_llm.store.folder import RunFolder

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly, however many there are


class Points:
    """Runs of `recipe` below `out`, each ended at a point and begun again.

    They are forked from this process after one run in it, so that none imports, compiles or caches anew; the
    first run's results, for which all of that was new, must be those of the straight run.
    """

    def __init__(self, recipe: Recipe, out: Path):
        self.raw, self.out = recipe, out
        self._warm_up()
        assert self.run("straight") == 0, (out / "straight.log").read_text()
        self.operations = self.operations_of("straight")
        self.wanted = left(out / "straight")
        assert left(out / "first") == self.wanted

    def _warm_up(self) -> None:
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the forked processes
        with (
            open(self.out / "first.log", "w", encoding="utf-8") as log,
            redirect_stdout(log),
            redirect_stderr(log),
            suppress(SystemExit),
        ):
            command(["run", str(self._recipe("first"))])
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()
        gc.freeze()  # collections of the forked processes need not walk, and so copy, what is there

    def _recipe(self, name: str) -> Path:
        file = self.out / f"{name}.json"
        settings = self.raw.model_copy(update={"output": str(self.out / name)})
        file.write_text(settings.model_dump_json())
        return file

    def operations_of(self, name: str) -> list[str]:
        """Those of the last run of this name that was not to end at one."""
        return (self.out / f"{name}.operations").read_text().splitlines()

    def run(self, name: str, mode: str | None = None, at: int | None = None) -> int:
        """The exit code of the command in a process of its own."""
        return self._forked(name, nothing if mode is None else ends(mode, at))

    def captured(self, name: str, wanted: Callable[[int], list[str]]) -> tuple[int, Captures]:
        """The exit code of the command, and what would have been left on its way (see `Captures`)."""
        captures, file = Captures(wanted), self.out / f"{name}.captures"
        code = self._forked(name, captures, file)
        with open(file, "rb") as stream:
            captures.states, captures.codes, captures.data = pickle.load(stream)
        return code, captures

    def _forked(self, name: str, then: Then, captures: Path | None = None) -> int:
        child = multiprocessing.get_context("fork").Process(
            target=self._work, args=(self._recipe(name), self.out / name, then, captures)
        )
        child.start()
        child.join(3000 if captures else 300)
        if child.is_alive():
            child.kill()
            raise AssertionError(f"{name}: it hangs")
        return child.exitcode

    def _work(self, recipe: Path, folder: Path, then: Then, captures: Path | None) -> None:
        lock.BEAT = 1e6  # its thread would write to a folder that is put aside
        watch, own = Watch(folder.absolute(), then), multiprocessing.current_process().pid
        watch.install()
        try:
            quiet(["run", str(recipe)], folder.with_suffix(".log"))
        finally:
            watch.within = True
            if own == os.getpid() and (then is nothing or captures):
                folder.with_suffix(".operations").write_text("\n".join(watch.names))
            if own == os.getpid() and captures:
                captures.write_bytes(pickle.dumps((then.states, then.codes, then.data)))

    def check(self, mode: str, at: int, again: int | None = None) -> str | None:
        """What is wrong after a run that ended at operation `at`, and where `again` is given once more at
        that operation of the second run; None where nothing is."""
        name = f"{mode}-{at}"
        for point in [at] if again is None else [at, again]:
            code = self.run(name, mode, point)
            if code not in MODES[mode] | {0}:
                return f"{name}: exit code {code} at operation {point}, expected {sorted(MODES[mode])}"
        wrong = self.resumed(name)
        if not wrong:
            self.forget(name)
        return wrong and f"{name}, {self.operations[at - 1]}: {wrong}"

    def resumed(self, name: str) -> str | None:
        return self.wrong(name, self.run(name))

    def wrong(self, name: str, code: int) -> str | None:
        """What is wrong with a run that ended with `code`."""
        log = self.out / f"{name}.log"
        told = log.read_text() if log.is_file() else ""
        if code != 0:
            return f"the resumed run ended with {code}: {told[-300:]}"
        if "Traceback" in told:
            return f"a traceback: {told[-300:]}"
        return None if left(self.out / name) == self.wanted else "other results"

    def forget(self, name: str) -> None:
        shutil.rmtree(self.out / name, ignore_errors=True)
        for kind in ("json", "log", "operations", "captures"):
            (self.out / f"{name}.{kind}").unlink(missing_ok=True)


def left(folder: Path) -> dict:
    """What a run must leave to the bit: scores, predictions, and the hashes of all updates."""
    rows = {
        str(file.relative_to(folder)): [timeless(row) for row in read_jsonl(file)]
        for file in sorted(folder.rglob("*.jsonl"))
        if file.name not in ("costs.jsonl", "log.jsonl")
    }
    return rows | {"updates": RunFolder(folder).archive().lineage[-1]}


def timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "seconds"}


class Series:
    """All points, and what came of each, in a file that grows by a line for each."""

    def __init__(self, points: Points, file: Path, modes: list[str], every: int, twice: bool):
        self.points, self.file, self.twice = points, file, twice
        self.rows = {self._key(row): row for row in read_jsonl(file)}
        self.length = len(points.operations)  # of the last resumed run
        numbers = range(1, len(points.operations) + 1, every)
        self.left = {
            at: [mode for mode in modes if self._key(self._row(mode, at)) not in self.rows] for at in numbers
        }
        self.by_state: dict[str, dict] = {}

    def _row(self, mode: str, at: int) -> dict:
        operation = re.sub(r"\.\d+(?=/|$)", "", self.points.operations[at - 1])  # without the process's id
        return {"mode": mode, "at": at, "operation": operation, "twice": self.twice}

    def _key(self, row: dict) -> tuple:
        return row["mode"], row["at"], row["operation"], row["twice"]

    def go(self) -> None:
        self.points.forget("run")
        code, captures = self.points.captured("run", lambda at: self.left.get(at, []))
        assert code == 0 and self.points.wrong("run", 0) is None
        assert len(self.points.operations_of("run")) == len(self.points.operations)
        for at, modes in self.left.items():
            for mode in modes:
                self._add(mode, at, captures)

    def _add(self, mode: str, at: int, captures: Captures) -> None:
        row, before = self._row(mode, at), spent()
        if (mode, at) not in captures.states:  # what the run had open is not in a copy of its folder
            shutil.rmtree(self.points.out / "run", ignore_errors=True)
            captures.note(mode, at, self.points.run("run", mode, at), content(self.points.out / "run"))
        code = captures.codes[mode, at]
        state = f"{captures.digest(mode, at)} {mode if self.twice else ''}"
        if code not in MODES[mode]:
            row["wrong"] = f"exit code {code}, expected {sorted(MODES[mode])}"
        elif first := self.by_state.get(state):
            row |= {"as": [first["mode"], first["at"]], "wrong": first["wrong"]}
        else:
            row["wrong"] = self._resume(mode, at, captures.content(mode, at), row)
        row["seconds"] = round(spent() - before, 3)
        self.by_state.setdefault(state, row)
        self.rows[self._key(row)] = row
        append_jsonl(self.file, row)
        if row["wrong"]:
            print(row, flush=True)

    def _resume(self, mode: str, at: int, found: Content, row: dict) -> str | None:
        run = self.points.out / "run"
        run.with_suffix(".log").unlink(missing_ok=True)
        lay(run, found)
        if not self.twice:
            return self.points.resumed("run")
        # Far from each other for neighbouring points, and in the end all over the resumed run.
        again = 1 + int(at * GOLDEN % 1 * self.length)
        code, captures = self.points.captured("run", lambda number: [mode] if number == again else [])
        operations = self.points.operations_of("run")
        self.length = len(operations)
        wrong = self.points.wrong("run", code)
        if wrong or (mode, again) not in captures.states:
            return wrong
        row |= {"again": again, "again_operation": operations[again - 1]}
        run.with_suffix(".log").unlink(missing_ok=True)
        lay(run, captures.content(mode, again))
        code = captures.codes[mode, again]
        if code not in MODES[mode]:
            return f"exit code {code} the second time, expected {sorted(MODES[mode])}"
        return self.points.resumed("run")

    def table(self) -> Iterator[str]:
        """By mode: points, how many leave something of their own, how many ended equal, CPU seconds."""
        for mode in MODES:
            for twice in (False, True):
                rows = [row for row in self.rows.values() if (row["mode"], row["twice"]) == (mode, twice)]
                own = sum("as" not in row for row in rows)
                equal = sum(row["wrong"] is None for row in rows)
                seconds = sum(row["seconds"] for row in rows)
                if rows:
                    name = f"{mode}, twice" if twice else mode
                    yield f"{name}: {len(rows)} points, {own} resumed, {equal} equal, {seconds:.0f} CPU s"


def spent() -> float:
    """CPU seconds of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def small(out: Path) -> Recipe:
    """A recipe whose run does each kind of thing to files, and little else."""
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1}, tie_word_embeddings=False)
    save_tiny(out / "model", LlamaForCausalLM, config)
    for task in ("ONE", "TWO"):
        (out / "data" / task).mkdir(parents=True, exist_ok=True)
        for split, count in (("train", 8), ("eval", 1), ("test", 2)):
            rows = [{"prompt": f"{task} {split} {i}:", "answer": "AB"[i % 2]} for i in range(count)]
            (out / "data" / task / f"{split}.json").write_text(json.dumps(rows), "utf-8")
    (out / "open.json").write_text(json.dumps([{"prompt": "Why?"}]), "utf-8")
    return parse_recipe(
        {
            "model": {"path": str(out / "model")},
            "data": {"root": str(out / "data"), "tasks": ["ONE", "TWO"], "epochs": 2},
            "method": {"name": "codyra_drift", "rank": 2, "samples": 2, "sample_tokens": 4},
            "optim": {"lr": 1e-2, "batch_size": 8},
            "eval": {"max_new_tokens": 2},
            "open_ended": {"prompts": str(out / "open.json"), "max_new_tokens": 2},
            "save": {"minutes": 1e-9},
            "output": str(out / "run"),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True, help="in memory, if there is such a file system")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--twice", action="store_true")
    given = parser.parse_intermixed_args()
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("first", "straight"):
        shutil.rmtree(out / name, ignore_errors=True)
    recipe = load_recipe(given.recipe, given.overrides) if given.recipe else small(out)
    points = Points(recipe, out)
    print(f"{len(points.operations)} operations", flush=True)
    series = Series(points, out / "points.jsonl", given.modes.split(","), given.every, given.twice)
    series.go()
    print(*series.table(), f"{spent():.0f} CPU s in all", sep="\n")


if __name__ == "__main__":
    main()

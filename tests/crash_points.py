"""Stop a run at each of its file operations in turn, and see that it ends as one that nothing happened to.

`python tests/crash_points.py RECIPE [--modes exit,half,...] [--every 1] [--out FOLDER] [KEY=VALUE ...]`
counts the operations of the recipe's run, and for every mode and every N-th of them starts a run, has it end
there, gives the same command again, and compares updates, scores and predictions with those of the first run.
"""

import argparse
import builtins
import errno
import io
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from chaos import quiet
from transformers import LlamaForCausalLM

from codyra_llm.config.recipe import Recipe, load_recipe
from codyra_llm.core import tensors
from codyra_llm.core.files import read_jsonl
from codyra_llm.experiment import run as runs
from codyra_llm.store.folder import RunFolder

LOADED = (runs, LlamaForCausalLM)  # what the forked processes need is imported once, here
CRASHED, STOPPED, REFUSED = 77, 75, 2
# mode: what happens at the operation, and the exit codes that may follow (0: too late to matter)
MODES = {
    "exit": {CRASHED},  # as SIGKILL: what was written is there
    "half": {CRASHED},  # the file that is being written is cut to half
    "power": {CRASHED},  # as a loss of power: only what was synced is there
    "full": {REFUSED, 0},  # from here on the disk is full
    "asked": {STOPPED, 0},  # SIGTERM
}
CALLS = ("replace", "rename", "mkdir", "rmdir", "unlink", "remove", "fsync")


class Disk:
    """What would survive a loss of power: of every file the bytes at its last fsync, of every folder the
    names at its last fsync. A name in the way to what is synced survives with it, as journals have it."""

    def __init__(self, root: Path):
        self.root = root
        self.synced: dict[int, bytes] = {}  # by inode
        self.names: dict[Path, dict[str, tuple[int, bool]]] = {}  # by folder: inode, whether a folder
        for path in sorted(root.rglob("*")):  # what lies there when a run begins has survived
            self.sync(path)

    def sync(self, path: Path) -> None:
        if path.is_file():
            self.synced[path.stat().st_ino] = path.read_bytes()
        elif path.is_dir():
            self.names[path] = {entry.name: (entry.stat().st_ino, entry.is_dir()) for entry in path.iterdir()}
        while path != self.root and path.is_relative_to(self.root):
            self.names.setdefault(path.parent, {})[path.name] = (path.stat().st_ino, path.is_dir())
            path = path.parent

    def begin(self, path: Path) -> None:
        """A file that is opened for writing: nothing of it is synced, whatever had its inode before."""
        self.synced.pop(path.stat().st_ino, None)

    def lose(self) -> None:
        """Leave of the folder what survives, without the lock: one that is empty is waited for a minute."""
        content = {path: data for path, data in self._surviving(self.root) if path.name != "lease.json"}
        shutil.rmtree(self.root, ignore_errors=True)
        for path, data in content.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if data is None:
                path.mkdir(exist_ok=True)
            else:
                path.write_bytes(data)

    def _surviving(self, folder: Path):
        for name, (inode, is_folder) in self.names.get(folder, {}).items():
            if is_folder:
                yield folder / name, None
                yield from self._surviving(folder / name)
            else:
                yield folder / name, self.synced.get(inode, b"")


class Operations:
    """Counts the operations below `root` in this process, and does `mode` at number `at`."""

    def __init__(self, root: Path, mode: str | None = None, at: int | None = None):
        self.root, self.mode, self.at, self.count, self.full = root, mode, at, 0, False
        self.disk = Disk(root) if mode == "power" else None
        self.log: list[str] = []
        self.within = False

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        self.open = io.open
        io.open = self._open
        builtins.open = self._open
        self.save = tensors.save_file
        tensors.save_file = self._save_file

    def _path(self, place) -> Path | None:
        if isinstance(place, int):
            with suppress(OSError):
                place = os.readlink(f"/proc/self/fd/{place}")
        with suppress(TypeError):
            path = Path(os.fsdecode(place)).absolute()
            return path if path.is_relative_to(self.root) else None
        return None

    def _watched(self, name: str, real: Callable) -> Callable:
        def call(place, *args, **kwargs):
            path = self._path(place)
            if path is None or self.within or ".lease" in path.name or path.name == "lease.json":
                return real(place, *args, **kwargs)
            self._reached(f"{name} {path.relative_to(self.root)}", path)
            done = real(place, *args, **kwargs)
            if name == "fsync" and self.disk:
                self.disk.sync(path)
            return done

        return call

    def _open(self, file, mode="r", *args, **kwargs):
        path = self._path(file) if set(mode) & set("wax+") and not self.within else None
        if path is None or ".lease" in path.name or path.name == "lease.json":
            return self.open(file, mode, *args, **kwargs)
        self._reached(f"open {path.relative_to(self.root)}", path)
        opened = self.open(file, mode, *args, **kwargs)
        if self.disk and "w" in mode:
            self.disk.begin(path)
        closing = opened.close

        def close() -> None:
            was_open = not opened.closed
            closing()
            if was_open:
                self._reached(f"written {path.relative_to(self.root)}", path, written=True)

        opened.close = close
        return opened

    def _save_file(self, values, path, metadata=None):
        place = Path(path).absolute()
        if not place.is_relative_to(self.root):
            return self.save(values, path, metadata)
        self._reached(f"open {place.relative_to(self.root)}", place)
        self.save(values, path, metadata)
        self._reached(f"written {place.relative_to(self.root)}", place, written=True)

    def _reached(self, what: str, path: Path, written: bool = False) -> None:
        """One more operation; here the run ends, if it is the one. `half` takes effect at the end of a file's
        writing, and is a plain exit elsewhere."""
        self.count += 1
        self.log.append(what)
        if self.count != self.at and not self.full:
            return
        if self.mode == "full":
            self.full = True
            if what.split()[0] in ("open", "written", "mkdir"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return
        if self.mode == "asked":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.within = True
        if self.mode == "half" and written and path.is_file():
            os.truncate(path, path.stat().st_size // 2)
        if self.disk:
            self.disk.lose()
        os._exit(CRASHED)


class Points:
    """Runs of `recipe` below `out`, each ended at a point and begun again."""

    def __init__(self, recipe: Recipe, out: Path):
        self.raw, self.out = recipe, out
        assert self.run("straight") == 0, (out / "straight.log").read_text()
        self.operations = (out / "straight.operations").read_text().splitlines()
        self.wanted = left(out / "straight")

    def run(self, name: str, mode: str | None = None, at: int | None = None) -> int:
        """The exit code of the command in a process of its own."""
        recipe, folder = self.out / f"{name}.json", self.out / name
        recipe.write_text(self.raw.model_copy(update={"output": str(folder)}).model_dump_json())
        child = multiprocessing.get_context("fork").Process(
            target=self._work, args=(recipe, folder, mode, at)
        )
        child.start()
        child.join(300)
        if child.is_alive():
            child.kill()
            raise AssertionError(f"{name}: it hangs")
        return child.exitcode

    def _work(self, recipe: Path, folder: Path, mode: str | None, at: int | None) -> None:
        operations = Operations(folder.absolute(), mode, at)
        operations.install()
        try:
            quiet(["run", str(recipe)], folder.with_suffix(".log"))
        finally:
            operations.within = True
            if mode is None:
                folder.with_suffix(".operations").write_text("\n".join(operations.log))

    def check(self, mode: str, at: int, again: int | None = None) -> str | None:
        """What is wrong after a run that ended at operation `at`, and where `again` is given once more at
        that operation of the second run; None where nothing is."""
        name = f"{mode}-{at}"
        codes = MODES[mode]
        for point in [at] if again is None else [at, again]:
            code = self.run(name, mode, point)
            if code not in codes | {0}:
                return f"{name}: exit code {code} at {self._what(point)}, expected {sorted(codes)}"
        code = self.run(name)
        log = self.out / f"{name}.log"
        told = log.read_text() if log.is_file() else ""
        wrong = None
        if code != 0:
            wrong = f"{name}: the second run ended with {code} after {self._what(at)}: {told[-300:]}"
        elif "Traceback" in told:
            wrong = f"{name}: a traceback after {self._what(at)}"
        elif left(self.out / name) != self.wanted:
            wrong = f"{name}: other results after {self._what(at)}"
        if not wrong:
            shutil.rmtree(self.out / name)
            log.unlink(missing_ok=True)
        return wrong

    def _what(self, at: int) -> str:
        return self.operations[at - 1] if at <= len(self.operations) else f"operation {at}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--twice", action="store_true", help="end the second run as well, half as far on")
    parser.add_argument("--out", type=Path)
    given = parser.parse_intermixed_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="crash"))
    out.mkdir(parents=True, exist_ok=True)
    points = Points(load_recipe(given.recipe, given.overrides), out)
    print(f"{len(points.operations)} operations", flush=True)
    counts: Counter[str] = Counter()
    for mode in given.modes.split(","):
        for at in range(1, len(points.operations) + 1, given.every):
            counts[mode] += 1
            if wrong := points.check(mode, at, at // 2 + 1 if given.twice else None):
                counts[f"{mode}, wrong"] += 1
                print(wrong, flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()

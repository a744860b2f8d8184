"""The file operations of a run below its folder: what they are, an end at one of them, and what would be
left.

`Watch` calls a function at each operation of this process. `ends` ends the process there; `Captures` notes
what would be left if it ended there, and lets it go on.
"""

import builtins
import errno
import hashlib
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from codyra_llm.core import tensors

CRASHED, STOPPED, REFUSED = 77, 75, 2
# mode: what happens at the operation, and the exit codes that may follow (0: too late to matter)
MODES = {
    "exit": {CRASHED},  # as SIGKILL: what was written is there
    "half": {CRASHED},  # the file that is being written is cut to half
    "power": {CRASHED},  # as a loss of power: only what was synced is there
    "full": {REFUSED, 0},  # from here on the disk is full
    "asked": {STOPPED, 0},  # SIGTERM
}
HANGS = 300  # seconds, after which a process that was to end is killed
CALLS = ("replace", "rename", "mkdir", "rmdir", "unlink", "remove", "fsync")

Content = dict[Path, bytes | None]  # by path below the folder; None: a folder
Then = Callable[["Watch", "Operation"], None]


class Operation(NamedTuple):
    kind: str  # one of CALLS, or "open" for writing, or "written" when such a file is closed
    path: Path

    @property
    def needs_space(self) -> bool:
        return self.kind in ("open", "written", "mkdir")


class Watch:
    """Calls `then` at each operation below `root` in this process, just before it. The lock is left out,
    since another thread renews it."""

    def __init__(self, root: Path, then: Then):
        self.root, self.then, self.disk = root, then, Disk(root)
        self.names: list[str] = []  # of the operations so far
        self.within = False  # what `then` does is not watched

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        self.open = io.open
        io.open = self._open
        builtins.open = self._open
        self.save = tensors.save_file
        tensors.save_file = self._save_file

    @property
    def count(self) -> int:
        return len(self.names)

    def _path(self, place, within: int | None = None) -> Path | None:
        """The path below the root that a call means by `place`: a path, a file descriptor, or a name in the
        folder of the descriptor `within`, as `shutil.rmtree` gives it."""
        if self.within:
            return None
        with suppress(OSError, TypeError):
            if isinstance(place, int):
                place = os.readlink(f"/proc/self/fd/{place}")
            folder = os.getcwd() if within is None else os.readlink(f"/proc/self/fd/{within}")
            path = Path(folder, os.fsdecode(place))
            if path.is_relative_to(self.root) and ".lease" not in path.name and path.name != "lease.json":
                return path
        return None

    def _watched(self, name: str, real: Callable) -> Callable:
        def call(place, *args, **kwargs):
            path = self._path(place, kwargs.get("dir_fd"))
            if path is None:
                return real(place, *args, **kwargs)
            self._reached(name, path)
            done = real(place, *args, **kwargs)
            if name == "fsync":
                self.disk.sync(path)
            elif name == "mkdir":
                self.disk.begin(path)
            return done

        return call

    def _open(self, file, mode="r", *args, **kwargs):
        path = self._path(file) if set(mode) & set("wax+") else None
        if path is None:
            return self.open(file, mode, *args, **kwargs)
        self._reached("open", path)
        is_new = "w" in mode or not path.exists()
        opened = self.open(file, mode, *args, **kwargs)
        if is_new:
            self.disk.begin(path)
        closing = opened.close

        def close() -> None:
            was_open = not opened.closed
            closing()
            if was_open and not self.within:
                self._reached("written", path)

        opened.close = close
        return opened

    def _save_file(self, values, path, metadata=None):
        place = self._path(Path(path).absolute())
        if place is None:
            return self.save(values, path, metadata)
        self._reached("open", place)
        self.save(values, path, metadata)
        self.disk.begin(place)
        self._reached("written", place)

    def _reached(self, kind: str, path: Path) -> None:
        self.names.append(f"{kind} {path.relative_to(self.root)}")
        self.within = True
        try:
            self.then(self, Operation(kind, path))
        finally:
            self.within = False


class Disk:
    """What would survive a loss of power: of every file the bytes at its last fsync, of every folder the
    names at its last fsync. A name in the way to what is synced survives with it, as journals have it."""

    def __init__(self, root: Path):
        self.root = root
        self.numbers: dict[int, int] = {}  # by inode, which the next file may be given: one of ours
        self.synced: dict[int, bytes] = {}  # by number of a file
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}  # by that of a folder: and whether a folder
        self.made = 0
        for path in sorted(root.rglob("*")):  # what lies there when a run begins has survived
            self.sync(path)

    def begin(self, path: Path) -> None:
        """A file or folder that was made: nothing of it is synced, whatever had its inode before."""
        self.made += 1
        self.numbers[path.stat().st_ino] = self.made

    def sync(self, path: Path) -> None:
        number, is_folder = self._node(path)
        if is_folder:
            self.names[number] = {entry.name: self._node(entry) for entry in path.iterdir()}
        else:
            with io.FileIO(path) as file:
                self.synced[number] = file.readall()
        while path != self.root and path.is_relative_to(self.root):
            self.names.setdefault(self._node(path.parent)[0], {})[path.name] = self._node(path)
            path = path.parent

    def survivors(self) -> Content:
        """Without the lock: one that is empty is waited for a minute."""
        if not self.root.is_dir():
            return {}
        found = dict(self._below(self.root, self._node(self.root)[0]))
        return {
            path.relative_to(self.root): data for path, data in found.items() if path.name != "lease.json"
        }

    def _node(self, path: Path) -> tuple[int, bool]:
        inode = path.stat().st_ino
        if inode not in self.numbers:
            self.begin(path)
        return self.numbers[inode], path.is_dir()

    def _below(self, folder: Path, node: int) -> Iterator[tuple[Path, bytes | None]]:
        for name, (number, is_folder) in self.names.get(node, {}).items():
            yield folder / name, None if is_folder else self.synced.get(number, b"")
            if is_folder:
                yield from self._below(folder / name, number)


def content(folder: Path) -> Content:
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {name: None if path.is_dir() else path.read_bytes() for name, path in found.items()}


def lay(folder: Path, content: Content) -> None:
    """Make the folder anew with that in it; without content there is none."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in content.items():
        path = folder / name
        (path if data is None else path.parent).mkdir(parents=True, exist_ok=True)
        if data is not None:
            path.write_bytes(data)


def left_by(mode: str, watch: Watch, operation: Operation) -> Content:
    """What is in the folder after a crash at the operation."""
    if mode == "power":
        return watch.disk.survivors()
    found = content(watch.root)
    if mode == "half" and operation.kind == "written":
        name = operation.path.relative_to(watch.root)
        data = found[name]
        found[name] = data[: len(data) // 2]
    return found


def goes_on(mode: str) -> Then:
    """What happens from an operation on in the modes after which the process ends by itself."""

    def full(watch: Watch, operation: Operation) -> None:
        if operation.needs_space:
            raise OSError(errno.ENOSPC, "No space left on device")

    def asked(watch: Watch, operation: Operation) -> None:
        watch.then = nothing
        os.kill(os.getpid(), signal.SIGTERM)

    return {"full": full, "asked": asked}[mode]


def nothing(watch: Watch, operation: Operation) -> None:
    """A run that goes through."""


def ends(mode: str, at: int) -> Then:
    """The process ends in that way at that operation."""

    def then(watch: Watch, operation: Operation) -> None:
        if watch.count != at:
            return
        if mode in ("full", "asked"):
            watch.then = goes_on(mode)
            watch.then(watch, operation)
            return
        if mode != "exit":  # which leaves the folder as it is
            lay(watch.root, left_by(mode, watch, operation))
        os._exit(CRASHED)

    return then


class Captures:
    """At each operation what would be left if the process ended there, for the modes of `wanted(number)`."""

    def __init__(self, wanted: Callable[[int], list[str]]):
        self.wanted = wanted
        self.states: dict[tuple[str, int], dict[Path, str | None]] = {}
        self.codes: dict[tuple[str, int], int] = {}
        self.data: dict[str, bytes] = {}

    def __call__(self, watch: Watch, operation: Operation) -> None:
        at = watch.count
        for mode in self.wanted(at):
            if mode not in ("full", "asked"):
                self.note(mode, at, CRASHED, left_by(mode, watch, operation))
            elif not _has_open(watch.root) and not self._fork(mode, watch, operation):
                return  # the child, which goes on as if this had been its end

    def content(self, mode: str, at: int) -> Content:
        state = self.states[mode, at]
        return {name: None if key is None else self.data[key] for name, key in state.items()}

    def digest(self, mode: str, at: int) -> str:
        """Equal for what has equal names and bytes."""
        state = sorted((str(name), key) for name, key in self.states[mode, at].items())
        return hashlib.sha256(repr(state).encode()).hexdigest()

    def note(self, mode: str, at: int, code: int, content: Content) -> None:
        keys = {
            name: None if data is None else hashlib.sha256(data).hexdigest() for name, data in content.items()
        }
        self.data |= {key: content[name] for name, key in keys.items() if key is not None}
        self.states[mode, at], self.codes[mode, at] = keys, code

    def _fork(self, mode: str, watch: Watch, operation: Operation) -> bool:
        """Whether this is the process that forked. The other ends in a copy of the folder at its path."""
        aside = watch.root.with_name(f"{watch.root.name}-aside")
        had = watch.root.is_dir()
        if had:
            os.rename(watch.root, aside)
            shutil.copytree(aside, watch.root)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            signal.alarm(HANGS)
            watch.then = goes_on(mode)
            watch.then(watch, operation)
            return False
        status = os.waitpid(child, 0)[1]
        self.note(mode, watch.count, os.waitstatus_to_exitcode(status), content(watch.root))
        shutil.rmtree(watch.root, ignore_errors=True)
        if had:
            os.rename(aside, watch.root)
        return True


def _has_open(root: Path) -> bool:
    """Whether this process has anything below `root` open, which a copy of the folder would not be."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if Path(os.readlink(f"/proc/self/fd/{number}")).is_relative_to(root):
                return True
    return False

"""Checkpoints inside a task: all that training needs to continue after a step, with any number of
processes."""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256, replacing, write_json
from codyra_llm.core.parsing import read_mapping
from codyra_llm.core.tensors import save_tensors
from codyra_llm.store import observer

if TYPE_CHECKING:
    from codyra_llm.config.sections import SaveSection


log = logging.getLogger(__name__)
SHARD = 2 << 30  # bytes of tensors per file
MARK = "complete.json"  # written last: the hashes of the files


class Progress:
    """The checkpoints inside one task: folders `<run>/progress/<index>-<task>-<step>/` with tensors in
    safetensors files and everything small in `complete.json`.

    The first process writes and removes them, all processes read them. `parent`: the lineage of the updates
    before the task; a checkpoint that was made on others is not used. `section`: how often one is due, and
    how many are kept."""

    def __init__(
        self,
        folder: Path,
        index: int,
        task: str,
        parent: str,
        section: "SaveSection",
        may_write: Callable[[], None],
    ):
        self.folder, self.name, self.parent, self.section = folder, f"{index:02d}-{task}", parent, section
        self.may_write = may_write
        self.saved = time.monotonic()

    def due(self, last: bool) -> bool:
        """Whether a checkpoint is due. After the `last` step of a task a minute is enough, since what a
        method does at the end of the task may take long."""
        minutes = self.section.minutes
        if minutes is None:
            return False
        wait = min(minutes, 1) if last else minutes
        return time.monotonic() - self.saved >= 60 * wait

    def save(self, step: int, tensors: Iterable[tuple[str, Tensor]], small: dict) -> None:
        """Write the checkpoint after step `step`; `tensors` are taken one by one, and written in files of
        `SHARD` bytes.
        """
        with replacing(self._path(step)) as temporary:
            temporary.mkdir()
            files = {}
            for number, shard in enumerate(_shards(tensors)):
                name, digest = self._shard(temporary, number, shard)
                files[name] = digest
            mark = {"step": step, "parent": self.parent, **small, "files": files}
            write_json(temporary / MARK, {**mark, "digest": _digest(mark)})
            self.may_write()
        self._remove_others(step)
        self.saved = time.monotonic()

    def _remove_others(self, step: int) -> None:
        """Remove all checkpoints but the last ones up to `step`, as many as are kept."""
        # Later ones are damaged, since the run continued from an earlier one; if they stayed, every restart
        # would report them again.
        for later in [path for path in self._paths() if path > self._path(step)]:
            shutil.rmtree(later)
        for old in self._paths()[: -self.section.keep]:
            shutil.rmtree(old)

    def newest(self) -> Path | None:
        """The last undamaged checkpoint of this task and run; logs which are damaged."""
        for path in reversed(self._paths()):
            try:
                self.check(path)
                return path
            except Fault as fault:
                log.info("%s; continuing from the state before it", fault)
        return None

    def check(self, path: Path) -> None:
        """Raises Fault where a file of the checkpoint isn't what was written."""
        mark = read_mapping(path / MARK, "what a checkpoint holds")
        if mark.pop("digest", None) != _digest(mark):
            raise Fault(f"{path / MARK} is damaged")
        if mark.get("parent") != self.parent:
            raise Fault(f"{path} was made on other updates than those in {self.folder.parent / 'updates'}")
        for name, digest in mark["files"].items():
            if not (path / name).is_file() or file_sha256(path / name) != digest:
                raise Fault(f"{path / name} is damaged or missing")

    def _path(self, step: int) -> Path:
        return self.folder / f"{self.name}-{step:08d}"

    def _paths(self) -> list[Path]:
        """In the order of steps."""
        found = self.folder.glob("*") if self.folder.is_dir() else []
        return sorted(path for path in found if re.fullmatch(re.escape(self.name) + r"-\d{8}", path.name))

    def _shard(self, folder: Path, number: int, tensors: dict[str, Tensor]) -> tuple[str, str]:
        """Write one file; returns its name and hash."""
        name = f"{number:03d}.safetensors"
        observer.at(f"file {number + 1} of a checkpoint of {self.name}")
        save_tensors(tensors, folder / name)
        return name, file_sha256(folder / name)


def _digest(mark: dict) -> str:
    return hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()


def small(path: Path) -> dict:
    """What a checkpoint holds in addition to its tensors."""
    return json.loads((path / MARK).read_text(encoding="utf-8"))


def tensors(path: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint whose names begin with `prefix`, one by one. Raises Fault where a file
    can't be read.
    """
    for name in small(path)["files"]:
        try:
            with safe_open(path / name, "pt") as file:
                wanted = [key for key in file.keys() if key.startswith(prefix)]
                # Copies, since safetensors maps the file into memory and reads it only when a tensor is used.
                # By then a later checkpoint may have replaced the file. On a network file system that would
                # end a process on another machine, and on this one the folder could not be removed.
                yield from ((key, file.get_tensor(key).clone()) for key in wanted)
        except SafetensorError as error:
            raise Fault(
                f"{path / name} can't be read ({error}); remove {path} to continue from what is before it"
            ) from None


def _shards(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors on the CPU, in parts of at most `SHARD` bytes (or of one tensor that is larger)."""
    shard, size = {}, 0
    for key, tensor in pairs:
        if shard and size + tensor.nbytes > SHARD:
            yield shard
            shard, size = {}, 0
        shard[key] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    yield shard

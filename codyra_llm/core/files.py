"""Files that appear whole or not at all, and records that are appended line by line."""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError

from codyra_llm.core.errors import Fault

CHUNK = 1 << 24  # bytes per read when hashing and copying


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name next to `path` to write a file or folder to. When the block succeeds it is
    synced to disk and renamed to `path`, with the mode that the umask asks for (safetensors writes 0600
    whatever the umask). A link stays, and what it leads to is replaced: checkpoints may lie on another disk.
    Raises Fault where the disk is full or can't be written."""
    path = path.resolve() if path.is_symlink() else path
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # left by a process that had the same id
        yield temporary
        for file in _files(temporary):
            file.chmod(0o666 & ~umask())
            sync(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from None
    finally:
        _remove(temporary)


def _files(path: Path) -> list[Path]:
    """`path` itself, or all files in that folder."""
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def umask() -> int:
    """The process's umask, which can only be read by setting it. It is set to the strictest for that moment,
    so that a file which another thread creates meanwhile is too private rather than too open."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def unwritable(path: Path, error: Exception) -> Fault:
    """The fault for a path that can't be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return Fault(
        f"{path} can't be written ({reason}); free some space or correct the path, then give the same "
        "command again: it goes on from what is there"
    )


def room_faults(place: Path, needed: int, key: str = "output") -> list[str]:
    """What keeps a command from writing `needed` bytes to `place`, which was given as `key`: the part of its
    path that exists has to be a writable folder with enough space."""
    there = next(p for p in (place.absolute(), *place.absolute().parents) if os.path.lexists(p))
    try:
        with TemporaryFile(dir=there):  # permissions, quotas and read-only mounts show only by trying
            free = shutil.disk_usage(there).free
    except OSError as error:
        return [
            f"{key}: {place} can't be written, since {there} takes no file ({error.strerror}); choose "
            f"another {key}"
        ]
    needed += 64 << 20
    if free >= needed:
        return []
    return [
        f"{key}: {place} needs about {needed / 1e9:.1f} GB, {there} has {free / 1e9:.1f} GB free; free some, "
        f"or choose another {key}"
    ]


def sync(path: Path) -> None:
    """Make sure that a file's content, or the names in a folder, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed within `replacing` left in `folder` and below."""
    renewed = f".lease.{os.getpid()}"  # the thread that renews this process's lease may be writing it now
    for path in [p for p in folder.rglob(".*") if is_leftover(p.name) and p.name != renewed]:
        _remove(path)


def is_leftover(name: str) -> bool:
    """Whether this is a temporary name that `replacing` makes."""
    return re.fullmatch(r"\..+\.\d+", name) is not None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def await_file(path: Path, seconds: float = 90) -> None:
    """Wait until a file that another node wrote is visible here: network file systems cache directory
    listings."""
    end = time.monotonic() + seconds
    while path not in path.parent.glob("*"):
        if time.monotonic() > end:
            raise Fault(
                f"{path} was written by the first process and is not seen by this one; give an output on a "
                f"file system that all nodes share"
            )
        time.sleep(0.5)


def to_json(value: Any) -> str:
    """`value` as the text of a JSON file."""
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def to_jsonl(rows: list[dict]) -> str:
    """The rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, to_json(value))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write a JSONL file, whole or not at all."""
    write_text(path, to_jsonl(rows))


def append_jsonl(path: Path, row: dict) -> None:
    """Add a row to a JSONL file. It is not synced, and a crash may cut off the last line, so use it for
    records that a resumed run writes again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise unwritable(path, error) from None


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSONL file; none where there is no file. A last line cut off by a crash is left out.
    Raises Fault for any other line that is not JSON."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1]  # splitlines() would split at U+2028 too
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            raise Fault(f"{path}, line {number}: this is not JSON; restore the file from a copy") from None
    return rows

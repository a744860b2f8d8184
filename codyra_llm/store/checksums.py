"""The sha256 of a folder's files, which shows whether a file was truncated, altered or lost."""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256, replacing, sync, write_json
from codyra_llm.core.parsing import read_mapping

NAME = "seals.json"


class Seals:
    """`seals.json` of a folder: for each file the hashes that it may have. One process writes it. In a
    process without `checks` all files are accepted as they are.

    Both hashes, the old one ('' if there is no file) and the new one, are recorded before the rename, and the
    new one alone after it, so a crash at any moment leaves a file that matches one of them.
    """

    def __init__(self, folder: Path, checks: bool = True):
        self.folder, self.file, self.checks = folder, folder / NAME, checks

    @property
    def noted(self) -> dict[str, list[str]]:
        """The hashes that each file may have, by its path below the folder."""
        return read_mapping(self.file, "the hashes that the run noted") if self.file.is_file() else {}

    @contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """`files.replacing` for one file, with its hash recorded."""
        with replacing(path) as temporary:
            yield temporary
            if path.is_file():
                # Appended lines must survive a loss of power, as their hash will.
                sync(path)
            new, old = file_sha256(temporary), _present(path)
            self._note(path, [new, old])
        # From here on only the new content is valid: if both hashes stayed, a file that lost its last line
        # could pass as the old one.
        self._note(path, [new])

    def check(self, path: Path) -> None:
        """Raise Fault unless the file is as it was written; a file without a recorded hash passes."""
        if not self.holds(path):
            raise Fault(self._wrong(path))

    def holds(self, path: Path) -> bool:
        """Whether the file is as it was written, or has no recorded hash."""
        # Checked twice: the file may have been replaced between reading its recorded hash and reading it.
        return not self.checks or self._fits(path) or self._fits(path)

    def _fits(self, path: Path) -> bool:
        hashes = self.noted.get(self._name(path))
        return hashes is None or _present(path) in hashes

    def check_all(self, but: Container[str]) -> None:
        """`check` of every file that has a recorded hash, except for those below the folders `but`. Raises
        one Fault that names each file which is not as it was written."""
        noted = self.noted if self.checks else {}
        files = [self.folder / name for name in noted if name.partition("/")[0] not in but]
        suspect = [file for file in files if _present(file) not in noted[self._name(file)]]
        # An active run may have replaced them since its hashes were read here.
        damaged = [file for file in suspect if not self.holds(file)]
        if damaged:
            raise Fault(*map(self._wrong, damaged))

    def forget(self, path: Path) -> None:
        """Remove the hash of a file that is about to be appended to."""
        noted = self.noted
        if noted.pop(self._name(path), None):
            write_json(self.file, noted)

    def _wrong(self, path: Path) -> str:
        what = "was changed or damaged since it was written" if path.is_file() else "is missing"
        return (
            f"{path} {what} ({self.file} has its hash); restore it from a copy, or begin again in another "
            "output"
        )

    def _note(self, path: Path, hashes: list[str]) -> None:
        write_json(self.file, {**self.noted, self._name(path): hashes})

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _present(path: Path) -> str:
    return file_sha256(path) if path.is_file() else ""

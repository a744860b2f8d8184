"""The sha256 of a folder's files, which shows whether one was cut short, altered or lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256, replacing, write_json
from codyra_llm.core.parsing import read_mapping

NAME = "seals.json"


class Seals:
    """`seals.json` of a folder: for each file the hashes that it may have. One process writes; one without
    `checks` accepts files as they are.

    Both hashes, the old one ('' if there is no file) and the new one, are recorded before the rename, so a
    crash at any moment leaves a file that matches one of them.
    """

    def __init__(self, folder: Path, checks: bool = True):
        self.folder, self.file, self.checks = folder, folder / NAME, checks

    @property
    def noted(self) -> dict[str, list[str]]:
        return read_mapping(self.file, "the hashes that the run noted") if self.file.is_file() else {}

    @contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """`files.replacing` for one file, with its hash recorded."""
        with replacing(path) as temporary:
            yield temporary
            new, old = file_sha256(temporary), _present(path)
            self._note(path, [new, old])
        if not old:  # from here on a missing file is a lost one
            self._note(path, [new])

    def check(self, path: Path) -> None:
        """Raise Fault unless the file is as it was written; a file without a recorded hash passes."""
        hashes = self.noted.get(self._name(path)) if self.checks else None
        if hashes is None or _present(path) in hashes:
            return
        what = "was changed or damaged since it was written" if path.is_file() else "is missing"
        raise Fault(
            f"{path} {what} ({self.file} has its hash); restore it from a copy, or begin again in another "
            "output"
        )

    def _note(self, path: Path, hashes: list[str]) -> None:
        write_json(self.file, {**self.noted, self._name(path): hashes})

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _present(path: Path) -> str:
    return file_sha256(path) if path.is_file() else ""

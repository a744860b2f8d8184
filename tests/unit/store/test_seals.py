"""A file of a run that was torn, altered or lost is named, and a crash between two writes is none of
these.
"""

import json
import os

import pytest

from codyra_llm.core import files
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import read_jsonl, remove_leftovers, replacing
from codyra_llm.store import checksums
from codyra_llm.store.checksums import Seals
from codyra_llm.store.folder import RunFolder


def write(sealed: Seals, name: str, text: str) -> None:
    with sealed.replacing(sealed.folder / name) as temporary:
        temporary.write_text(text)


def test_what_was_written_passes_and_all_else_is_named(tmp_path):
    sealed = Seals(tmp_path)
    for text in ("one", "two", "three"):
        write(sealed, "sub/a.txt", text)
        sealed.check(tmp_path / "sub" / "a.txt")
    (tmp_path / "sub" / "a.txt").write_text("threa")
    with pytest.raises(Fault, match="a.txt was changed or damaged"):
        Seals(tmp_path).check(tmp_path / "sub" / "a.txt")
    (tmp_path / "sub" / "a.txt").unlink()
    with pytest.raises(Fault, match="a.txt is missing"):
        Seals(tmp_path).check(tmp_path / "sub" / "a.txt")
    Seals(tmp_path).check(tmp_path / "never written")


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("dies_at", ["the seals", "the file"])
def test_a_crash_between_file_and_seals_is_no_damage(dies_at, existed, tmp_path, monkeypatch):
    sealed, file = Seals(tmp_path), tmp_path / "a.txt"
    if existed:
        write(sealed, "a.txt", "one")
    replace = files.os.replace

    def dying(source, target):
        if (target.name == checksums.NAME) == (dies_at == "the seals"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "replace", dying)
        write(sealed, "a.txt", "two")
    for _ in range(2):  # and once more in the same place
        assert file.exists() == existed and (not existed or file.read_text() == "one")
        Seals(tmp_path).check(file)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files.os, "replace", dying)
            write(sealed, "a.txt", "two")
    write(sealed, "a.txt", "three")
    Seals(tmp_path).check(file)
    write(sealed, "b.txt", "one")
    (tmp_path / "b.txt").unlink()
    with pytest.raises(Fault, match="b.txt is missing"):
        Seals(tmp_path).check(tmp_path / "b.txt")


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with (
        pytest.raises(
            Fault, match=r"a.txt can't be written \(No space left on device\).* same command again"
        ),
        replacing(tmp_path / "a.txt") as temporary,
    ):
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (
        tmp_path / "a.txt"
    ).read_text() == "old"


def test_content_is_on_disk_before_it_has_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """Else a loss of power leaves an empty file under the new name, or takes back what was said to be done.
    Files are known by their inodes, which a new name does not change."""
    done, fsync, replace = [], os.fsync, os.replace

    def syncing(handle):
        done.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def renaming(old, new):
        done.append(("replace", os.stat(old).st_ino))
        replace(old, new)

    monkeypatch.setattr(files.os, "fsync", syncing)
    monkeypatch.setattr(files.os, "replace", renaming)
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a.txt").write_text("new")
    file, folder, parent = (
        path.stat().st_ino for path in (tmp_path / "folder" / "a.txt", tmp_path / "folder", tmp_path)
    )
    assert done == [("fsync", file), ("replace", folder), ("fsync", parent)]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "updates").mkdir()
    (tmp_path / "updates" / ".00-ONE.safetensors.4711").write_text("half")
    (tmp_path / ".checkpoint.4711").mkdir()
    (tmp_path / ".checkpoint.4711" / "half").write_text("half")
    for kept in (".hidden", "scores.jsonl", "run.4711"):
        (tmp_path / kept).write_text("kept")
    remove_leftovers(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {
        "updates",
        ".hidden",
        "scores.jsonl",
        "run.4711",
    }


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / ".vimrc.20240101").write_text("x")
    with pytest.raises(Fault, match="holds files of something else"):
        RunFolder(tmp_path).clear_up()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "thesis.tex").unlink()  # what is left could be of a run that was killed in its first write
    RunFolder(tmp_path).clear_up()
    assert not list(tmp_path.iterdir())


def test_lines_that_are_no_rows(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_jsonl(file) == [{"a": 1}, {"a": 2}]  # cut off by a crash
    file.write_bytes(b'{"a": 1}\n{"a": \xff\n{"a": 3}\n')
    with pytest.raises(Fault, match="line 2"):
        read_jsonl(file)


def test_every_damaged_file_is_named_at_once(tmp_path):
    sealed = Seals(tmp_path)
    for name in (
        "scores.jsonl",
        "predictions/01-ONE/ONE.jsonl",
        "state/00.bin",
        "summary.json",
        "costs.jsonl",
    ):
        write(sealed, name, name)
    RunFolder(tmp_path).check_results()
    (tmp_path / "predictions" / "01-ONE" / "ONE.jsonl").unlink()
    for name in ("scores.jsonl", "state/00.bin", "summary.json"):
        (tmp_path / name).write_text("other")
    with pytest.raises(Fault) as raised:
        RunFolder(tmp_path).check_results()
    first, second = raised.value.messages
    assert "scores.jsonl was changed or damaged" in first and "ONE.jsonl is missing" in second
    with pytest.raises(Fault, match="codyra-llm report .* writes it again"):
        _ = RunFolder(tmp_path).summary


def test_a_file_as_it_was_before_its_last_change_is_damaged(tmp_path):
    sealed = Seals(tmp_path)
    write(sealed, "costs.jsonl", "one\n")
    write(sealed, "costs.jsonl", "one\ntwo\n")
    (tmp_path / "costs.jsonl").write_text("one\n")  # half of it
    with pytest.raises(Fault, match="costs.jsonl was changed or damaged"):
        Seals(tmp_path).check(tmp_path / "costs.jsonl")


def test_a_file_that_grows_has_no_hash(tmp_path):
    sealed = Seals(tmp_path)
    write(sealed, "log.jsonl", "one\n")
    sealed.forget(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text("one\ntwo\n")
    sealed.check(tmp_path / "log.jsonl")
    assert "log.jsonl" not in json.loads((tmp_path / "seals.json").read_text())
    sealed.forget(tmp_path / "log.jsonl")

"""TRACE's data over a network, from a server on this machine that does well or badly. Oracle: the files that
were packed."""

import errno
import hashlib
import os
import threading
import time

import pytest
from archives import BENCHMARK, files, laid_out, packed
from helpers import call
from own_benchmark import faults
from served import body, chunked, moved, served, stalled, status

from codyra_llm.data import fetch
from codyra_llm.data.fetch import AUTHORS, COPY, get


@pytest.fixture
def web():
    """The address of a server, and its answers by path."""
    answers = {}
    with served(answers) as address:
        yield address, answers


class Heard(list):
    """What a download says of how it goes."""

    def __call__(self, done, whole):
        self.append((done, whole))


@pytest.fixture
def archive(tmp_path):
    return packed(tmp_path / "t.tar.xz", files("x")).read_bytes()


EXPECTED = {name[2:]: content for name, content in files("x").items()}


def fetched(tmp_path, address, **options):
    """The files that an address gives; nothing else is left."""
    (folder,) = get("trace", tmp_path / "out", None, address, **options)
    assert folder.name == BENCHMARK and [path.name for path in (tmp_path / "out").iterdir()] == [BENCHMARK]
    return laid_out(folder)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz", "tar.xz"])
@pytest.mark.parametrize("nesting", ["", "TRACE/data/x", f"a b/{BENCHMARK}"])
def test_an_archive_of_any_kind_and_nesting(tmp_path, web, kind, nesting):
    address, answers = web
    data = packed(tmp_path / f"t.{kind}", files(nesting)).read_bytes()
    answers[f"/{BENCHMARK}.{kind}"] = body(data)
    found = fetched(tmp_path, f"{address}/{BENCHMARK}.{kind}?raw=1")
    assert {f"{nesting}/{name}".lstrip("/"): content for name, content in found.items()} == files(nesting)


def test_a_name_may_come_from_where_it_was_moved_to_or_from_the_server(tmp_path, web, archive):
    address, answers = web
    answers |= {
        "/a": moved("/b"),
        "/b": moved(f"{address}/{BENCHMARK}.tar.xz?token=1"),
        f"/{BENCHMARK}.tar.xz": body(archive),
        "/content": body(archive, Content_Disposition=f'attachment; filename="../../{BENCHMARK}.tar.xz"'),
    }
    assert fetched(tmp_path / "1", f"{address}/a") == EXPECTED
    assert fetched(tmp_path / "2", f"{address}/content") == EXPECTED
    answers["/none"] = body(archive)
    (message,) = faults(get, "trace", tmp_path / "3", None, f"{address}/none")
    assert f"{address}/none does not say which variant it is; give --variant" in message


def test_a_length_that_is_not_told_or_an_encoding(tmp_path, web, archive):
    address, answers = web
    path = f"/{BENCHMARK}.tar.xz"
    answers[path] = chunked(archive)
    assert fetched(tmp_path / "1", address + path) == EXPECTED
    tar = packed(tmp_path / "t.tar.gz", files("x")).read_bytes()
    answers[path] = body(tar, Content_Encoding="gzip")  # as some servers call a .tar.gz
    assert fetched(tmp_path / "2", address + path) == EXPECTED


def test_progress_is_heard(tmp_path, web, archive):
    address, answers = web
    data = packed(tmp_path / "t.tar", files("x") | {"x/FOMC/more.bin": bytes(300_000)}).read_bytes()
    for path, answer, whole in (("/1", body(data), len(data)), ("/2", chunked(data), None)):
        heard = Heard()
        answers[f"{path}/{BENCHMARK}.tar"] = answer
        fetched(tmp_path / path[1:], f"{address}{path}/{BENCHMARK}.tar", seen=heard)
        sizes = [done for done, _ in heard]
        assert sizes == sorted(sizes) and sizes[-1] == len(data) and len(sizes) >= 3
        assert {told for _, told in heard} == {whole}


@pytest.mark.parametrize(
    "make, expected, remedy",
    [
        (lambda data: status(404), "can't be fetched (404 Not Found)", "check the address, or download"),
        (lambda data: status(403), "can't be fetched (403 Forbidden)", "check the address, or download"),
        (
            lambda data: moved("/x"),
            "can't be fetched (302 The HTTP server returned a redirect",
            "check the a",
        ),
        (lambda data: moved("ftp://127.0.0.1:1/x"), "can't be fetched (", "check the network, or download"),
        (
            lambda data: moved("file:///etc/passwd"),
            "can't be fetched (302 Found - Redirection to url",
            "check",
        ),
        (lambda data: body(b"<html>Log in"), "gives no archive, perhaps a page for browsers", "download"),
        (
            lambda data: body(data, length=len(data) + 1000),
            "(it ended early), and nothing is kept",
            "give the command again, or download",
        ),
        (lambda data: chunked(data, ends=False), "broke off after 0.0 MB (", "give the command again, or"),
        (lambda data: body(data, length=len(data) // 2), "t.tar.xz", "download"),
        (lambda data: body(data, length=1 << 40), "holds more than 8 GiB", "give TRACE's archive"),
    ],
)
def test_a_server_that_does_badly_is_one_sentence(tmp_path, web, archive, make, expected, remedy):
    address, answers = web
    answers["/x"] = make(archive)
    address += "/x"
    (message,) = faults(get, "trace", tmp_path / "out", "500", address)
    assert message.startswith(address) and expected.replace("t.tar.xz", address) in message
    assert remedy in message and "\n" not in message and str(tmp_path / "out" / ".get") not in message
    if "download" in remedy and "again" not in remedy:
        assert "download it again" in message or (AUTHORS in message and COPY in message)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_server_that_falls_silent_is_given_up(tmp_path, monkeypatch, web, archive):
    monkeypatch.setattr(fetch, "PATIENCE", 0.3)
    address, answers = web
    until = threading.Event()
    answers["/x.zip"] = stalled(archive, until)
    try:
        (message,) = faults(get, "trace", tmp_path / "out", "500", f"{address}/x.zip")
    finally:
        until.set()
    assert "broke off after 0.0 of 0.0 MB (timed out), and nothing is kept; give the command" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_the_public_copy_must_be_what_its_authors_published(tmp_path, monkeypatch, web, archive):
    """Oracle of the checksum: `git hash-object`'s definition."""
    address, answers = web
    path = f"/{BENCHMARK}.tar.xz"
    monkeypatch.setattr(fetch, "COPY", address + path)
    answers[path] = body(archive)
    (message,) = faults(get, "trace", tmp_path / "out")
    assert "gives other bytes than its authors published; download" in message
    name = hashlib.sha1(b"blob %d\0%s" % (len(archive), archive)).hexdigest()
    monkeypatch.setattr(fetch, "COPY_BLOB", name)
    (folder,) = get("trace", tmp_path / "out")
    assert laid_out(folder) == EXPECTED
    answers.clear()
    (message,) = faults(get, "trace", tmp_path / "out")  # before anything is asked for
    assert f"{folder} exists already; give another folder" in message


def test_a_disk_that_fills_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, web, archive):
    address, answers = web
    answers["/x"] = body(archive)

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (message,) = faults(get, "trace", tmp_path / "out", "500", f"{address}/x", fill)
    assert "can't be written (No space left on device), and nothing is kept; free some space" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_command_left_is_removed_when_it_is_old(tmp_path, web, archive):
    address, answers = web
    answers["/x"] = body(archive)
    for name, age in ((".get-old", 2 * fetch.ABANDONED), (".get-runs", 0)):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        (folder / "archive").write_bytes(b"half")
        past = time.time() - age
        os.utime(folder / "archive", (past, past))
        os.utime(folder, (past, past))
    get("trace", tmp_path / "out", "500", f"{address}/x")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".get-runs", BENCHMARK}


def test_the_command_fetches_and_checks(tmp_path, capsys, web, archive):
    address, answers = web
    answers[f"/{BENCHMARK}.tar.xz"] = body(archive)
    where = f"{address}/{BENCHMARK}.tar.xz"
    code, out, err = call(capsys, "data", "get", "trace", "--from", where, tmp_path / "data")
    assert code == 0 and err == "" and "0 faults" in out
    assert out.startswith(f"fetching {where}, 0.0 MB\ntrace: {tmp_path / 'data' / BENCHMARK}\n")

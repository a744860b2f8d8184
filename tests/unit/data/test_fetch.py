"""TRACE's data out of what people have. Oracle: the files that were packed."""

import stat
import tarfile
import zipfile

import pytest
from archives import BENCHMARK, files, laid_out, packed
from helpers import call
from own_benchmark import faults

from codyra_llm.data import fetch
from codyra_llm.data.fetch import get, unpack


@pytest.mark.parametrize("name", ["t.zip", "t.tar", "t.tar.gz", "t.tgz", "t.tar.xz"])
@pytest.mark.parametrize("nesting", [BENCHMARK, f"a/b c/{BENCHMARK}", f"TRACE/{BENCHMARK}/data"])
def test_an_archive_of_any_kind_and_nesting(tmp_path, name, nesting):
    called = name.replace("t.", f"{BENCHMARK}.") if nesting.endswith("data") else name
    content = {**files(nesting), "README.md": b"hello", f"__MACOSX/{nesting}/FOMC/._train.json": b"\0"}
    archive = packed(tmp_path / called, content)
    (folder,) = get("trace", tmp_path / "data", source=str(archive))
    assert folder == tmp_path / "data" / BENCHMARK
    assert {f"{nesting}/{name}": data for name, data in laid_out(folder).items()} == files(nesting)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [BENCHMARK]  # nothing else is left


def test_a_folder_with_an_archive_in_it(tmp_path):
    """A clone of TreeLoRA's repository."""
    packed(tmp_path / "TreeLoRA" / "data" / f"{BENCHMARK}.tar.xz", files(""))
    (folder,) = get("trace", tmp_path / "data", source=str(tmp_path / "TreeLoRA"))
    assert laid_out(folder) == files("") and folder.name == BENCHMARK


def test_one_variant_or_all_of_them(tmp_path):
    content = {
        **files("t/LLM-CL-Benchmark_500"),
        **files("t/LLM-CL-Benchmark_5000"),
        **files("t/other", ("a",)),
    }
    source = str(packed(tmp_path / "t.zip", content))
    found = get("trace", tmp_path / "all", source=source)
    assert [folder.name for folder in found] == ["LLM-CL-Benchmark_500", "LLM-CL-Benchmark_5000"]
    (folder,) = get("trace", tmp_path / "one", "5000", source)
    assert folder.name == "LLM-CL-Benchmark_5000"
    assert b"_5000 FOMC" in (folder / "FOMC" / "train.json").read_bytes()
    (message,) = faults(get, "trace", tmp_path / "x", "1000", source)
    assert "has no LLM-CL-Benchmark_1000, but LLM-CL-Benchmark_500, LLM-CL-Benchmark_5000; give" in message
    (message,) = faults(get, "trace", tmp_path / "one", "5000", source)
    assert "LLM-CL-Benchmark_5000 exists already; give another folder" in message


def test_tasks_of_no_variant_need_its_name(tmp_path):
    folder = tmp_path / "mine"
    for name, data in files("").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (message,) = faults(get, "trace", tmp_path / "out", None, str(folder))
    assert "does not say which variant it is; give --variant, one of 500, 1000, 5000, Reasoning" in message
    (found,) = get("trace", tmp_path / "out", "Reasoning", str(folder))
    assert found.name == "LLM-CL-Benchmark_Reasoning" and laid_out(found) == files("")


def linked(path, kind):
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("FOMC/train.json")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    return path


def zip_link(path):
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("FOMC/train.json")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return path


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda p: packed(p / "a.tar", {"../FOMC/train.json": b"[]"}), "leads out of the archive"),
        (lambda p: packed(p / "a.zip", {"a/../../train.json": b"[]"}), "leads out of the archive"),
        (lambda p: packed(p / "a.tar", {"/FOMC/train.json": b"[]"}), "leads out of the archive"),
        (lambda p: packed(p / "a.tar", {"C:/train.json": b"[]"}), "leads out of the archive"),
        (lambda p: packed(p / "a.tar", {"..\\train.json": b"[]"}), "leads out of the archive"),
        (lambda p: linked(p / "a.tar", tarfile.SYMTYPE), "is a link or a device"),
        (lambda p: linked(p / "a.tar", tarfile.LNKTYPE), "is a link or a device"),
        (lambda p: linked(p / "a.tar", tarfile.CHRTYPE), "is a link or a device"),
        (lambda p: zip_link(p / "a.zip"), "is a link or a device"),
        (
            lambda p: packed(p / "a.zip", {"a.json": b"0" * 2000}),
            "holds more than 0 GiB; give TRACE's archive",
        ),
        (lambda p: packed(p / "a.tar.xz", {"a.json": b"0" * 2000}), "holds more than 0 GiB"),
        (lambda p: packed(p / "a.zip", {f"{i}.json": b"" for i in range(9)}), "holds more than 8 files"),
    ],
)
def test_an_archive_that_does_harm_is_refused(tmp_path, monkeypatch, make, expected):
    monkeypatch.setattr(fetch, "MOST_BYTES", 1000)
    monkeypatch.setattr(fetch, "MOST_FILES", 8)
    (message,) = faults(unpack, make(tmp_path), tmp_path / "out" / "deep", "A")
    assert message.startswith("A") and expected in message
    assert {path.name for path in tmp_path.iterdir()} <= {"a.zip", "a.tar", "a.tar.xz", "out"}


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.xz"])
def test_an_archive_that_is_cut_off_is_one_sentence(tmp_path, name):
    whole = packed(tmp_path / name, {f"{i}.json": bytes(range(256)) * 40 for i in range(9)}).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (message,) = faults(get, "trace", tmp_path / "out", "500", str(tmp_path / name))
    assert str(tmp_path / name) in message and ("download it again" in message or "is not a zip" in message)


@pytest.mark.parametrize(
    "name, variant, source, expected",
    [
        ("trase", None, None, "'trase' is not a benchmark that is known; give trace. Did you mean 'trace'?"),
        (
            "olora",
            None,
            None,
            "git clone https://github.com/cmnfriend/O-LoRA, and give data.root: O-LoRA/CL_Ben",
        ),
        ("trace", "50", None, "--variant: '50' is none of 500, 1000, 5000, Reasoning; give one of them."),
        (
            "trace",
            "5000",
            None,
            "no copy of 5000 can be fetched without a browser; download https://github.com/",
        ),
        (
            "trace",
            None,
            "nowhere.zip",
            "--from: 'nowhere.zip' is not an archive or folder that is here, an address",
        ),
        ("trace", None, "own/er/x", "--from: 'own/er/x' is not an archive or folder that is here"),
        (
            "trace",
            None,
            "owner/name",
            "'owner/name' can't be had, since the hub can't be reached (HF_HUB_OFFLINE is set); check the",
        ),
        ("trace", None, "http://127.0.0.1:1/a.zip", "http://127.0.0.1:1/a.zip can't be fetched ([Errno 111]"),
    ],
)
def test_what_can_not_be_had_is_one_sentence(tmp_path, monkeypatch, name, variant, source, expected):
    monkeypatch.chdir(tmp_path)
    (message,) = faults(get, name, tmp_path / "out", variant, source)
    assert expected in message


def test_the_command_checks_what_it_wrote(tmp_path, capsys):
    archive = packed(tmp_path / f"{BENCHMARK}.tar.gz", files("x"))
    code, out, _ = call(capsys, "data", "get", "trace", "--from", archive, tmp_path / "data")
    assert code == 0 and "0 faults" in out and f"trace: {tmp_path / 'data' / BENCHMARK}" in out
    bad = files("x") | {"x/FOMC/train.json": b"["}
    archive = packed(tmp_path / "bad" / f"{BENCHMARK}.zip", bad)
    code, out, _ = call(capsys, "data", "get", "trace", "--from", archive, tmp_path / "worse")
    assert code == 1 and "1 faults" in out
    code, _, err = call(capsys, "data", "get", "trace", "--from", tmp_path / "bad.tar", tmp_path / "data")
    assert code == 2 and "is not an archive or folder that is here" in err

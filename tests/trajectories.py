"""Reference trajectories: what each method did on the tiny model, one file per method in trajectories/,
committed.

`pytest tests/runs/test_methods_contract.py -k reference_trajectory --rewrite-trajectories` writes them again.
On the kind of machine that wrote them all must be equal to the last bit; elsewhere, kernels round in another
order, to a tolerance.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from codyra_llm.store.folder import RunFolder

FOLDER = Path(__file__).parent / "trajectories"
LOSS, NORM = 2e-3, 1e-2  # relative tolerances on another machine


def machine() -> str:
    """What may change the last bits: the processor, the instructions that torch uses there, and torch
    itself.
    """
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else "unknown"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def trajectory(folder: RunFolder) -> dict:
    """Losses of every step by task, all scores, a hash of the answers, and of every update its norm and a
    hash.
    """
    log = folder.path / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    losses = {}
    for row in rows:
        losses.setdefault(row["task"], []).append(row["loss"])
    files = sorted((folder.path / "updates").glob("*.safetensors"))
    return {
        "machine": machine(),
        "losses": losses,
        "scores": [[row.step, row.task, row.score] for row in folder.scores],
        "predictions": predictions(folder.path / "predictions"),
        "updates": {file.name: update(load_file(file)) for file in files},
    }


def predictions(folder: Path) -> str:
    """A hash of all answers: the tiny model's are mostly wrong, and score alike."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.jsonl")):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def update(tensors: dict[str, torch.Tensor]) -> dict:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    return {"norm": squares**0.5, "sha256": digest.hexdigest()}


def compare(name: str, found: dict, rewrite: bool) -> None:
    """Assert that `found` is the trajectory that is committed for the method `name`."""
    file = FOLDER / f"{name}.json"
    if rewrite:
        FOLDER.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(file.read_text(encoding="utf-8"))
    if found["machine"] == expected["machine"]:
        assert found == expected
        return
    assert found["losses"].keys() == expected["losses"].keys()
    for task, losses in expected["losses"].items():
        assert found["losses"][task] == pytest.approx(losses, rel=LOSS), task
    norms, wanted = (
        {key: part["norm"] for key, part in side["updates"].items()} for side in (found, expected)
    )
    assert norms == pytest.approx(wanted, rel=NORM)
    assert [row[:2] for row in found["scores"]] == [row[:2] for row in expected["scores"]]

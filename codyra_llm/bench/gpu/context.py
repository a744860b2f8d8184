"""What a stage of `bench gpu` works with: the device, and the file to which each finding is written at
once.
"""

import gc
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

FINDINGS = "findings.jsonl"
NEEDS_GPU = "needs a GPU"
TARGET = "target: "  # the keys of findings for which there is a target begin so


def record(out: Path, stage: str, key: str, value: object) -> None:
    """Add one line {"stage", "key", "value"} to the findings in `out`."""
    line = json.dumps({"stage": stage, "key": key, "value": value}, default=str, ensure_ascii=False)
    with open(out / FINDINGS, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def findings(out: Path) -> list[dict[str, Any]]:
    """All lines so far."""
    file = out / FINDINGS
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


@dataclass
class Context:
    """The context of one stage. `out`: the folder of the findings. `tiny`: use small shapes, which try the
    code and measure nothing."""

    stage: str
    out: Path
    device: torch.device
    tiny: bool
    failed: list[str] = field(default_factory=list)  # keys of parts that raised

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def record(self, key: str, value: object) -> None:
        record(self.out, self.stage, key, value)
        print(f"{self.stage}: {key}: {value}", flush=True)

    def target(self, name: str, value: float) -> None:
        """Record a figure for which there is a target, if it was measured on a GPU in full size."""
        if self.cuda and not self.tiny:
            self.record(TARGET + name, value)

    def attempt(self, key: str, part: Callable[[], object]) -> Any:
        """Run one part of the stage and record what it returns. An error is recorded too: the stage goes on,
        and counts as failed. Returns what `part` returned, None after an error."""
        value = None
        try:
            value = part()
            self.record(key, value)
        except Exception as error:  # whatever it is, the other parts can still find something
            traceback.print_exc()
            self.failed.append(key)
            self.record(key, {"failed": f"{type(error).__name__}: {str(error)[:400]}"})
        self.free()
        return value

    def on_gpu(self, key: str, part: Callable[[], object]) -> Any:
        """`attempt` where there is a GPU; elsewhere it is recorded that one is needed."""
        if self.cuda:
            return self.attempt(key, part)
        return self.record(key, NEEDS_GPU)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, action: Callable[[], object], rounds: int = 5) -> float:
        """Median wall-clock seconds of `action`, until the device is done, after one call that warms up."""
        action()
        times = []
        for _ in range(rounds):
            self.wait()
            began = perf_counter()
            action()
            self.wait()
            times.append(perf_counter() - began)
        return median(times)

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

"""The TRACE benchmark as data: tasks, orders and the settings of the two published protocols (benchmark.yaml)."""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Task:
    """One task; `headline` names, for each accuracy rule, the metric that enters the score matrix."""

    name: str
    epochs: int
    language: str
    metrics: tuple[str, ...]
    headline: dict[str, str]


@dataclass(frozen=True)
class Protocol:
    """Settings of a published set of runs; lengths in tokens, batch size in examples per optimizer step."""

    name: str
    max_prompt_tokens: int
    max_answer_tokens: int
    batch_size: int
    lr: float
    schedule: str
    betas: tuple[float, float]
    loss_average: str
    max_new_tokens: int


_DATA = yaml.safe_load(Path(__file__).with_name("benchmark.yaml").read_text(encoding="utf-8"))

TASKS: dict[str, Task] = {name: Task(name, **{**task, "metrics": tuple(task["metrics"])})
                          for name, task in _DATA["tasks"].items()}
ORDERS: dict[int, tuple[str, ...]] = {number: tuple(names) for number, names in _DATA["orders"].items()}
PROTOCOLS: dict[str, Protocol] = {name: Protocol(name, **{**values, "betas": tuple(values["betas"])})
                                  for name, values in _DATA["protocols"].items()}

"""The rows of a run's files and the stages of a run: the one place that names their keys."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import read_jsonl

BASE = "base"  # the stage before the first task
TASK, GENERAL = "task", "general"  # kinds of scores


@dataclass(frozen=True)
class Stage:
    """A point of a run at which its model can be evaluated: after `step` tasks, the last of which is `after`
    ("base" where none was learnt; "checkpoint" for a model that comes from elsewhere)."""

    step: int
    after: str

    @classmethod
    def of(cls, tasks: list[str], index: int) -> Self:
        """The stage after task `index` of `tasks`; -1: the base."""
        return cls(index + 1, tasks[index] if index >= 0 else BASE)

    @property
    def index(self) -> int:
        """The position of the last task learnt; -1: the base."""
        return self.step - 1

    @property
    def folder(self) -> str:
        """The name of its folder in `predictions/` and `lm_eval/`."""
        return f"{self.step:02d}-{self.after}"


class Row:
    """What the rows have in common: they are read from JSON objects and written as such."""

    @classmethod
    def read(cls, file: Path) -> list[Self]:
        """The rows of a JSONL file, in its order. Raises Fault for a line that lacks a key."""
        return [cls.parse(raw, f"{file}, line {number}") for number, raw in enumerate(read_jsonl(file), 1)]

    @classmethod
    def parse(cls, raw: Any, where: str) -> Self:
        """The row that a JSON object holds. Raises Fault where it is none, or lacks a key."""
        known = [one.name for one in fields(cls)]  # pyright: ignore  # every row is a dataclass
        try:
            return cls(**{name: raw[name] for name in known if name in raw})
        except TypeError:
            raise Fault(
                f"{where}: this is not a row with {', '.join(known)}; restore the file from a copy"
            ) from None

    def as_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return {one.name: getattr(self, one.name) for one in fields(self)}  # pyright: ignore  # as above


@dataclass(frozen=True)
class ScoreRow(Row):
    """A row of scores.jsonl: the scores on one task at one stage. `metrics` has by name {"mean", "low",
    "high", "n"} in points of 0 to 100; `score` is the mean of the metric `headline`, None where there was no
    example. `empty`: how many answers are empty or only white space; `commonest`: the share of the prompts, 0
    to 1, that got the most frequent answer; `cut`: how many answers reached the token limit before they ended
    (None: not known). Only rows of general ability by the harness have the fields after it: the recipe's
    `general.data`, the number of examples in front of each question, the task's version."""

    after: str
    step: int
    task: str
    kind: str
    headline: str
    score: float | None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    empty: int = 0
    commonest: float | None = None
    cut: int | None = None
    source: str | None = None
    shots: int | None = None
    version: Any = None

    @property
    def stage(self) -> Stage:
        return Stage(self.step, self.after)

    @property
    def general(self) -> bool:
        """Whether the task is one of general ability, which is not trained on."""
        return self.kind == GENERAL

    @property
    def interval(self) -> dict[str, Any]:
        """The headline's entry of `metrics`; empty where there is none."""
        return self.metrics.get(self.headline) or {}

    def as_json(self) -> dict[str, Any]:
        optional = ("commonest", "cut", "source", "shots", "version")
        return {
            name: value
            for name, value in super().as_json().items()
            if value is not None or name not in optional
        }


@dataclass(frozen=True)
class FloorRow(Row):
    """A row of floor.jsonl: what a task's most frequent training answer scores where it is given to every
    prompt, without a model. `share`: the part of the training answers, 0 to 1, that equal `answer`;
    `headline`, `score` and `metrics` as in a ScoreRow."""

    task: str
    answer: str
    share: float
    headline: str
    score: float | None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def interval(self) -> dict[str, Any]:
        """The headline's entry of `metrics`; empty where there is none."""
        return self.metrics.get(self.headline) or {}


@dataclass(frozen=True)
class LogRow(Row):
    """A row of log.jsonl: one optimizer step. `terms` are the loss and the method's other terms, by name,
    over the global batch; `eval_loss` is there after steps that were followed by a validation. `tokens`
    counts those of the batch without padding; `seconds` is the wall time of the step."""

    task: str
    step: int
    steps: int
    terms: dict[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    eval_loss: float | None = None
    lr: float | None = None
    kappa: float | None = None
    tokens: int = 0
    micro_batch_tokens: int | None = None
    seconds: float = 0.0

    @property
    def loss(self) -> float | None:
        return self.terms.get("loss")

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / max(self.seconds, 1e-4)

    @classmethod
    def parse(cls, raw: Any, where: str) -> Self:
        known = {one.name for one in fields(cls)}
        if isinstance(raw, dict):
            raw = {**raw, "terms": {name: value for name, value in raw.items() if name not in known}}
        return super().parse(raw, where)

    def as_json(self) -> dict[str, Any]:
        """As a JSON object, the terms among the other values; without those that were not measured."""
        raw = super().as_json()
        place = list(raw).index("terms")
        items = list(raw.items())
        merged = [*items[:place], *self.terms.items(), *items[place + 1 :]]
        return {name: value for name, value in merged if value is not None}


@dataclass(frozen=True)
class CostRow(Row):
    """A row of costs.jsonl: what training on one task took: the number of parameters trained, seconds, and
    the most bytes of memory that any process held (None where the system does not say)."""

    task: str
    trained: int
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class UpdateRow(Row):
    """A row of updates.jsonl: what one task changed at one site. `kept` of `rank` ranks (None for a parameter
    that is trained whole), ‖ΔW‖_F, the drift ‖W - W₀‖_F, and the share of ΔW that survives the cast to the
    model's dtype (None where there is no update)."""

    task: str
    site: str
    rank: int | None
    kept: int | None
    update_norm: float
    drift: float
    surviving: float | None

    @property
    def projection(self) -> str:
        """The last part of the site's name, e.g. q_proj."""
        return self.site.rpartition(".")[2]

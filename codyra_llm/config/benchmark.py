"""A benchmark: a folder whose benchmark.yaml says which tasks there are, in which orders and by which
protocols they are learnt, and how they are scored. TRACE (benchmarks/trace) is one, your own stream of tasks
another."""

from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from codyra_llm.config import plugins
from codyra_llm.config.sections import FILE, SHIPPED
from codyra_llm.config.task import ANY, Task
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import file_sha256
from codyra_llm.core.parsing import PathText, expanded, read_yaml, shown
from codyra_llm.core.schema import Fraction, Positive, Strict, Tokens
from codyra_llm.metrics.many import over_cores
from codyra_llm.metrics.own import SHIPPED as SHIPPED_METRICS
from codyra_llm.metrics.text import METRICS

if TYPE_CHECKING:
    from codyra_llm.config.sections import DataSection


_SHIPPED_AT = Path(str(files("codyra_llm.benchmarks")))  # at the top level of a checkout


class Protocol(Strict, frozen=True):
    """Settings of a set of runs; lengths in tokens, batch size in examples per optimizer step."""

    max_prompt_tokens: Tokens = Field(ge=8)
    max_answer_tokens: Tokens = Field(ge=2)
    max_new_tokens: int = Field(ge=1, le=1 << 20)
    batch_size: Tokens = Field(default=32, ge=1)
    lr: Positive = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    loss_average: Literal["token", "sample"] = "token"


PROBE = Task(metrics=("exact_match",))  # general-ability probes, where a benchmark has no `others`


class Benchmark(Strict, frozen=True):
    """A benchmark.yaml: its tasks, their orders, and the protocols that they are trained and scored under."""

    tasks: dict[str, Task] = Field(min_length=1)
    others: Task | None = Field(
        default=None,
        description="settings of tasks in TRACE's layout that are not listed; default: none are allowed",
    )
    orders: dict[int, tuple[str, ...]] = Field(description="by number; default: one order, that of `tasks`")
    protocols: dict[str, Protocol] = Field(min_length=1, description="by name; the first is the default")
    metrics: PathText | None = Field(
        default=None,
        description="a Python file next to this one with metrics of its own; it is run only where "
        "--plugin names it",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_order(cls, raw: Any) -> Any:
        """A benchmark without `orders` has one, that of `tasks`."""
        tasks = raw.get("tasks")
        return {"orders": {1: list(tasks)}, **raw} if isinstance(tasks, dict) else raw

    @model_validator(mode="after")
    def _names_are_known(self) -> "Benchmark":
        faults = [
            f"orders.{number}: '{name}' is not a task.{nearest(name, self.tasks)} Known: "
            f"{', '.join(self.tasks)}. Correct it, or leave 'orders' out, which gives that one order"
            for number, names in self.orders.items()
            for name in names
            if name not in self.tasks
        ]
        faults += [
            f"orders.{number}: {', '.join(names)} must name at least one task, and each once"
            for number, names in self.orders.items()
            if not names or len(set(names)) < len(names)
        ]
        faults += [
            f"tasks.{name}.headline: it is given by {', '.join(task.headline)}; give one metric, or one "
            f"for each of the protocols, {', '.join(self.protocols)}"
            for name, task in self.tasks.items()
            if set(task.headline) not in (set(), {ANY}, set(self.protocols))
        ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def task(self, name: str) -> Task:
        """The task, or the settings of tasks that the benchmark doesn't name."""
        return self.tasks.get(name) or self.others or PROBE

    def headline(self, name: str, protocol: str) -> str:
        """The metric of a task that enters the score matrix."""
        task = self.task(name)
        return task.headline.get(ANY) or task.headline.get(protocol) or task.metrics[0]

    def score(
        self, name: str, prompts: Sequence[str], predictions: Sequence[str], answers: Sequence[str]
    ) -> dict[str, list[float]]:
        """Scores 0..100 of each example by metric, in the order of the task's metrics. All three of equal
        length. Raises Fault where a metric from outside the package fails.
        """
        metrics = list(self.task(name).metrics)
        scores = _scored_rows(metrics, name, 0, zip(prompts, predictions, answers, strict=True))
        return {metric: list(values) for metric, values in zip(metrics, scores, strict=True)}

    def score_each(self, name: str, rows: Iterable[tuple[str, str, str]]) -> dict[str, "array[float]"]:
        """`score` for a stream of (prompt, prediction, answer), which is not kept in memory. If all metrics
        are shipped ones, the rows are divided among the cores by forking, so the process must have no other
        threads."""
        metrics = list(self.task(name).metrics)
        scores = {metric: array("d") for metric in metrics}
        score = partial(_scored_rows, metrics, name)
        portions = over_cores(score, rows) if set(metrics) <= SHIPPED_METRICS else [score(0, rows)]
        for portion in portions:
            for metric, values in zip(metrics, portion, strict=True):
                scores[metric].extend(values)
        return scores

    def lacks(self, data: "DataSection") -> list[str]:
        """Names in a recipe that this benchmark lacks, one sentence each."""
        faults = []
        if data.protocol not in (None, *self.protocols):
            faults.append(
                f"data.protocol: {shown(data.protocol)} is not a protocol of {data.benchmark}."
                f"{nearest(data.protocol, self.protocols)} Known: {', '.join(self.protocols)}"
            )
        if isinstance(data.tasks, int):
            if data.tasks not in self.orders:
                faults.append(
                    f"data.tasks: there is no order {data.tasks}; choose from {sorted(self.orders)}"
                )
            return faults
        return faults + self.unknown_tasks(data.tasks, "data.tasks: {} is not a task of " + data.benchmark)

    def unknown_tasks(self, names: Sequence[str], sentence: str) -> list[str]:
        """A sentence for each of `names` that is not allowed here: `sentence` with the name in place of its
        first {}, and the nearest task that exists."""
        return [
            f"{sentence.replace('{}', shown(name), 1)}.{nearest(name, self.tasks)} Known: "
            f"{', '.join(self.tasks)}"
            for name in names
            if not self.others and name not in self.tasks
        ]


def _scored_rows(
    metrics: list[str], task: str, first: int, rows: Iterable[tuple[str, str, str]]
) -> list["array[float]"]:
    """The scores of rows by each metric; `first` is the number of the first row."""
    scores = [array("d") for _ in metrics]
    for number, row in enumerate(rows, first):
        for metric, values in zip(metrics, scores, strict=True):
            values.append(_scored(metric, task, number, row))
    return scores


def _scored(metric: str, task: str, number: int, row: tuple[str, str, str]) -> float:
    """The score of one example by one metric. An error in a user's own metric is reported with the example;
    one in a shipped metric is a defect here, and is raised as it is."""
    if metric in SHIPPED_METRICS:
        return METRICS[metric].score(*row)
    try:
        return float(METRICS[metric].score(*row))
    except Exception as error:
        raise Fault(
            f"metric '{metric}' failed on example {number} of {task} ({type(error).__name__}: {error}), "
            f"prediction {shown(row[1])}, answer {shown(row[2])}; correct it where it is defined, "
            f"{METRICS[metric].__module__}"
        ) from error


def benchmark_folder(name: str) -> Path:
    """The folder of a benchmark: that of a shipped one, or the path that `name` is."""
    return _SHIPPED_AT / name if name in SHIPPED else Path(expanded(name))


def load_benchmark(name: str) -> Benchmark:
    """The benchmark of that name or folder. Raises one Fault with everything that is wrong with its file."""
    file = _file(name)
    return _read(file, file.stat().st_mtime_ns)


def digest(name: str) -> str:
    """sha256 of the benchmark's file, which identifies it wherever it is. Raises Fault where there is
    none."""
    return file_sha256(_file(name))


def _file(name: str) -> Path:
    file = benchmark_folder(name) / FILE
    if not file.is_file():
        raise Fault(
            f"data.benchmark: {shown(name)} is neither one of {', '.join(SHIPPED)} nor a folder that holds a "
            f"{FILE}.{nearest(name, SHIPPED)} Give one of them, or start one with `codyra-llm benchmark new "
            "FOLDER`"
        )
    return file


@lru_cache
def _read(file: Path, changed: int) -> Benchmark:
    raw = read_yaml(file, "tasks, orders and protocols, as docs/own_data.md shows them")
    _refuse_unnamed_code(file, raw.get("metrics"))
    try:
        return Benchmark.model_validate(raw)
    except Fault as fault:
        raise Fault(*(f"{file}: {line}" for line in fault.messages)) from None


def _refuse_unnamed_code(file: Path, metrics: Any) -> None:
    """Raises Fault where the benchmark has a file of metrics that the user has not named: benchmarks are
    passed on, and a file of Python can do anything."""
    if not isinstance(metrics, str):
        return
    code = file.parent / metrics
    if not plugins.is_loaded(code):
        raise Fault(
            f"{file}: metrics: {shown(metrics)} is Python code, which runs only where you name it; look at "
            f"it, and add --plugin {code} to the command"
        )

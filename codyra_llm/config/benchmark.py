"""A benchmark: a folder whose benchmark.yaml says which tasks there are, in which orders and by which
protocols they are learnt, and how they are scored. TRACE (benchmarks/trace) is one, a stream of one's own
another."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from codyra_llm import benchmarks  # pyright: ignore  # installed from the top level
from codyra_llm.config import plugins
from codyra_llm.config.sections import FILE, TRACE
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import file_sha256
from codyra_llm.core.parsing import PathText, expanded, read_yaml, shown
from codyra_llm.core.schema import Fraction, Positive, Strict, Tokens, sentences
from codyra_llm.metrics.own import SHIPPED
from codyra_llm.metrics.text import METRICS

if TYPE_CHECKING:
    from codyra_llm.config.sections import DataSection


ANY = "any protocol"


class Splits(Strict, frozen=True):
    """By split its file, or its name in a data set. What is not given is cut out of train
    (docs/own_data.md).
    """

    train: PathText | None = None
    eval: PathText | None = None
    test: PathText | None = None


class Columns(Strict, frozen=True):
    prompt: str = Field(default="prompt", description="column or field that holds the prompt")
    answer: str = Field(default="answer", description="the one that holds the answer")


class DatasetSource(Strict, frozen=True):
    path: PathText = Field(description="id on the hub, or a folder below data.root that `datasets` reads")
    name: str | None = Field(default=None, description="the data set's configuration")
    revision: str | None = Field(default=None, description="branch, tag or commit")
    splits: Splits = Splits()


class Task(Strict, frozen=True):
    """One task. Without `files` and `dataset` its data is in TRACE's layout,
    <data.root>/<task>/{train,eval,test}.json.
    """

    epochs: int = Field(default=1, ge=1, le=1000)
    language: str | None = None
    metrics: tuple[str, ...] = Field(min_length=1, description="all that are reported")
    headline: dict[str, str] = Field(
        default={}, description="the one in the score matrix, or one by protocol; default: the first"
    )
    max_new_tokens: int | None = Field(
        default=None, ge=1, le=1 << 20, description="of an answer; default: the protocol's"
    )
    files: Splits | None = Field(
        default=None, description=".jsonl, .json or .csv below data.root, one or by split"
    )
    dataset: DatasetSource | None = Field(default=None, description="an id on the hub, or a section")
    columns: Columns = Columns()
    messages: str | None = Field(
        default=None,
        description="in place of columns, the field that holds a chat: the model's template "
        "makes the prompt, the assistant's last message is the answer",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        inner = {"headline": ANY, "files": "train", "dataset": "path"}
        return (
            {
                key: {inner[key]: value} if key in inner and isinstance(value, str) else value
                for key, value in raw.items()
            }
            if isinstance(raw, dict)
            else raw
        )

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if not plugins.has_metric(name)]
        if unknown:
            raise ValueError(
                "\n".join(
                    f"{shown(name)} is not a metric.{nearest(name, METRICS)} Known: {', '.join(METRICS)}; "
                    "one of your own is given by --plugin FILE"
                    for name in unknown
                )
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        faults = [
            f"headline: '{name}' is none of the task's metrics "
            f"({', '.join(self.metrics)}).{nearest(name, self.metrics)}"
            for name in self.headline.values()
            if name not in self.metrics
        ]
        if self.files and self.dataset:
            faults.append("'files' and 'dataset' both say where the data is; leave one out")
        if self.messages and "columns" in self.model_fields_set:
            faults.append("'columns' and 'messages' both say what the prompt is; leave one out")
        if not self.declared and (self.messages or "columns" in self.model_fields_set):
            faults.append(
                "'columns' and 'messages' go with 'files' or 'dataset'; give one, or leave them out"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def declared(self) -> bool:
        """Whether the benchmark says where the data is."""
        return bool(self.files or self.dataset)


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


PROBE = Task(metrics=("exact_match",))  # of general ability, where a benchmark says nothing of other tasks


class Benchmark(Strict, frozen=True):
    tasks: dict[str, Task] = Field(min_length=1)
    others: Task | None = Field(
        default=None,
        description="what holds for tasks in TRACE's layout that are not named; default: there may be none",
    )
    orders: dict[int, tuple[str, ...]] = Field(
        description="by number; default: one, as the tasks are written"
    )
    protocols: dict[str, Protocol] = Field(min_length=1, description="by name; the first is the default")
    metrics: PathText | None = Field(
        default=None,
        description="a Python file beside this one with metrics of its own; it is run only where "
        "--plugin names it",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_order(cls, raw: Any) -> Any:
        tasks = raw.get("tasks")
        return {"orders": {1: list(tasks)}, **raw} if isinstance(tasks, dict) else raw

    @model_validator(mode="after")
    def _names_are_known(self) -> "Benchmark":
        faults = [
            f"orders.{number}: '{name}' is not a task.{nearest(name, self.tasks)} Known: "
            f"{', '.join(self.tasks)}"
            for number, names in self.orders.items()
            for name in names
            if name not in self.tasks
        ]
        faults += [
            f"orders.{number}: {', '.join(names)} must name at least one task, and each once"
            for number, names in self.orders.items()
            if len(set(names)) < max(1, len(names))
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
        """The task, or what holds for those that the benchmark doesn't name."""
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
        rows = list(zip(prompts, predictions, answers, strict=True))
        return {metric: _scored(metric, name, rows) for metric in self.task(name).metrics}

    def lacks(self, data: "DataSection") -> list[str]:
        """What a recipe names that is not here, one sentence each."""
        faults = []
        if data.protocol not in (None, *self.protocols):
            faults.append(
                f"data.protocol: {shown(data.protocol)} is not a protocol of {data.benchmark}."
                f"{nearest(data.protocol, self.protocols)} Known: {', '.join(self.protocols)}"
            )
        if isinstance(data.tasks, int):
            return faults + [
                f"data.tasks: there is no order {data.tasks}; choose from {sorted(self.orders)}"
            ] * (data.tasks not in self.orders)
        return faults + self.strangers(data.tasks, "data.tasks: {} is not a task of " + data.benchmark)

    def strangers(self, names: Sequence[str], sentence: str) -> list[str]:
        """Those of `names` that may not be here, each put into a sentence (for its first {}) and with the
        nearest that is.
        """
        return [
            f"{sentence.replace('{}', shown(name), 1)}.{nearest(name, self.tasks)} Known: "
            f"{', '.join(self.tasks)}"
            for name in names
            if not self.others and name not in self.tasks
        ]


def _scored(metric: str, task: str, rows: list[tuple[str, str, str]]) -> list[float]:
    """The scores of one metric. What fails in somebody's own is told with the example; what fails in a
    shipped one is a defect here, and goes on as it is."""
    score = METRICS[metric].score
    if metric in SHIPPED:
        return [score(*row) for row in rows]
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(float(score(*row)))
        except Exception as error:
            raise Fault(
                f"metric '{metric}' failed on example {number} of {task} ({type(error).__name__}: {error}), "
                f"prediction {shown(row[1])}, answer {shown(row[2])}; correct it where it is defined, "
                f"{METRICS[metric].__module__}"
            ) from error
    return found


def benchmark_folder(name: str) -> Path:
    """The folder of a benchmark: that of the shipped one, or the path that `name` is."""
    return Path(benchmarks.__path__[0], name) if name == TRACE else Path(expanded(name))


def load_benchmark(name: str) -> Benchmark:
    """The benchmark of that name or folder. Raises one Fault with all that is wrong with its file."""
    file = _file(name)
    return _read(file, file.stat().st_mtime_ns)


def digest(name: str) -> str:
    """sha256 of the benchmark's file, by which it is known wherever it lies. Raises Fault where there is
    none.
    """
    return file_sha256(_file(name))


def _file(name: str) -> Path:
    file = benchmark_folder(name) / FILE
    if not file.is_file():
        raise Fault(
            f"data.benchmark: {shown(name)} is neither '{TRACE}' nor a folder that holds a {FILE}."
            f"{nearest(name, [TRACE])} Give one of them, or start one with `codyra-llm benchmark new FOLDER`"
        )
    return file


@lru_cache
def _read(file: Path, changed: int) -> Benchmark:
    raw = read_yaml(file, "tasks, orders and protocols, as docs/own_data.md shows them")
    _refuse_unnamed_code(file, raw.get("metrics"))
    try:
        return Benchmark.model_validate(raw)
    except ValidationError as error:
        raise Fault(*(f"{file}: {line}" for line in sentences(error, Benchmark))) from None


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

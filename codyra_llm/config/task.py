"""A task of a benchmark: where its data comes from, how examples are made of it, how it is scored."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from codyra_llm.config import plugins, template
from codyra_llm.config.template import Template
from codyra_llm.core.errors import nearest
from codyra_llm.core.parsing import PathText, shown
from codyra_llm.core.schema import Strict
from codyra_llm.metrics.text import METRICS

ANY = "any protocol"
READING = (  # keys that say how records are read; they need `files` or `dataset`
    "delimiter",
    "records",
    "format",
    "columns",
    "prompt",
    "constants",
    "labels",
    "skip_empty",
    "messages",
    "train_on",
)
CHATS = {"sharegpt": "conversations", "openai": "messages"}  # by format, the field that holds the chat
ALPACA = (  # the prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), with an input and without
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)


class Splits(Strict, frozen=True):
    """By split its file, or its name in a data set. What is not given is cut out of train
    (docs/own_data.md).
    """

    train: PathText | None = None
    eval: PathText | None = None
    test: PathText | None = None


class Columns(Strict, frozen=True):
    """Which columns or fields hold prompt and answer."""

    prompt: str = Field(default="prompt", description="column or field that holds the prompt")
    answer: str = Field(default="answer", description="the one that holds the answer")


class Labels(Strict, frozen=True):
    """The possible answers of a classification task, in the order of their numbers."""

    names: tuple[str, ...] = ()
    file: PathText | None = Field(default=None, description="a .json list, or .txt with one in each line")

    @field_validator("names", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        given = value if isinstance(value, list) else [value]
        # True and False are integers to Python; as YAML's yes and no they are labels that lost their quotes.
        wrong = [label for label in given if isinstance(label, bool) or not isinstance(label, str | int)]
        if wrong:
            raise ValueError(f"{shown(wrong[0])} is not the text of a label; put it in quotes")
        return [str(label) for label in given]


class DatasetSource(Strict, frozen=True):
    """Data that `datasets` reads, from the hub or a folder."""

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
        default=None,
        description=".jsonl, .json, .csv, .tsv or .parquet below data.root, one or by split; .gz after the "
        "first four too",
    )
    delimiter: str | None = Field(
        default=None, min_length=1, max_length=1, description="between a CSV's columns; default: found out"
    )
    records: str | None = Field(
        default=None, description="the field with the list of records, where a .json file holds an object"
    )
    dataset: DatasetSource | None = Field(default=None, description="an id on the hub, or a section")
    format: Literal["alpaca", "sharegpt", "openai"] | None = Field(
        default=None, description="a known layout of records, which says what prompt and answer are"
    )
    columns: Columns = Columns()
    prompt: str | None = Field(
        default=None,
        min_length=1,
        description="in place of columns.prompt, a text with {column} in it (docs/own_data.md)",
    )
    constants: dict[str, str] = Field(
        default={}, description="texts that the prompt may name like columns, for records without them"
    )
    labels: Labels | None = Field(
        default=None,
        description="a list or a file of the possible answers; records may give their numbers instead",
    )
    skip_empty: bool = Field(
        default=False, description="leave out training records without an answer; otherwise they are refused"
    )
    messages: str | None = Field(
        default=None,
        description="in place of columns, the field that holds a chat: the model's template "
        "makes the prompt, the assistant's last message is the answer",
    )
    train_on: Literal["last", "assistant"] = Field(
        default="last",
        description="of a chat in train: its last message, or all of the assistant's turns at once",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        """Some sections may be given as a text alone, which stands for the section with this one key."""
        if not isinstance(raw, dict):
            return raw
        only_key = {"headline": ANY, "files": "train", "dataset": "path", "labels": "file"}
        whole = dict(raw)
        for section, key in only_key.items():
            if isinstance(raw.get(section), str):
                whole[section] = {key: raw[section]}
        if isinstance(raw.get("labels"), list):
            whole["labels"] = {"names": raw["labels"]}
        return whole

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        faults = [
            f"{shown(name)} is not a metric.{nearest(name, METRICS)} Known: {', '.join(METRICS)}; one of "
            "your own is given by --plugin FILE"
            for name in value
            if not plugins.has_metric(name)
        ]
        if faults:
            raise ValueError("\n".join(faults))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        faults = [
            f"headline: '{name}' is none of the task's metrics "
            f"({', '.join(self.metrics)}).{nearest(name, self.metrics)}"
            for name in self.headline.values()
            if name not in self.metrics
        ]
        faults += list(self._contradictions())
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _contradictions(self) -> Iterator[str]:
        given = [key for key in READING if key in self.model_fields_set]
        if given and not self.declared:
            names = " and ".join(f"'{key}'" for key in given)
            verb = "go" if given[1:] else "goes"
            yield f"{names} {verb} with 'files' or 'dataset'; give one, or leave it out"
        if self.files and self.dataset:
            yield "'files' and 'dataset' both say where the data is; leave one out"
        of_files = [key for key in ("delimiter", "records") if key in given]
        if self.dataset and of_files:
            yield f"'{of_files[0]}' is about files, and the data is a 'dataset'; leave it out"
        if self.messages and self.format == "alpaca":
            yield "'messages' and 'format: alpaca' both say what the prompt is; leave one out"
        chat = "messages" if self.messages else f"format: {self.format}"
        yield from (
            f"'{key}' and '{chat}' both say what prompt and answer are; leave one out"
            for key in ("columns", "prompt", "constants", "labels", "skip_empty")
            if self.chat and key in given
        )
        if not self.chat and self.train_on == "assistant":
            yield "'train_on: assistant' is about chats; give 'messages' or 'format', or leave it out"
        if not self.chat and "prompt" in self.columns.model_fields_set and self.templates:
            other = "prompt" if self.prompt else "format"
            yield f"'columns.prompt' and '{other}' both say what the prompt is; leave one out"
        if self.constants and not self.templates:
            yield "'constants' are for a 'prompt' with {columns}; give one, or leave them out"

    @field_validator("prompt")
    @classmethod
    def _is_a_template(cls, value: str | None) -> str | None:
        if value is not None and not template.parse(value).columns:
            raise ValueError(f"{shown(value)} names no column; write {{name}} where a column's text goes")
        return value

    @property
    def declared(self) -> bool:
        """Whether the benchmark says where the data is."""
        return bool(self.files or self.dataset)

    @property
    def chat(self) -> str | None:
        """The field that holds a chat, where prompts are made of chats."""
        return self.messages or CHATS.get(self.format or "")

    @property
    def templates(self) -> tuple[Template, ...]:
        """What writes the prompt: the first whose columns all have text, or the last. Empty where a column
        is the prompt.
        """
        texts = ALPACA if self.format == "alpaca" else ()
        if self.prompt:
            texts = (self.prompt,)
        return tuple(template.parse(text) for text in texts)

    @property
    def answer(self) -> str:
        """The column of the answer."""
        given = "answer" in self.columns.model_fields_set
        return "output" if self.format == "alpaca" and not given else self.columns.answer

    @property
    def used(self) -> frozenset[str]:
        """The columns that are read; what is wrong with others does not matter."""
        if self.chat:
            return frozenset([self.chat, "system", "tools"])
        prompts = [name for one in self.templates for name in one.columns] or [self.columns.prompt]
        return frozenset([*prompts, self.answer])

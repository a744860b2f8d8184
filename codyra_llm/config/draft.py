"""The text of a recipe to start from: the chosen settings and, commented out, those most likely to be changed
next, with defaults and meanings from the schema."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.config.sections import (
    FILE,
    TRACE,
    DataSection,
    EvalSection,
    GeneralSection,
    ModelSection,
    OptimSection,
)
from codyra_llm.core.parsing import expanded, parse_yaml

NEXT = {  # by section, what is written with its default as a comment
    "model": ("dtype", "quantization", "gradient_checkpointing"),
    "data": ("tasks", "epochs", "max_train_examples", "chat_template"),
    "optim": ("lr", "schedule", "warmup", "validate_every"),
    "eval": ("when", "max_examples", "zero_shot"),
    "general": ("data",),
}
SCHEMAS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "data": DataSection,
    "optim": OptimSection,
    "eval": EvalSection,
    "general": GeneralSection,
}
TOKENS = {"cpu": 4096, "gpu": 16384}  # per forward
EXAMPLES = {"cpu": 8, "gpu": 32}  # per optimizer step
WIDTH = 34  # columns before a comment


@dataclass(frozen=True)
class Answers:
    """The choices. `device` is cpu or gpu; `batch` is the number of examples per optimizer step."""

    model: str
    data: str
    method: str
    device: str
    batch: int
    output: str


def draft(answers: Answers, file: Path) -> str:
    """The recipe, in YAML. Raises Fault where a choice is not valid."""
    inside = "benchmark" if os.path.isfile(Path(expanded(answers.data), FILE)) else "root"
    lines = [
        f"# Check it with `codyra-llm plan {file}`, start it with `codyra-llm run {file}`; the same command",
        "# resumes a run that stopped. What is commented out has its default; all keys: docs/recipes.md.",
        *_section("model", {"path": answers.model}),
        *_section("data", {inside: answers.data, **_stream(answers.data)}),
        "method:",
        _line("name", answers.method, METHODS[answers.method].summary),
        *_settings(METHODS.settings(answers.method), skip="name"),
        *_section("optim", {"batch_size": answers.batch, "micro_batch_tokens": TOKENS[answers.device]}),
        *_section("eval", {}),
        *_section("general", {}),
        _line("output", answers.output, "run folder", indent=""),
    ]
    text = "\n".join(lines) + "\n"
    parse_recipe(parse_yaml(text, str(file)), str(file))
    return text


def _stream(data: str) -> dict[str, list[str]]:
    """The tasks of a folder that does not have those of TRACE, by name, since no order of these fits; empty
    where the benchmark's default does."""
    folder = Path(expanded(data))
    tasks = sorted(file.parent.name for file in folder.glob("*/train.json"))
    if not tasks or os.path.isfile(folder / FILE):
        return {}
    has_those_of_trace = set(load_benchmark(TRACE).orders[1]) <= set(tasks)
    return {} if has_those_of_trace else {"tasks": tasks}


def _section(name: str, given: dict[str, Any]) -> list[str]:
    """A section with the given settings and those of NEXT; if none is given, its head is a comment too."""
    schema = SCHEMAS[name]
    lines = [_line(key, value, _meaning(schema, key)) for key, value in given.items()]
    for key in NEXT[name]:
        if key in given:
            continue
        lines.append(_line(key, schema.model_fields[key].default, _meaning(schema, key), comment=True))
    head = f"{name}:" if given else f"# {name}:"
    return [head, *lines]


def _settings(schema: type[BaseModel], skip: str) -> list[str]:
    return [
        _line(key, field.get_default(call_default_factory=True), _meaning(schema, key), comment=True)
        for key, field in schema.model_fields.items()
        if key != skip
    ]


def _meaning(schema: type[BaseModel], key: str) -> str:
    return schema.model_fields[key].description or ""


def _line(key: str, value: Any, meaning: str, comment: bool = False, indent: str = "  ") -> str:
    text = f"{'# ' if comment else ''}{indent}{key}: {_yaml(value)}"
    return f"{text:<{WIDTH}}  # {' '.join(meaning.split())}"


def _yaml(value: Any) -> str:
    """A value on one line."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    if isinstance(plain, str) and "\n" in plain:
        return json.dumps(plain, ensure_ascii=False)  # a text in double quotes is the same in YAML
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**9)
    return re.sub(r"\n(\.\.\.\n)?$", "", text)

"""The generated parts of docs/*.md, from schema and declarations: `python docs/reference.py` writes them.

A part is what lies between `<!-- generated: NAME -->` and `<!-- end -->`, NAME one of PARTS.
"""

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from codyra_llm.config.benchmark import Protocol, load_benchmark
from codyra_llm.config.differences import NO_RESULT
from codyra_llm.config.recipe import Recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.config.sections import TRACE
from codyra_llm.core.files import write_text
from codyra_llm.methods.base import Method
from codyra_llm.models.families import registered
from codyra_llm.report.text import methods_table as table
from codyra_llm.sweep.spec import SweepFile

TRACE_STREAM = load_benchmark(TRACE)

BOUNDS = {
    "minimum": "≥ {:,}",
    "exclusiveMinimum": "> {:,}",
    "maximum": "≤ {:,}",
    "exclusiveMaximum": "< {:,}",
    "minItems": "≥ {} of them",
    "minProperties": "≥ {} of them",
}

TYPES = {"string": "text", "object": "section", None: "any value"}

LABEL = re.compile(
    r"\s+((?:Source|Idea|Ours|Cost|On TRACE|As published|As run there)\b[^:]{0,60}:)"
)  # in docstrings, where a line may end inside of one


class Key(NamedTuple):
    """One setting, each part as the pages show it."""

    name: str
    type: str
    bounds: str
    default: str
    meaning: str


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """The settings of a section and of the sections in it, whose names precede those of their settings."""
    whole = schema.model_json_schema()
    for name, node in whole["properties"].items():
        field = schema.model_fields[name]
        if inner := section(field):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield Key(
                prefix + name,
                _type(node),
                _bounds(node),
                _default(name, node, whole),
                field.description or "",
            )


def section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, BaseModel)), None)


def _type(node: dict) -> str:
    if "anyOf" in node:
        return " or ".join(map(_type, node["anyOf"]))
    if "enum" in node or "const" in node:
        return ", ".join(f"`{_shown(value)}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        if "prefixItems" in node:
            return f"{len(node['prefixItems'])} numbers"
        return f"list of {_type(node['items'])}"
    if isinstance(node.get("additionalProperties"), dict):
        return f"{_type(node['additionalProperties'])} by name"
    return TYPES.get(node.get("type"), node.get("type"))


def _bounds(node: dict) -> str:
    stated = ""  # a bound that the page gives in other words already
    if "exclusiveMinimum" in node:
        stated = "minimum"
    elif "prefixItems" in node:
        stated = "minItems"
    own = [text.format(node[key]) for key, text in BOUNDS.items() if key in node and key != stated]
    inner = [*node.get("anyOf", ()), *node.get("prefixItems", ()), node.get("items", {})]
    return ", ".join(dict.fromkeys(filter(None, own + [_bounds(part) for part in inner if part])))


def _default(name: str, node: dict, section: dict) -> str:
    """The default; where it is null and the protocol knows, what the protocols have."""
    if name in section.get("required", ()):
        return "required"
    known = {
        rule: f"`{_shown(getattr(p, name))}`"
        for rule, p in TRACE_STREAM.protocols.items()
        if name in Protocol.model_fields
    }
    if node.get("default") is not None or not known:
        return f"`{_shown(node.get('default'))}`"
    if len(set(known.values())) == 1:
        return "by protocol: " + known.popitem()[1]
    return "by protocol: " + ", ".join(f"{value} ({protocol})" for protocol, value in known.items())


def _shown(value: Any) -> str:
    """A value as it is written in a recipe, on one line."""
    return value.replace("\n", "\\n") if isinstance(value, str) else json.dumps(value)


def rows(header: str, found: list) -> str:
    """A table in Markdown."""
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in found]) + "\n"


def _cell(text: str) -> str:
    return _markdown(text).replace("|", "\\|")


def recipe_keys() -> str:
    """A table for each section; `method` has one of its own."""
    parts, loose = [], []
    for name, field in Recipe.model_fields.items():
        if name == "method":
            parts.append(f"## method\n\nWhat learns: [methods.md](methods.md). {method_keys()}")
        elif inner := section(field):
            parts.append(f"## {name}\n\n{inspect.getdoc(inner)}\n\n" + _keys_table(keys(inner, f"{name}.")))
        else:
            loose.append(name)
    top = [key for key in keys(Recipe) if key.name in loose]
    return "\n".join([*parts, "## Outside of all sections\n\n" + _keys_table(top)])


def _keys_table(found: Iterator[Key] | list[Key]) -> str:
    return rows("| key | type | bounds | default | meaning |", [(f"`{key.name}`", *key[1:]) for key in found])


def method_keys() -> str:
    """Every key of every method once, with the methods that share it."""
    users: dict[Key, list[str]] = {}
    for method in METHODS.values():
        for key in own_keys(method):
            users.setdefault(key, []).append(method.name)
    found = sorted(users.items(), key=lambda item: -len(item[1]))  # what many share comes first
    intro = (
        "A key that means something else in another method, or has another default, has a row for each.\n\n"
    )
    return intro + rows(
        "| key | type | bounds | default | meaning | methods |",
        [(f"`{key.name}`", *key[1:], ", ".join(names)) for key, names in found],
    )


def own_keys(method: type[Method]) -> list[Key]:
    return [key for key in keys(method.Config, "method.") if key.name != "method.name"]


def sweep_keys() -> str:
    return _keys_table(keys(SweepFile))


def methods_table() -> str:
    """What `codyra-llm methods` shows."""
    shown = table()
    found = zip(*(column.cells for column in shown.columns), strict=True)
    head = "| " + " | ".join(str(column.header) for column in shown.columns) + " |"
    linked = [(f"[{name}](#{name})", *cells) for name, *cells in found]
    return rows(head, linked) + f"\n{shown.caption[0].upper()}{shown.caption[1:]}.\n"


SHARED_BY = 10  # methods, from which on a setting is listed once


def shared_settings() -> str:
    """The settings that many methods share, in one table."""
    shared = [(f"`{key.name}`", key.default, key.meaning) for key in shared_keys()]
    return rows("| key | default | meaning |", shared)


def shared_keys() -> list[Key]:
    """Settings that mean the same, with the same default, in at least SHARED_BY methods."""
    counts = Counter(key for method in METHODS.values() for key in own_keys(method))
    return [key for key, count in counts.items() if count >= SHARED_BY]


def each_method() -> str:
    return "\n".join(map(method_section, METHODS.values()))


def method_section(method: type[Method]) -> str:
    """Summary, docstring, settings."""
    path = f"{method.__module__.replace('.', '/')}.py"
    text = f"## {method.name}\n\n*{method.summary}* ([{path.rpartition('/')[2]}](../{path}))\n\n"
    lines = "\n".join(map(_markdown, inspect.getdoc(method).splitlines()))
    text += LABEL.sub(r"\n\n**\1**", lines) + "\n"
    return text + settings(method)


def settings(method: type[Method]) -> str:
    """The names of the shared settings that the method has, and a table of its other ones."""
    found, shared = own_keys(method), shared_keys()
    names = ", ".join(f"`{key.name}`" for key in found if key in shared)
    text = f"\n[Shared settings](#shared-settings): {names}.\n" if names else ""
    own = [(f"`{key.name}`", key.default, key.meaning) for key in found if key not in shared]
    return text + ("\n" + rows("| key | default | meaning |", own) if own else "")


def _markdown(line: str) -> str:
    """A line with what Markdown would take for emphasis or a tag escaped; indented lines are code."""
    if line.startswith("    "):
        return line
    return re.sub(r"(`[^`]*`)|(\*|(?<!\w)_|<(?=\w))", lambda found: found[1] or "\\" + found[2], line)


NEEDED = ("begin_task", "penalty", "loss", "end_task", "consolidate", "spec")


def method_hooks() -> str:
    """The hooks that most methods are made from."""
    return hooks_table({name: hook for name, hook in all_hooks().items() if name in NEEDED})


def other_hooks() -> str:
    """The hooks for what few methods do."""
    return hooks_table({name: hook for name, hook in all_hooks().items() if name not in NEEDED})


def all_hooks() -> dict[str, Callable]:
    """The interface."""
    return {
        name: hook
        for name, hook in vars(Method).items()
        if inspect.isfunction(hook) and not name.startswith("_")
    }


def hooks_table(hooks: dict[str, Callable]) -> str:
    """Each hook, and some methods that override it."""
    lines = []
    for name, hook in hooks.items():
        parameters = [*inspect.signature(hook).parameters][1:]
        users = [kind.name for kind in METHODS.values() if getattr(kind, name) is not hook]
        meaning = " ".join(inspect.getdoc(hook).split())
        lines.append((f"`{name}({', '.join(parameters)})`", meaning, ", ".join(users[-3:])))
    return rows("| hook | what it does | e.g. in |", lines)


def model_families() -> str:
    """Which families there are, by what config.json says."""
    return rows(
        "| family | `model_type` | what is trained | GGUF exports |",
        [
            (
                family.title,
                f"`{model_type}`",
                "the text model of several towers" if family.tower else "all of it",
                "yes" if family.gguf else "no",
            )
            for model_type, family in registered().items()
        ],
    )


def trace_tasks() -> str:
    return rows(
        "| task | language | epochs | rule `trace` | rule `treelora` |",
        [
            (
                name,
                task.language,
                str(task.epochs),
                *(f"`{task.headline[rule]}`" for rule in TRACE_STREAM.protocols),
            )
            for name, task in TRACE_STREAM.tasks.items()
        ],
    )


def trace_orders() -> str:
    return rows(
        "| order | tasks |",
        [(str(number), ", ".join(names)) for number, names in TRACE_STREAM.orders.items()],
    )


def trace_protocols() -> str:
    return rows(
        "| | " + " | ".join(f"`{name}`" for name in TRACE_STREAM.protocols) + " |",
        [
            (f"`{name}`", *(_shown(getattr(p, name)) for p in TRACE_STREAM.protocols.values()))
            for name in Protocol.model_fields
        ],
    )


def accuracy_rules() -> str:
    """What the two rules say of some predictions; in the way TRACE's metrics are called."""
    found = []
    for task, prediction, answer in (
        ("FOMC", "B", "B"),
        ("FOMC", " B", "B"),
        ("FOMC", "B.", "B"),
        ("FOMC", "B because", "B"),
        ("FOMC", "b", "B"),
        ("FOMC", "Answer: B", "B"),
        ("FOMC", "", "B"),
        ("NumGLUE-cm", "12", "1"),
        ("NumGLUE-cm", "1.0", "1"),
        ("ScienceQA", "B\nsince", "B\nas"),
        ("ScienceQA", " B\nsince", "B\nas"),
    ):
        scores = TRACE_STREAM.score(task, [""], [prediction], [answer])
        values = (f"{scores[TRACE_STREAM.headline(task, rule)][0]:g}" for rule in TRACE_STREAM.protocols)
        found.append((task, f"`{json.dumps(prediction)}`", f"`{json.dumps(answer)}`", *values))
    return rows(
        "| task | prediction | answer | "
        + " | ".join(f"rule `{rule}`" for rule in TRACE_STREAM.protocols)
        + " |",
        found,
    )


def no_result() -> str:
    return ", ".join(f"`{key}`" for key in NO_RESULT if key != "output") + ".\n"


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (
        recipe_keys,
        no_result,
        sweep_keys,
        methods_table,
        shared_settings,
        each_method,
        method_hooks,
        other_hooks,
        model_families,
        trace_tasks,
        trace_orders,
        trace_protocols,
        accuracy_rules,
    )
}

PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)


def renewed(page: str) -> str:
    """The page with its generated parts as they are now."""
    return PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n{found[3]}", page)


if __name__ == "__main__":
    for path in Path(sys.argv[1]).glob("*.md"):
        write_text(path, renewed(path.read_text(encoding="utf-8")))

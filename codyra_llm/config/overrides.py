"""Recipe files by path or name, and `key=value` settings that override them."""

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from codyra_llm.core.errors import Attempts, Fault, nearest
from codyra_llm.core.parsing import expanded, parse_yaml, read_yaml, shown

PROGRAM_KEYS = ("_", "launch")  # the two lines that make a recipe a Python program as well


def read_recipe(path: str | Path) -> dict:
    """The recipe file at `path`, or the shipped one of that name, as a mapping."""
    raw = read_yaml(find_recipe(path), "a recipe, such as recipes/quickstart.yaml")
    return {key: value for key, value in raw.items() if key not in PROGRAM_KEYS}


def find_recipe(path: str | Path) -> Path:
    """The recipe file at `path`, or the shipped recipe of that name."""
    shipped = Path(str(files("codyra_llm.recipes")))  # at the top level of a checkout
    for candidate in (Path(expanded(str(path))), shipped / Path(path).name, shipped / f"{path}.yaml"):
        if os.path.isfile(candidate):
            return candidate
    names = sorted(p.name for p in shipped.glob("*.yaml"))
    if os.path.isdir(expanded(str(path))):
        raise Fault(f"'{path}' is a folder, not a recipe; give a YAML file. Shipped: {', '.join(names)}")
    raise Fault(f"there is no recipe '{path}'.{nearest(Path(path).name, names)} Shipped: {', '.join(names)}")


def override(raw: dict, overrides: Sequence[str]) -> dict:
    """Apply `a.b=value` (value in YAML), in order. `method=NAME` resets the method's section. Raises one
    Fault with every key that is none."""
    tried = Attempts()
    for key, value in split_overrides(overrides):
        tried(assign, raw, key, value)
    if tried.faults:
        raise Fault(*tried.faults)
    return raw


def split_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Keys and values of `a.b=value` texts. Raises one Fault that lists all texts of another form, and those
    without a value, as an unset variable of the shell leaves them."""
    if isinstance(overrides, str):  # a sequence too, of letters
        overrides = [overrides]
    faults = [
        f"'{item}' is not an override; write key=value, e.g. optim.lr=1e-4"
        for item in overrides
        if "=" not in item
    ]
    pairs = []
    for key, _, text in (item.partition("=") for item in overrides if "=" in item):
        if not text.strip():
            faults.append(f"{shown(key)}: there is nothing after '='; give a value, or null for none")
            continue
        try:
            pairs.append((key.removeprefix("--"), parse_yaml(text, f"override {shown(key)}")))
        except Fault as fault:
            faults += fault.messages
    if faults:
        raise Fault(*faults)
    return pairs


def assign(raw: dict, key: str, value: Any) -> None:
    """Set `a.b` of a recipe's mapping.

    If the value is a mapping, such as `optim={lr: 1e-3}`, only the keys in it are set, and the others of the
    section stay; a mapping for `method` replaces the whole section. In the recipe the method may be its name
    alone, and a section may be null, which is how YAML reads one whose keys are all commented out."""
    if isinstance(value, dict) and "." not in key and key != "method":
        for name, inner in value.items():
            assign(raw, f"{key}.{name}", inner)
        return
    *path, last = key.split(".")
    if not all([*path, last]) or len(path) > 8:
        raise Fault(
            f"{shown(key)} is not the key of a setting; write its sections joined by dots, e.g. optim.lr"
        )
    node = raw
    for place, part in enumerate(path, 1):
        inner = node.get(part)
        if inner is None:
            inner = {}
        elif path[:place] == ["method"]:
            inner = method_section(inner)
        if not isinstance(inner, dict):
            raise Fault(f"{key}: '{part}' is a value, not a section; override '{part}' itself")
        node[part] = inner
        node = inner
    node[last] = method_section(value) if key == "method" else value


def method_section(given: Any) -> Any:
    """A recipe's `method`, which may be its name alone, as a section."""
    return {"name": given} if isinstance(given, str) else given

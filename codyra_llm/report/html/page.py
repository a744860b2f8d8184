"""The report as a file: one HTML page that loads nothing, or its tables as CSV or Markdown."""

from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import replacing
from codyra_llm.core.version import __version__
from codyra_llm.report import published
from codyra_llm.report.grid import Grid, markdown, write_csv
from codyra_llm.report.html import many_runs, one_run
from codyra_llm.store.folder import RunFolder

SUFFIXES = (".html", ".csv", ".md")


def write(folders: list[RunFolder], out: Path, examples: bool = True, paper: bool = False) -> None:
    """The report on one run, or on several together, in the format that the suffix of `out` names.

    examples: show test prompts, answers and predictions. paper: put the published tables beside. Raises Fault
    for another suffix or a folder that holds no run.
    """
    if out.suffix not in SUFFIXES:
        raise Fault(f"--out: '{out}' must end in {', '.join(SUFFIXES)}.{nearest(out.suffix, SUFFIXES)}")
    found = one_run.content(folders[0], examples) if len(folders) == 1 else many_runs.content(folders)
    found["published"] = published.beside(folders) if paper else []
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        if out.suffix == ".csv":
            write_csv(grids(found), file)
        else:
            page = (
                html(found, len(folders))
                if out.suffix == ".html"
                else f"# {found['title']}\n\n{markdown(grids(found))}"
            )
            file.write(page)


def html(found: dict, runs: int) -> str:
    """The page. Whatever comes from data, a model or a recipe is escaped: autoescape is on, and nothing is
    marked safe.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(found, runs=runs, version=__version__)


def grids(found: dict) -> Iterator[Grid]:
    """The tables among the parts, in their order."""
    for part in found.values():
        yield from (grid for grid in (part if isinstance(part, list) else [part]) if isinstance(grid, Grid))

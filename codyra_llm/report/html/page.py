"""The report as a file: one HTML page that loads nothing, or its tables as CSV, Markdown or LaTeX."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import replacing
from codyra_llm.core.version import __version__
from codyra_llm.report import published
from codyra_llm.report.figures import SUFFIXES as FIGURES
from codyra_llm.report.grid import Grid, markdown, write_csv
from codyra_llm.report.groups import Member, Run, provenance
from codyra_llm.report.html import many_runs, one_run
from codyra_llm.report.latex import latex
from codyra_llm.store.folder import RunFolder

SUFFIXES = (".html", ".csv", ".md", ".tex")
IN_PAPERS = ("leaderboard", "tasks", "differences", "measures", "scores", "published")  # parts, in LaTeX


def write(
    runs: Sequence[RunFolder | Member],
    out: Path,
    examples: bool = True,
    paper: bool = False,
    over_orders: bool = False,
) -> None:
    """The report on one run, or on several together, in the format that the suffix of `out` names.

    examples: show test prompts, answers and predictions. paper: add the published tables. over_orders:
    runs that differ in the order of their tasks are one group. Raises Fault for another suffix or a folder
    that holds no run.
    """
    if out.suffix not in SUFFIXES:
        raise Fault(
            f"--out: '{out}' must end in {', '.join(SUFFIXES)}, or of a figure {', '.join(FIGURES)}."
            f"{nearest(out.suffix, (*SUFFIXES, *FIGURES))}"
        )
    members = [run if isinstance(run, Member) else Member(run) for run in runs]
    folders = [member.folder for member in members]
    if len(members) == 1:
        found = one_run.content(folders[0], examples)
    else:
        found = many_runs.content(members, over_orders, numbered=out.suffix != ".tex")
    found["published"] = published.comparisons(folders) if paper else []
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        if out.suffix == ".csv":
            write_csv(
                grids(found), file, provenance([Run(folders[0], {}, {})]) if len(members) == 1 else None
            )
        elif out.suffix == ".html":
            file.write(html(found, len(members)))
        elif out.suffix == ".md":
            file.write(f"# {found['title']}\n\n{markdown(grids(found))}")
        else:
            file.write(latex(grids({name: found[name] for name in IN_PAPERS if found.get(name)})))


def html(found: dict, runs: int) -> str:
    """The page. Whatever comes from data, a model or a recipe is escaped: autoescape is on, and nothing is
    marked safe.
    """
    return _template().render(found, runs=runs, version=__version__)


@cache
def _template() -> Template:
    """The page's template, compiled once for all runs of a process."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def grids(found: dict) -> Iterator[Grid]:
    """The tables among the parts, in their order."""
    for part in found.values():
        yield from (grid for grid in (part if isinstance(part, list) else [part]) if isinstance(grid, Grid))

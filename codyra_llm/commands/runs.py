"""Commands that run recipes, and report on runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from codyra_llm.commands.common import (
    DeepSpeedConfig,
    LocalRank,
    Overrides,
    Plugins,
    RecipeArg,
    console,
    path,
)
from codyra_llm.core.errors import Fault
from codyra_llm.core.imports import uncollected
from codyra_llm.runtime import signals

if TYPE_CHECKING:
    from codyra_llm.store.folder import RunFolder


SweepArg = Annotated[
    Path,
    typer.Argument(parser=path, metavar="SWEEP", help="a YAML file: recipe, output, set, arms, grid, tune"),
]
Launcher = Annotated[
    str | None,
    typer.Option(
        help="start each run with this, one after the other, e.g. "
        "'accelerate launch --config_file zero2.yaml'"
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        metavar="PATH",
        help="file to write: .html, a page; .csv, .md or .tex, its tables; .pdf, .svg or .png, a figure",
    ),
]
Figure = Annotated[
    str | None,
    typer.Option(
        help="matrix: scores after each task; tradeoff: learning against forgetting; stream: mean score "
        "along the stream; ranks: kept by layer; default: matrix of one run, tradeoff of several"
    ),
]
PoolOrders = Annotated[
    bool | None,
    typer.Option(
        "--pool-orders/--no-pool-orders",
        help="runs that differ in the order of their tasks are one group; default: those of a sweep",
    ),
]


def run(
    recipe: RecipeArg,
    overrides: Overrides = None,
    local_rank: LocalRank = None,
    deepspeed_config: DeepSpeedConfig = None,
    plugin: Plugins = None,
) -> None:
    """Run a recipe: the whole stream, evaluation and the final checkpoint.

    The same command resumes a run that stopped. If the recipe of a finished run gains tasks at the end, the
    run goes on with those.
    Example: codyra-llm run recipes/quickstart.yaml method.rank=8 output=runs/rank8
    """
    with uncollected():
        from codyra_llm.config.recipe import load_recipe
        from codyra_llm.experiment.observers import Display
        from codyra_llm.experiment.run import run as run_recipe
        from codyra_llm.runtime.launch import ask_deepspeed, is_first, leave

    if deepspeed_config:
        ask_deepspeed(deepspeed_config)
    signals.listen()
    folder = run_recipe(load_recipe(recipe, overrides or []), [Display()])
    if is_first():
        _show(folder)
    leave()


def _show(folder: "RunFolder") -> None:
    """Print the score matrix of a finished run and, on mini-TRACE, a short comparison with sequential
    LoRA."""
    from codyra_llm.report.in_short import in_short
    from codyra_llm.report.summary import summarised
    from codyra_llm.report.text import table

    summary = summarised(folder)
    console.print(table(summary))
    lines = in_short(folder.recipe, summary)
    if lines:
        console.print(lines)


def plan(recipe: RecipeArg, overrides: Overrides = None, plugin: Plugins = None) -> None:
    """Resolve and check a recipe without training: tasks, steps, tokens, an example, memory, disk, and every
    fault.
    """
    with uncollected():
        from codyra_llm.config.recipe import load_recipe
        from codyra_llm.experiment.plan import plan as show

    show(load_recipe(recipe, overrides or []), console)


def sweep(
    file: SweepArg,
    overrides: Overrides = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="runs at the same time; default: one per GPU, or 1")
    ] = None,
    launcher: Launcher = None,
    report: Annotated[bool, typer.Option("--report", help="run nothing, compare what is finished")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="run nothing, list the runs with their tokens and hours")
    ] = False,
    plugin: Plugins = None,
) -> None:
    """Compare methods, or any settings: every arm at every point of a grid, resumable, with intervals.

    \b
    recipe: quickstart
    output: runs/ewc
    set: {optim.lr: 1e-3}               # for all runs
    arms:                               # name: what is set in it; the first is the baseline
      seqlora: {method: seqlora}
      ewc: {method: ewc}
    grid: {seed: [1, 2, 3], data.tasks: [1, 2]}
    tune:                               # optional: as many tries for every arm, on the eval splits
      set: {seed: 0}
      tries:
        seqlora: [{optim.lr: 1e-3}, {optim.lr: 3e-3}]
        ewc: [{method.weight: 1e+4}, {method.weight: 1e+6}]

    Naming a method in any layer resets its section; then every layer's method.KEY is set. The comparison is
    in <output>/sweep.md and sweep.json, which are written again after every run.
    """
    from codyra_llm.sweep import comparison, runner
    from codyra_llm.sweep.spec import load_sweep

    asked = load_sweep(file, overrides or [])
    if dry_run:
        from codyra_llm.sweep.forecast import foresee, show

        show(foresee(asked), jobs or 1, console)
        return

    def compare() -> None:
        console.print(comparison.table(comparison.write(asked, file.stem)))
        console.print(f"comparison: {asked.output / 'sweep.md'}")

    signals.listen()
    try:
        if not report:
            runner.execute(asked, jobs, launcher, lambda: comparison.write(asked, file.stem))
    except (runner.Failed, signals.Stopped):
        compare()
        raise
    compare()  # not of a sweep that was refused: the folder may be that of another one


def report(
    folders: Annotated[
        list[Path], typer.Argument(parser=path, metavar="RUN|SWEEP ...", help="run folders, or a sweep's")
    ],
    out: Out = None,
    figure: Figure = None,
    pool_orders: PoolOrders = None,
    examples: Annotated[bool, typer.Option(help="show test examples that were forgotten")] = True,
    paper: Annotated[
        bool, typer.Option("--paper", help="add the published TRACE tables, with caveats")
    ] = False,
    plugin: Plugins = None,
) -> None:
    """Report on a run, on several together, or on a sweep, pooled over seeds and orders; needs no model.

    Without --out: print the run's scores and write its report.md and report.html again, and for a finished
    run summary.json too.
    Examples: codyra-llm report runs/* --out report.html; codyra-llm report runs/my-sweep --out table.tex
    """
    from codyra_llm.report import figures
    from codyra_llm.report.groups import collected
    from codyra_llm.report.html import many_runs, page

    members = collected(folders)
    if out is None and len(members) > 1:
        raise Fault(
            "--out: several runs have no folder in common; name the file to write, e.g. --out report.html"
        )
    if pool_orders is None:
        pool_orders = any(member.arm for member in members)
    if figure or (out and out.suffix in figures.SUFFIXES):
        target = out or Path(f"{figure}.pdf")
        figures.check(target, figure)
        figures.write(many_runs.opened(members), target, figure, pool_orders)
        console.print(f"figure: {target}")
        return
    target = out or _rewrite_reports(members[0].folder, paper)
    page.write(members, target, examples, paper, pool_orders)
    console.print(f"report: {target}")


def _rewrite_reports(folder: "RunFolder", paper: bool) -> Path:
    """Show the run's scores and write its report.md again, and the summary of a finished run; returns where
    its page is."""
    from codyra_llm.report import published
    from codyra_llm.report.grid import markdown
    from codyra_llm.report.summary import summarised
    from codyra_llm.report.text import render, table

    summary = summarised(folder)
    text = render(folder.recipe, summary, folder.updates)
    if paper:
        text += f"\n{markdown(published.comparisons([folder]))}"
    if folder.finished:
        folder.write_summary(summary, text)
    else:
        folder.write_report(text)
    console.print(table(summary))
    return folder.path / "report.html"


def status(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="RUN")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
    plugin: Plugins = None,
) -> None:
    """Say how far a running, finished or dead run is, and where its command would resume. Only reads."""
    from codyra_llm.report.status import look, show

    found = look(folder)
    print(json.dumps(found, ensure_ascii=False, indent=1)) if as_json else show(found, console)


def methods(as_json: Annotated[bool, typer.Option("--json")] = False, plugin: Plugins = None) -> None:
    """List the methods, including those of plug-ins: what each trains and needs, whether it merges into the
    base, and how it can be launched.
    """
    from codyra_llm.config import plugins
    from codyra_llm.config.registry import METHODS
    from codyra_llm.report.text import methods_table as table

    plugins.load_installed()
    if as_json:
        print(json.dumps([method.declared() for method in METHODS.values()], indent=1))
    else:
        for method in METHODS.values():
            console.print(Text.assemble((method.name, "bold"), f": {method.summary}"))
        console.print(table())

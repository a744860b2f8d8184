"""Commands on checkpoints and predictions, however they were made."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from codyra_llm.commands.common import LocalRank, Overrides, PathArg, Plugins, console, path
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.imports import uncollected
from codyra_llm.core.terminal import write
from codyra_llm.runtime import signals

FORMATS = {  # the options that each format knows
    "merged": ("dtype", "without"),
    "peft": ("rank", "without"),
    "gguf": ("type", "without"),
    "stage": (),
}
GGUF_TYPES = ("f16", "bf16", "q8_0", "f32")
DTYPES = ("float32", "bfloat16", "float16")


def score(
    task: str,
    file: PathArg,
    benchmark: Annotated[str, typer.Option(help="whose task: trace, olora, superni, or a folder")] = "trace",
    plugin: Plugins = None,
) -> None:
    """Score predictions made anywhere: FILE is a JSON list of {"prompt", "prediction", "answer"}. Prints
    JSON.

    TASK is the name of a task of the benchmark; under trace any other name is scored by exact match.
    """
    from codyra_llm.config.benchmark import load_benchmark
    from codyra_llm.evaluate.statistics import predictions, summarise_all

    known = load_benchmark(benchmark)
    if strangers := known.strangers([task], "TASK: {} is not a task of " + benchmark):
        raise Fault(*strangers)
    rows = ((row["prompt"], row["prediction"], row["answer"]) for row in predictions(file))
    print(json.dumps(summarise_all(known.score_each(task, rows)), indent=1))


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RUN@TASK",
            help="a model folder, hub id or .gguf, a "
            "PEFT folder, or a run and the task after which (default: the last)",
        ),
    ],
    overrides: Overrides = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="whose tasks and protocols: trace, olora, superni, or a folder; default: its run's"
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="folder of <task>/test.json; default: its run's")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="e.g. FOMC,Py150; default: as its run did, or all")
    ] = None,
    general: Annotated[
        str | None, typer.Option(help="hub, mini or a folder of general-ability files")
    ] = None,
    general_tasks: Annotated[
        str | None, typer.Option(help="e.g. mmlu,piqa; default: all that are there")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="the base: a PEFT adapter is merged into it, and general ability "
            "is measured on it too, for ΔR; open-ended prompts need it"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=path, metavar="PATH", help="default: evaluations/<checkpoint>")
    ] = None,
    local_rank: LocalRank = None,
    plugin: Plugins = None,
) -> None:
    """Score any checkpoint, without training. A checkpoint that a run wrote is scored as in the run, and
    gives the same rows.

    The same command resumes where it stopped. Example: codyra-llm evaluate runs/x/checkpoint --general hub
    general.limit=100
    """
    with uncollected():
        from codyra_llm.checkpoints.evaluate import evaluate as score_checkpoint
        from codyra_llm.checkpoints.source import Wanted
        from codyra_llm.runtime.launch import leave

    if overrides and (stray := [item for item in overrides if "=" not in item]):
        raise Fault(
            f"'{stray[0]}' is neither an option nor an override; write key=value, e.g. eval.max_examples=10"
        )
    signals.listen()
    score_checkpoint(
        checkpoint,
        Wanted(
            data,
            tasks.split(",") if tasks else None,
            general,
            general_tasks.split(",") if general_tasks else None,
            base,
            out,
            overrides or [],
            benchmark,
        ),
    )
    leave()


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RUN@TASK",
            help="a model folder, hub id or .gguf, a PEFT folder, or a run and the task after which ('base': "
            "before all; default: the last)",
        ),
    ],
    prompt: Annotated[str | None, typer.Argument(help="default: read from standard input")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1 << 20)] = 64,
    base: Annotated[
        str | None, typer.Option(help="of a PEFT adapter, where the one that it names is elsewhere")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Answer a prompt with a checkpoint, or with any stage of a run. Example: codyra-llm generate runs/x@FOMC
    "2+2="
    """
    with uncollected():
        from codyra_llm.checkpoints.generate import answer

    write(answer(model, sys.stdin.read() if prompt is None else prompt, max_new_tokens, base))


def export(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="RUN")],
    out: PathArg,
    after: Annotated[str | None, typer.Option(help="task after which; default: the last")] = None,
    without: Annotated[str | None, typer.Option(help="leave this task's update out")] = None,
    format: Annotated[
        str,
        typer.Option(
            help="merged: a plain model; peft: an adapter on the base; gguf: a file for llama.cpp; "
            "stage: the part of the run folder that answers, for methods that don't merge"
        ),
    ] = "merged",
    dtype: Annotated[
        str | None,
        typer.Option(help="merged: float32, bfloat16 or float16; default: what the base is stored in"),
    ] = None,
    type: Annotated[str | None, typer.Option(help="gguf: f16, bf16, q8_0 or f32; default: f16")] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="peft: cut the sum of the updates to this rank; the card states the error"),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="upload it to this hub repository")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="for everybody to see; default: private")] = False,
    plugin: Plugins = None,
) -> None:
    """Write the model as it was after any task of a run, rebuilt from the base and the archived updates."""
    import torch

    from codyra_llm.checkpoints import push as hub
    from codyra_llm.experiment.export import (
        rank_notes,
        write_gguf_folder,
        write_merged,
        write_peft,
        write_stage,
    )
    from codyra_llm.experiment.setup import prepare
    from codyra_llm.report import card
    from codyra_llm.store.folder import RunFolder

    _check_export(out, format, {"dtype": dtype, "type": type, "rank": rank, "without": without})
    if push:
        hub.check(push, public)
    opened = RunFolder(folder)
    setup = prepare(opened.recipe, open_ended=False)
    setup.verify(opened)
    archive = opened.archive()
    last = archive.index(after) if after else len(archive.files) - 1
    if format == "stage":
        write_stage(opened, last, out, card.render(setup.base, opened, last, None, format))
    else:
        left = archive.index(without) if without else None
        written = partial(card.render, setup.base, opened, last, left, format)
        if format == "peft":
            one = write_peft(setup, archive, last, left, out, written, rank)
            console.print("\n".join(rank_notes(one)), highlight=False)
        elif format == "gguf":
            write_gguf_folder(setup, archive, last, left, out, written(), type or "f16")
        else:
            write_merged(setup, archive, last, left, out, written(), dtype and getattr(torch, dtype))
    console.print(
        f"{format} model after {after or archive.tasks[last]}"
        + (f" without {without}" if without else "")
        + f": {out}"
    )
    if push:
        console.print(f"pushed: {hub.push(out, push, public)}")


def _check_export(out: Path, format: str, given: dict[str, object]) -> None:
    """Raises Fault for a format or a dtype that is none, for an option of another format, and where `out` is
    there already."""
    if format not in FORMATS:
        raise Fault(
            f"--format: '{format}' is not a format; choose {', '.join(FORMATS)}.{nearest(format, FORMATS)}"
        )
    faults = [
        f"--{name}: an export as {format} has no such choice; leave it out, or choose another --format"
        for name, value in given.items()
        if value is not None and name not in FORMATS[format]
    ]
    if (dtype := given["dtype"]) not in (None, *DTYPES):
        faults.append(f"--dtype: '{dtype}' is not a dtype of exports; choose one of {', '.join(DTYPES)}")
    if (kind := given["type"]) not in (None, *GGUF_TYPES):
        faults.append(f"--type: '{kind}' is no type of GGUF exports; choose one of {', '.join(GGUF_TYPES)}")
    if out.exists():
        faults.append(f"{out} exists already; give a new name")
    if faults:
        raise Fault(*faults)


def bench(
    level: Annotated[
        str,
        typer.Argument(
            help="linear, block (a decoder layer), head (with its loss), step (of "
            "training) or eval (generation)"
        ),
    ],
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, ...; default: bfloat16 on a GPU")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="numbers, e.g. N,in,out,r of linear")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="times that every arm is run")] = None,
    arms: Annotated[str | None, typer.Option(help="names, e.g. peft,ours; default: all")] = None,
    model: Annotated[
        str | None, typer.Option(help="block: whose shapes; step, eval: the model, default mini")
    ] = None,
    data: Annotated[str, typer.Option(help="step, eval: TRACE folder, or mini")] = "mini",
    tasks: Annotated[
        str | None, typer.Option(help="step, eval: names; default: all of TRACE's that DATA holds")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="step: examples of a global batch")] = 8,
    examples: Annotated[int, typer.Option(min=1, help="step, eval: first examples of each task")] = 8,
    tokens: Annotated[
        int | None,
        typer.Option(min=16, help="step: padded tokens at once; eval: longest prompt, default 256"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time training against PEFT and a floor, each arm first checked against float64: speed, peak memory,
    saved bytes; and generation against one prompt at a time.

    Example: codyra-llm bench step --model models/smollm2-135m --data data/LLM-CL-Benchmark_500 --arms
    peft,ours
    """
    from codyra_llm.bench import measured, options, show

    result = measured(
        level,
        options(
            device,
            dtype,
            shape,
            arms,
            tasks,
            rounds=rounds,
            model=model,
            data=data,
            batch=batch,
            examples=examples,
            tokens=tokens,
        ),
    )
    print(json.dumps(result, indent=1)) if as_json else show(result, console)

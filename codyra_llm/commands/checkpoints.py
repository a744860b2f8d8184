"""Commands on checkpoints and predictions from any source."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from codyra_llm.commands.common import LocalRank, Overrides, PathArg, Plugins, console, path
from codyra_llm.core.errors import Fault
from codyra_llm.core.imports import uncollected
from codyra_llm.core.parsing import listed
from codyra_llm.core.terminal import one_line, write
from codyra_llm.runtime import signals

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT|RUN@TASK",
        help="a model folder, hub id or .gguf, a "
        "PEFT folder, or a run, as it was after TASK (default: the last task learnt)",
    ),
]
Benchmark = Annotated[
    str | None,
    typer.Option(help="whose tasks and protocols: trace, olora, superni, or a folder; default: its run's"),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="the base: a PEFT adapter is merged into it, and general ability "
        "is measured on it too, for ΔR; open-ended prompts need it"
    ),
]
Format = Annotated[
    str,
    typer.Option(
        help="merged: a plain model; peft: an adapter on the base; gguf: a file for llama.cpp; "
        "stage: the part of the run folder that answers, for methods that don't merge"
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(min=1, help="peft: cut the sum of the updates to this rank; the card states the error"),
]

Level = Annotated[
    str,
    typer.Argument(
        help="linear, block (a decoder layer), head (with its loss), step (of training), eval (generation) "
        "or gpu (everything that only a GPU can show)"
    ),
]
Tokens = Annotated[
    int | None, typer.Option(min=16, help="step: padded tokens at once; eval: longest prompt, default 256")
]
Findings = Annotated[
    Path | None, typer.Option(parser=path, metavar="FOLDER", help="gpu: a new folder for the findings")
]


def score(
    task: str,
    file: PathArg,
    benchmark: Annotated[str, typer.Option(help="whose task: trace, olora, superni, or a folder")] = "trace",
    plugin: Plugins = None,
) -> None:
    """Score predictions from any source: FILE is a JSON list of {"prompt", "prediction", "answer"}. Prints
    JSON.

    TASK is the name of a task of the benchmark; under trace any other name is scored by exact match.
    """
    from codyra_llm.config.benchmark import load_benchmark
    from codyra_llm.evaluate.statistics import predictions, summarise_all

    known = load_benchmark(benchmark)
    unknown = known.unknown_tasks([task], "TASK: {} is not a task of " + benchmark)
    if unknown:
        raise Fault(*unknown)
    rows = ((row["prompt"], row["prediction"], row["answer"]) for row in predictions(file))
    print(json.dumps(summarise_all(known.score_each(task, rows)), indent=1))


def evaluate(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    benchmark: Benchmark = None,
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
    base: Base = None,
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
        from codyra_llm.experiment.observers import Display
        from codyra_llm.runtime.launch import leave

    given = overrides or []
    refuse_stray(given)
    signals.listen()
    wanted = Wanted(
        data=data,
        tasks=listed(tasks),
        general=general,
        general_tasks=listed(general_tasks),
        base=base,
        out=out,
        overrides=given,
        benchmark=benchmark,
    )
    score_checkpoint(checkpoint, wanted, [Display()])
    leave()


def refuse_stray(overrides: list[str]) -> None:
    """Raises Fault for an argument that is not key=value."""
    stray = [item for item in overrides if "=" not in item]
    if stray:
        raise Fault(
            f"'{stray[0]}' is neither an option nor an override; write key=value, e.g. eval.max_examples=10"
        )


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RUN@TASK",
            help="a model folder, hub id or .gguf, a PEFT folder, or a run, as it was after TASK ('base': "
            "before the first; default: the last task learnt)",
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
    after: Annotated[
        str | None, typer.Option(help="the model after this task; default: the last learnt")
    ] = None,
    without: Annotated[str | None, typer.Option(help="leave this task's update out")] = None,
    format: Format = "merged",
    dtype: Annotated[
        str | None,
        typer.Option(help="merged: float32, bfloat16 or float16; default: what the base is stored in"),
    ] = None,
    type: Annotated[str | None, typer.Option(help="gguf: f16, bf16, q8_0 or f32; default: f16")] = None,
    rank: Rank = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="upload it to this hub repository")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="make the repository public; default: private")
    ] = False,
    plugin: Plugins = None,
) -> None:
    """Write the model as it was after any task of a run, rebuilt from the base and the archived updates."""
    from codyra_llm.checkpoints import export as exports
    from codyra_llm.checkpoints import push as hub
    from codyra_llm.store.folder import RunFolder

    asked = exports.Export(after, without, format, dtype, type, rank)
    exports.check(asked, out)
    if push:
        hub.check(push, public)
    for line in exports.export(RunFolder(folder), asked, out):
        console.print(line)
    if push:
        console.print(f"pushed: {hub.push(out, push, public)}")


def bench(
    level: Level,
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
    tokens: Tokens = None,
    out: Findings = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="gpu: small shapes, to try the stages")] = False,
    seconds: Annotated[float | None, typer.Option(min=1, help="gpu: for all stages, default 600")] = None,
    stages: Annotated[str | None, typer.Option(help="gpu: names, e.g. facts,linear; default: all")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time training against PEFT and a floor, each arm first checked against float64: speed, peak memory,
    saved bytes; and generation against one prompt at a time.

    Example: codyra-llm bench step --model models/smollm2-135m --data data/LLM-CL-Benchmark_500 --arms
    peft,ours
    """
    if level == "gpu":
        _bench_gpu(out, tiny, seconds, stages)
        return
    of_gpu = {"--out": out, "--tiny": tiny, "--seconds": seconds, "--stages": stages}
    misplaced = [name for name, value in of_gpu.items() if value]
    if misplaced:
        raise Fault(f"{misplaced[0]}: it belongs to `bench gpu`; leave it out for `bench {one_line(level)}`")
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


def _bench_gpu(out: Path | None, tiny: bool, seconds: float | None, stages: str | None) -> None:
    """`bench gpu`, which has options of its own."""
    if out is None:
        raise Fault("--out: bench gpu needs a new folder for its findings; give one, e.g. --out found")
    from codyra_llm.bench.gpu.stages import bench_gpu

    bench_gpu(out, tiny, seconds or 600, listed(stages), console)

"""The stages of `bench gpu`, the most important first, and the processes that they run in."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from codyra_llm.bench.gpu.compared import block, gemma, head, linear, step
from codyra_llm.bench.gpu.context import FINDINGS, Context, record
from codyra_llm.bench.gpu.decoding import decode, oom
from codyra_llm.bench.gpu.facts import facts
from codyra_llm.bench.gpu.few_bits import nf4
from codyra_llm.bench.gpu.planned import plan
from codyra_llm.bench.gpu.runs import recipe, whole
from codyra_llm.bench.gpu.targets import ENDED, write_summary
from codyra_llm.bench.gpu.training import train
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.runtime.launch import leave_out_cudnn_attention


class Stage(NamedTuple):
    """A stage's function, and the seconds that it may take on a GPU."""

    work: Callable[[Context], None]
    seconds: float


STAGES = {
    "facts": Stage(facts, 60),
    "linear": Stage(linear, 60),
    "block": Stage(block, 60),
    "step": Stage(step, 120),
    "train": Stage(train, 60),
    "recipe": Stage(recipe, 75),
    "decode": Stage(decode, 60),
    "plan": Stage(plan, 60),
    "gemma": Stage(gemma, 60),
    "oom": Stage(oom, 45),
    "nf4": Stage(nf4, 45),
    "head": Stage(head, 60),
    "whole": Stage(whole, 100),
}
LEAST = 5.0  # seconds that must be left for a stage to begin
SLOW_IMPORTS = "codyra_llm.bench.gpu.slow_imports"
IMPORTS = 300.0  # seconds that imports may take


def bench_gpu(out: Path, tiny: bool, seconds: float, names: Sequence[str] | None, console: Console) -> None:
    """Run the stages one after the other, all of them within `seconds`, and write the summary."""
    chosen = _chosen(names)
    out.mkdir(parents=True, exist_ok=True)
    if (out / FINDINGS).exists():
        raise Fault(f"--out: {out} holds findings already; give a new folder")
    if not (torch.cuda.is_available() or tiny):
        raise Fault("bench gpu: there is no GPU here; try the stages with --tiny, or run this where one is")
    # Every stage is forked from a server that has imported everything and never initialised CUDA: so it
    # starts at once, and when it crashes it ends alone.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__] if torch.cuda.is_available() else [__name__, SLOW_IMPORTS])
    began = time.monotonic()
    run_process(server.Process(target=_nothing), IMPORTS)
    console.print(f"packages imported ({time.monotonic() - began:.0f} s)", highlight=False)
    end = began + seconds
    for name in chosen:
        began = time.monotonic()
        if end - began < LEAST:
            how = "not started: no time was left"
        else:
            process = server.Process(target=_stage, args=(name, out, tiny))
            how = run_process(process, min(limit(name), end - began))
        took = round(time.monotonic() - began, 1)
        record(out, name, ENDED, {"how": how, "seconds": took})
        console.print(f"{name}: {how} ({took:.0f} s)", highlight=False)
    write_summary(out, console)


def limit(name: str) -> float:
    """Seconds that a stage may take: on a CPU, which may be shared, ten times those on a GPU."""
    return STAGES[name].seconds * (1 if torch.cuda.is_available() else 10)


def _chosen(names: Sequence[str] | None) -> list[str]:
    """The stages to run, in their order. Raises Fault for a name that is not a stage."""
    for name in names or ():
        if name not in STAGES:
            known = ", ".join(STAGES)
            raise Fault(f"--stages: '{name}' is not a stage; choose from {known}.{nearest(name, STAGES)}")
    return [name for name in STAGES if names is None or name in names]


def run_process(process: BaseProcess, seconds: float) -> str:
    """Start a stage's process, give it so many seconds, and say how it ended."""
    process.start()
    try:
        process.join(seconds)
        if process.is_alive():
            return f"over its {seconds:.0f} s, and stopped"
    finally:
        _stop(process)
    code = process.exitcode
    if code is None or code < 0:
        return f"killed by signal {-(code or 0)}"
    return {0: "ok", 1: "failed, see log.txt"}.get(code, f"exit code {code}, see log.txt")


def _stop(process: BaseProcess) -> None:
    """End the process, if it still runs, and what it started."""
    assert process.pid is not None
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # its group has no process left, or it has not made one yet
            os.killpg(process.pid, number)
            process.join(2)
    if process.is_alive():
        process.kill()
        process.join()


def _nothing() -> None:
    """The body of the first process: it ends as soon as the server has imported everything."""


def _stage(name: str, out: Path, tiny: bool) -> None:
    """The body of a stage's process: all that it prints goes to OUT/log.txt."""
    os.setsid()
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    print(f"\n===== {name}", flush=True)
    leave_out_cudnn_attention()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = Context(name, out, device, tiny)
    try:
        STAGES[name].work(context)
    except Exception as error:  # a finding like any other
        traceback.print_exc()
        context.record("error", f"{type(error).__name__}: {str(error)[:400]}")
        sys.exit(1)
    sys.exit(1 if context.failed else 0)

"""Stages `linear`, `block`, `step`, `gemma` and `head`: the levels of `codyra-llm bench` in full size."""

from collections.abc import Callable
from functools import partial

import torch

from codyra_llm.bench import head as heads
from codyra_llm.bench import layers
from codyra_llm.bench.gpu.context import Context
from codyra_llm.bench.gpu.shapes import PAD, examples, model
from codyra_llm.bench.measure import Options
from codyra_llm.bench.step import steps
from codyra_llm.core.errors import is_out_of_memory

QUEUED = 10_000_000  # clock cycles of sleep: some 6 ms, in which the host queues one linear layer's kernels
LAYER_QUEUED = 40_000_000
STEP_ARMS = ("frozen", "peft", "peft-strong", "ours")


def options(context: Context, **others) -> Options:
    return Options(context.device, torch.bfloat16, **others)


def linear(context: Context) -> None:
    """One linear layer: as it runs, and with a full queue of kernels, so that the host's own time does not
    count."""
    shapes = [(8192, 4096, 4096, 16), (8192, 4096, 4096, 64), (2048, 4096, 4096, 16), (8192, 4096, 14336, 16)]
    for shape in [(64, 32, 32, 4)] if context.tiny else shapes:
        given = options(context, shape=shape, rounds=2 if context.tiny else 30)
        measure_arms(context, f"N,in,out,r = {shape}", partial(layers.linear, given))
    shape = (64, 32, 32, 4) if context.tiny else shapes[0]
    given = options(context, shape=shape, rounds=2 if context.tiny else 30, asleep=QUEUED)
    found = measure_queued(context, f"N,in,out,r = {shape}", partial(layers.linear, given))
    if found:
        context.target("linear layer", found["ours"]["time over floor"])


def block(context: Context) -> None:
    """One decoder layer of LLaMA-3-8B's shape, as it runs and with a full queue."""
    sizes = [(2, 8, 4)] if context.tiny else [(4, 2048, 16), (4, 512, 16)]
    for shape in sizes:
        given = options(context, shape=shape, rounds=2 if context.tiny else 15)
        measure_arms(context, f"rows,T,r = {shape}", partial(layers.block, given))
    given = options(context, shape=sizes[0], rounds=2 if context.tiny else 15, asleep=LAYER_QUEUED)
    found = measure_queued(context, f"rows,T,r = {sizes[0]}", partial(layers.block, given))
    if found:
        context.target("decoder layer", found["ours"]["time over floor"])


def measure_queued(context: Context, key: str, level: Callable[[], dict]) -> dict | None:
    """A comparison that leaves out the host's time; only a GPU has a queue of kernels to fill."""
    key = f"{key}, queue filled"
    return measure_arms(context, key, level) if context.cuda else context.on_gpu(key, level)


def measure_arms(context: Context, key: str, level: Callable[[], dict]) -> dict | None:
    """Measure the arms of one level, and record a few figures of each."""
    return context.attempt(key, lambda: figures(level()["arms"]))


def figures(arms: dict[str, dict]) -> dict[str, dict]:
    """The figures of each arm that a summary needs."""
    found = {}
    for name, row in arms.items():
        values = {
            "ms": row["milliseconds"]["median"],
            f"speed over {row['over']}": row["speedup"]["median"],
            "time over floor": row["over_floor"],
            "peak MB": row["peak_bytes"] / 1e6,
            "off float64": row["error"],
            "tokens/s": row.get("tokens_per_second"),
        }
        found[name] = {key: float(f"{x:.4g}") for key, x in values.items() if x is not None}
    return found


def step(context: Context) -> None:
    """Llama-3.2-1B's shape, long and short examples, against PEFT with its defaults and at its strongest."""
    for long in (True, False):
        kind = "long" if long else "short"
        found = measure_steps(context, "llama-3.2-1b", STEP_ARMS, kind)
        if found and "peft" in found:
            context.target(f"step over PEFT, {kind} examples", found["ours"]["speed over peft"])
        if found:
            strong = found["peft-strong"]["ms"] / found["ours"]["ms"]
            context.target(f"step over PEFT's strongest, {kind} examples", round(strong, 3))


def gemma(context: Context) -> None:
    """Gemma 2B's shape: its head has 256,000 tokens, which PEFT computes at every position."""
    measure_steps(context, "gemma-2b", ("frozen", "peft", "ours"), "short")


def measure_steps(context: Context, shape: str, arms: tuple[str, ...], kind: str) -> dict | None:
    """Whole training steps of these arms. If `peft` runs out of memory, that is recorded, and the others are
    measured without it."""
    count, batch = (4, 2) if context.tiny else (64, 16)
    given = examples(context, count, kind == "long")
    batches = [given[i : i + batch] for i in range(0, count, batch)]
    rounds = 1 if context.tiny else 3

    def measured(chosen: tuple[str, ...]) -> dict:
        made = options(context, arms=chosen, rounds=rounds)
        return figures(steps(model(context, shape), shape, batches, PAD, made)["arms"])

    key = f"{shape}, {kind} examples"
    try:
        found = measured(arms)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        context.record(f"{key}, peft", f"ran out of memory: {str(error)[:200]}")
    else:
        context.record(key, found)
        return found
    finally:
        context.free()
    return context.attempt(key, lambda: measured(tuple(arm for arm in arms if arm != "peft")))


def head(context: Context) -> None:
    """The head and its loss, with the vocabularies of LLaMA 3 and of Gemma."""
    sizes = [(128, 32, 64, 32)] if context.tiny else [(8192, 4096, 128256, 1024), (8192, 2048, 256000, 256)]
    for shape in sizes:
        given = options(context, shape=shape, rounds=2 if context.tiny else 10)
        measure_arms(context, f"N,hidden,vocabulary,labelled = {shape}", partial(heads.measure, given))

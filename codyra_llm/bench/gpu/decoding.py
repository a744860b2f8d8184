"""Stages `decode` and `oom`: how fast answers are decoded, and what happens when memory runs out."""

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from transformers import PreTrainedModel

from codyra_llm.bench.evaluation import one_by_one
from codyra_llm.bench.gpu.context import Context
from codyra_llm.bench.gpu.facts import copy_speed
from codyra_llm.bench.gpu.shapes import model
from codyra_llm.bench.gpu.training import training_without_memory, within
from codyra_llm.evaluate.budget import MOST, STEP, Budget, Share, within_memory
from codyra_llm.evaluate.generate import generate_ids, generated
from codyra_llm.models import fused_norm

NO_END = -1  # no token has this id, so no answer ends early
TARGETED = (1, 64)  # rows for which there is a target


def decode(context: Context) -> None:
    """Time decoding with random weights in Llama-3.2-1B's shape, a prompt of about 512 tokens per row. No
    step can be faster than reading the weights once."""
    made = model(context, "llama-3.2-1b").eval()
    fused_norm.use(made)  # as evaluation does
    weights = sum(p.nbytes for p in made.parameters())
    floor = 1000 * weights / copy_speed(context)
    context.record("reading the weights once, ms", round(floor, 4))
    for rows in (2,) if context.tiny else (1, 16, 64, 128):
        found = context.attempt(f"{rows} rows", partial(decode_times, context, made, rows, floor))
        if found and rows in TARGETED:
            context.target(f"decoding {rows} rows", found["step over reading the weights"])
    context.attempt("answers of many lengths", partial(places_time, context, made))
    context.attempt("transformers' generate, one row, ms per token", lambda: generate_time(context, made))


def decode_times(context: Context, made: PreTrainedModel, rows: int, floor: float) -> dict[str, float]:
    """Milliseconds of a step in the second half of the answers, when steps are recorded; and seconds of the
    first call, which meets new shapes, and of the second."""
    width, new = (24, 8) if context.tiny else (512, 128)
    prompts = random_prompts(rows, width, rows)
    first, again = (_seconds(context, made, prompts, new) for _ in range(2))
    half = _seconds(context, made, prompts, new // 2)
    each = 1000 * (again - half) / (new - new // 2)
    return {
        "first call, s": round(first, 3),
        "second call, s": round(again, 3),
        "ms per step": round(each, 3),
        "step over reading the weights": round(each / floor, 3),
        "new tokens/s": round(rows * new / again),
    }


def _seconds(context: Context, made: PreTrainedModel, prompts: list[list[int]], new: int) -> float:
    """Seconds to answer the prompts with `new` tokens each."""
    context.wait()
    began = perf_counter()
    generate_ids(made, prompts, new, NO_END)
    context.wait()
    return perf_counter() - began


def places_time(context: Context, made: PreTrainedModel) -> dict[str, float]:
    """Seconds for four batches of answers of which one in eight goes on to the limit, where prompts of later
    batches take the places of rows that are done, and batch after batch."""
    rows, width, new = (2, 12, 8) if context.tiny else (64, 512, 256)
    prompts = random_prompts(4 * rows, width, 1)
    batches = [list(range(start, start + rows)) for start in range(0, len(prompts), rows)]

    def stop(ids: list[int]) -> bool:
        return len(ids) > new // 8 and ids[0] % 8 > 0

    def seconds(shares: list[list[list[int]]]) -> float:
        context.wait()
        began = perf_counter()
        for own in shares:
            _answer(made, prompts, own, new, stop)
        context.wait()
        return perf_counter() - began

    alone = [[batch] for batch in batches]
    seconds([batches]), seconds(alone)  # both meet new shapes
    found = {"together, s": seconds([batches]), "apart, s": seconds(alone)}
    found["ratio"] = found["together, s"] / found["apart, s"]
    return {name: round(value, 3) for name, value in found.items()}


def _answer(
    made: PreTrainedModel,
    prompts: list[list[int]],
    batches: list[list[int]],
    new: int,
    stop: Callable[[list[int]], bool],
) -> None:
    """Answer the prompts of these batches, as one process's share."""
    share = Share("prompts", prompts, batches, new, len(prompts))
    generated(made, share, Budget(MOST["cuda"], STEP["cuda"]), NO_END, None, stop)


def generate_time(context: Context, made: PreTrainedModel) -> float:
    """Milliseconds per token of transformers' own `generate`, prompt included, for comparison."""
    width, new = (24, 4) if context.tiny else (512, 64)
    prompts = random_prompts(1, width, 1)
    return round(1000 * context.seconds(lambda: one_by_one(made, prompts, new, NO_END), 1) / new, 3)


def random_prompts(rows: int, width: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens, of a few lengths up to `width`, as in a batch of one task."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [width - i % 8 for i in range(rows)]
    return [torch.randint(5, 1000, (length,), generator=draw).tolist() for length in lengths]


def oom(context: Context) -> None:
    """Train and answer in too little memory: batches are halved until they fit."""
    context.on_gpu("training with 6 GB more than the weights", lambda: training_without_memory(context))
    context.on_gpu("answering with 3 GB more than the weights", lambda: answering_without_memory(context))


def answering_without_memory(context: Context) -> dict:
    """A batch of 131,072 tokens in 3 GB: it is halved until it fits, and all prompts are answered."""
    made, prompts = model(context, "llama-3.2-1b").eval(), random_prompts(120, 1000, 0)
    lengths, budget = [len(p) for p in prompts], Budget(MOST["cuda"], STEP["cuda"])

    def answering() -> dict:
        def answer(chosen: list[int]) -> list[list[int]]:
            return generate_ids(made, [prompts[i] for i in chosen], 16, NO_END)

        parts = [part for part, _ in within_memory(range(len(prompts)), lengths, 16, budget, answer)]
        return {"prompts": len(prompts), "answered": sum(map(len, parts)), "tokens at once": budget.tokens}

    return within(context, 3, answering)

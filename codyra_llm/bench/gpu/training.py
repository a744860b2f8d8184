"""Stage `train` and the first half of stage `oom`: the training loop itself."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from codyra_llm.bench.gpu.context import Context
from codyra_llm.bench.gpu.shapes import PAD, adapted, examples, model
from codyra_llm.config.sections import OptimSection
from codyra_llm.runtime.launch import accelerator
from codyra_llm.train.task_data import TaskData
from codyra_llm.train.trainer import Trainer

PACKAGE = f"{Path(__file__).parents[2]}/"
BATCH = 16
EPOCHS = 8  # of a run that is timed
STEPS = 10  # of a run in which waits are counted, and of one whose last two steps are profiled


def trainer(context: Context, batching: str, batch: int, tokens: int | None = None) -> Trainer:
    """The trainer of a codyra run, on a model of Llama-3.2-1B's shape."""
    made = model(context, "llama-3.2-1b")
    method = adapted(made, context)
    optim = OptimSection(
        lr=1e-4,
        schedule="constant",
        batch_size=batch,
        loss_average="token",
        betas=(0.9, 0.999),
        micro_batch_tokens=tokens,
    )
    return Trainer(accelerator(), method, made, optim, PAD, batching)


def train(context: Context) -> None:
    """Measure tokens per second, how often the host waits for the device, and which kernels run."""
    count, batch = (8, 4) if context.tiny else (4 * BATCH, BATCH)
    for batching, kind in (("auto", "short"), ("buckets", "short"), ("auto", "long")):
        given, made = examples(context, count, kind == "long"), trainer(context, batching, batch)
        task = TaskData("T", 0, given, [range(count)] * EPOCHS, [])
        key = f"{kind} examples, batching {batching}"
        context.attempt(f"fit, {key}", partial(fit_figures, made, task))
        if batching == "auto":
            few = TaskData("T", 0, given[:batch], [range(batch)] * STEPS, [])
            record_waits_and_kernels(context, made, few, kind)
        made.free()


def record_waits_and_kernels(context: Context, made: Trainer, task: TaskData, kind: str) -> None:
    """What the host waits for, and which kernels run, in steps on the same examples."""
    found = context.on_gpu(f"host waits of a step, {kind} examples", lambda: waits(made, task))
    if found is not None:
        context.target(f"host waits of a step, {kind} examples", sum(found.values()))
    context.on_gpu(f"kernels of a step, {kind} examples", lambda: kernels(context, made, task, kind))


def fit_figures(made: Trainer, task: TaskData) -> dict:
    """Run `Trainer.fit`; the figures are of its second half, when all is warm and what can be recorded is."""
    rows = list(made.fit(task, 1))
    recorder = made.engine.recorder
    warm = rows[len(rows) // 2 :]
    seconds = [row.seconds for row in warm]
    return {
        "packed": made.packed,
        "steps": len(rows),
        "tokens/s": round(sum(row.tokens for row in warm) / sum(seconds)),
        "median step, s": median(seconds),
        "recorded shapes": recorder.made if recorder else 0,
        "first and last loss": [rows[0].loss, rows[-1].loss],
    }


def waits(made: Trainer, task: TaskData) -> dict[str, int]:
    """How often the host waits for the device in a step, by line of the project. Of all steps, the one with
    the median number of waits: the first also reads all adapters, to check that they moved, and before one
    step codyra aligns them all."""
    steps: list[Counter[str]] = [Counter()]

    def count_wait(message: Warning | str, *_, **__) -> None:
        if "synchroniz" in str(message):
            steps[-1][_project_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count_wait
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in made.fit(task, 1):
                steps.append(Counter())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counted = sorted(steps[:-1], key=Counter.total)
    return dict(counted[len(counted) // 2].most_common())


def _project_line() -> str:
    """The innermost line of the project that this is called from, without this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and file != __file__:
            return f"{file.removeprefix(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def kernels(context: Context, made: Trainer, task: TaskData, kind: str) -> dict:
    """The kernels of the last two steps: the share of the time in which they run, how many there are, the
    longest, and those of Triton, of which there should be none. The whole profile goes to a file."""
    seen = profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    began = 0.0
    for row in made.fit(task, 1):
        if row.step == row.steps - 2:
            context.wait()
            seen.start()
            began = perf_counter()
    context.wait()
    wall = perf_counter() - began
    seen.stop()
    events = seen.key_averages()
    table = events.table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
    (context.out / f"profile-{kind}.txt").write_text(table, encoding="utf-8")
    ran = [event for event in events if event.device_type == DeviceType.CUDA]
    ran.sort(key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in ran) / 1e6
    return {
        "wall s of two steps, profiled": round(wall, 4),
        "share in which kernels run": round(busy / wall, 3),
        "kernels of two steps": sum(event.count for event in ran),
        "triton": [event.key for event in ran if "triton" in event.key.lower()],
        "longest, ms": {event.key[:80]: round(event.self_device_time_total / 1e3, 2) for event in ran[:12]},
    }


def within(context: Context, gigabytes: int, action: Callable[[], dict]) -> dict:
    """`action`, in a process that may allocate only so many gigabytes in addition to what it has now."""
    total = torch.cuda.get_device_properties(context.device).total_memory
    allowed = torch.cuda.memory_allocated(context.device) + (gigabytes << 30)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    try:
        return action()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def training_without_memory(context: Context) -> dict:
    """Micro-batches of 131,072 tokens in 6 GB: they are halved until they fit, and the losses are finite."""
    made, given = trainer(context, "auto", 64, tokens=1 << 17), examples(context, 64, long=True)
    task = TaskData("T", 0, given, [range(64)] * 2, [])

    def training() -> dict:
        rows = list(made.fit(task, 1))
        return {
            "tokens at once": [row.micro_batch_tokens for row in rows],
            "losses": [row.loss for row in rows],
        }

    return within(context, 6, training)

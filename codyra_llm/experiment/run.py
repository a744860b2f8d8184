"""The experiment on one page: for each task learn, consolidate, evaluate; what is in the run folder is not
done again.
"""

import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from codyra_llm.config.benchmark import digest
from codyra_llm.config.recipe import Recipe
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import await_file
from codyra_llm.core.version import __version__
from codyra_llm.evaluate import judge, vllm
from codyra_llm.experiment import open_ended, trackers
from codyra_llm.experiment.agenda import ahead, stages, tokens
from codyra_llm.experiment.export import write_merged, write_stage
from codyra_llm.experiment.preflight import preflight
from codyra_llm.experiment.scoring import evaluate
from codyra_llm.experiment.setup import Setup, prepare
from codyra_llm.lora.merge import report as update_report
from codyra_llm.lora.shared import share_inputs
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.models import fused_norm
from codyra_llm.models.tokenizer import tokenizer_hash
from codyra_llm.models.weights import WeightReader, fingerprint
from codyra_llm.report import card
from codyra_llm.report.html import page
from codyra_llm.report.in_short import in_short
from codyra_llm.report.summary import summarised
from codyra_llm.report.text import render, table
from codyra_llm.runtime import display, heartbeat, launch, precision, signals
from codyra_llm.runtime.display import console
from codyra_llm.runtime.forecast import Piece
from codyra_llm.runtime.launch import collectively, of_first, wait
from codyra_llm.runtime.memory import ProcessPeak
from codyra_llm.store.archive import Archive
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.lock import Lease
from codyra_llm.train.trainer import TaskData, Trainer

OPTIMIZER = "optimizer."  # in a task's state: Adam's moments


def run(recipe: Recipe) -> RunFolder:
    """Run a recipe, or go on with it where it stopped. Returns the finished run's folder. Raises Stopped when
    the process was asked to (`stop.listen`): the same call goes on."""
    acc = launch.accelerator()
    first = (
        acc.is_local_main_process
    )  # of each node, so that what is made or converted on first use is made once
    fast = precision.agreed(acc)
    prepared = partial(prepare, recipe, bfloat16=fast)
    setup = collectively(first, prepared)
    setup = collectively(not first, prepared) or setup
    collectively(True, _refuse_launch, setup, acc)
    base = fingerprint(setup.base) if first else None
    if acc.num_processes > 1:
        heartbeat.start(acc.process_index, acc.num_processes, setup.recipe.hang_minutes)
        told = preflight(acc, setup, base)
        if acc.is_main_process:
            console.print(told, soft_wrap=True)
    lease = Lease(Path(recipe.output))
    collectively(acc.is_main_process, lease.take)
    try:
        folder = RunFolder(lease.folder, lease, acc.is_main_process)
        collectively(acc.is_main_process, _claim, setup, acc, folder, base)
        collectively(True, await_file, folder.path / "manifest.json")
        with (
            display.running(acc.is_main_process),
            trackers.running(setup, folder, acc),
            heartbeat.until_stopped(),
        ):
            _run(setup, acc, folder)
    finally:
        lease.release()
    heartbeat.leave(0)  # whatever the caller does next, nobody watches for lost processes any more
    return folder


def _run(setup: Setup, acc: Accelerator, folder: RunFolder) -> None:
    peak = ProcessPeak(acc.device)
    # Of one process for all: what a later look into the folder finds depends on how far the first has come
    # meanwhile.
    learnt = of_first(len(folder.archive().files))
    collectively(acc.is_main_process, _foresee, setup, folder, learnt)
    if setup.recipe.eval.zero_shot or not setup.method.trains or setup.probes or setup.suite:
        evaluate(setup, folder, acc, -1)
    open_ended.answer(setup, folder, acc, -1, {"after": "base", "step": 0}, folder)
    collectively(acc.is_main_process, folder.check_scores, learnt)
    for index in range(len(setup.recipe.tasks)) if setup.method.trains else ():
        early = setup.method.joint and index + 1 < len(setup.recipe.tasks)
        if index >= learnt:
            pass_over(setup, folder, acc, index) if early else learn(setup, folder, acc, peak, index)
        if not early:
            evaluate(setup, folder, acc, index)
    if setup.method.trains:
        count = len(setup.recipe.tasks)
        open_ended.answer(
            setup, folder, acc, count - 1, {"after": setup.recipe.tasks[-1], "step": count}, folder
        )
    display.begin(Piece("close", "", len(setup.recipe.tasks)), "", [])
    collectively(acc.is_main_process, _checkpoint, setup, folder)
    open_ended.settle(setup, folder, acc)
    collectively(acc.is_main_process, finish, setup, folder)


def _foresee(setup: Setup, folder: RunFolder, learnt: int) -> None:
    """Tell the display what is still to do, and how long the tasks took that an earlier process learnt."""
    display.expect(ahead(setup, folder, learnt))
    for index, row in enumerate(folder.costs[:learnt] if not setup.method.joint else ()):
        display.measured(Piece("learn", row["task"], index + 1), tokens(setup, index), row["seconds"])


def _claim(setup: Setup, acc: Accelerator, folder: RunFolder, base: str) -> None:
    folder.clear_up()
    folder.check_results()
    if told := folder.open(setup.recipe, _manifest(setup, acc, base)):
        console.print(told, soft_wrap=True)


def learn(setup: Setup, folder: RunFolder, acc: Accelerator, peak: ProcessPeak, index: int) -> None:
    """Train on one task, from what is on disk to an update on disk."""
    archive, name = folder.archive(), setup.recipe.tasks[index]
    display.begin(Piece("learn", name, index + 1), name, setup.recipe.tasks)
    peak.restart()
    learnt = _train(setup, folder, acc, archive, index)  # from here on its model is freed
    peaks = gather_object([peak.read()])
    if acc.is_main_process:
        folder.add_costs(
            name,
            {
                "trained": learnt.trained,
                "seconds": round(learnt.seconds, 3),
                "peak_bytes": None if None in peaks else max(peaks),
            },
        )
        rows = _archive(setup, folder, archive, index, learnt.update, learnt.state)
        ranks = [(r["kept"], r["rank"]) for r in rows if r["rank"] is not None]
        counted = f", {sum(k for k, _ in ranks)} of {sum(r for _, r in ranks)} ranks kept" if ranks else ""
        console.print(f"{name}: learnt in {learnt.seconds:.0f} s{counted}")
        folder.clear_progress()
    wait(acc)
    for file in [folder.state(index)] * bool(learnt.state) + [archive.path(index, name)]:
        collectively(True, await_file, file)


class Learnt(NamedTuple):
    """The result of training on one task."""

    update: Update
    state: dict[str, torch.Tensor]  # the method's
    trained: int  # parameters
    seconds: float


def _train(setup: Setup, folder: RunFolder, acc: Accelerator, archive: Archive, index: int) -> Learnt:
    """Run the method on task `index`, on a model that is made for it and freed when this returns."""
    recipe, method, before = setup.recipe, setup.method, folder.load_state(index - 1)
    model, began = _start(setup, acc, archive, index), time.perf_counter()
    task = setup.task(model, archive, index, {k: v for k, v in before.items() if not k.startswith(OPTIMIZER)})
    fused_norm.use(model)
    method.attach(model)
    share_inputs(model, recipe.model.fused, across=launch.zero_stage(acc) < 3)
    method.begin_task(model, task)
    if recipe.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = Trainer(acc, method, model, recipe.optim, setup.tokenizer.pad_token_id, recipe.data.batching)
    if method.carries_optimizer and index:
        trainer.load_state(
            {k.removeprefix(OPTIMIZER): v for k, v in before.items() if k.startswith(OPTIMIZER)}
        )
    adapters = _fit(setup, folder, acc, trainer, archive, index)
    heartbeat.at(f"task {recipe.tasks[index]}, its end")
    display.note("consolidating")
    state = method.end_task(model, task, trainer.gradients)
    if method.carries_optimizer:
        state |= {OPTIMIZER + k: v for k, v in trainer.state().items()}
    update = method.consolidate(adapters, index)
    trainer.free()
    return Learnt(update, state, trainer.trained, trainer.earlier + time.perf_counter() - began)


def _start(setup: Setup, acc: Accelerator, archive: Archive, index: int) -> torch.nn.Module:
    """The model that task `index` starts from, packed if the recipe says so, on the device."""
    model = setup.model(archive, index - 1 if setup.method.mode == "add" else -1)
    if kind := setup.recipe.model.quantization:
        from codyra_llm.models.quantize import quantize  # bitsandbytes is an extra

        quantize(model, kind)
    return model.to(acc.device) if launch.zero_stage(acc) < 3 else model  # stage 3 moves it in shards


def pass_over(setup: Setup, folder: RunFolder, acc: Accelerator, index: int) -> None:
    """Leave an empty update for a task that a joint method learns later."""
    archive, name = folder.archive(), setup.recipe.tasks[index]
    if acc.is_main_process:
        archive.append(name, Update({}, 1.0, setup.method.mode))
    wait(acc)
    collectively(True, await_file, archive.path(index, name))


def _fit(
    setup: Setup, folder: RunFolder, acc: Accelerator, trainer: Trainer, archive: Archive, index: int
) -> dict[str, Adapter]:
    """Train from the last checkpoint inside the task on, if there is one."""
    name = setup.recipe.tasks[index]
    saves = folder.progress(index, name, archive.lineage[-1])
    found = of_first(saves.newest() if acc.is_main_process else None)
    start = trainer.resume(found) if found else 0
    if acc.is_main_process:
        folder.restart_log(name, start)
        if start:
            console.print(f"{name}: going on after step {start}")
    data = _task_data(setup, index)
    display.count(start, data.steps(setup.recipe.optim.batch_size))

    def log(row: dict) -> None:
        if acc.is_main_process:
            folder.log(row)
            display.count(row["step"], row["steps"], row)

    return trainer.fit(data, setup.recipe.seed, log, saves, start)


def _archive(
    setup: Setup,
    folder: RunFolder,
    archive: Archive,
    index: int,
    update: Update,
    state: dict[str, torch.Tensor],
) -> list[dict]:
    """Write what task `index` left; returns the rows of its update report."""
    before = archive.terms(index - 1)
    after = {"add": [*before, update], "replace": [update], "apart": [update]}[update.mode]
    rank = getattr(setup.recipe.method, "rank", None)
    rows, reader = [], WeightReader(setup.base)
    for row in update_report(reader, before, after, rank, setup.dtype, launch.device()):
        signals.check()
        heartbeat.at(f"task {setup.recipe.tasks[index]}, the update of {row['site']}")
        rows.append(row)
    folder.add_update_report(setup.recipe.tasks[index], rows)
    if state:
        folder.save_state(index, state)
    folder.may_write()
    archive.append(
        setup.recipe.tasks[index], update
    )  # last, since a task counts as done when its update exists
    return rows


def _checkpoint(setup: Setup, folder: RunFolder) -> None:
    """Write the final merged model, if asked."""
    console.print(table(summarised(folder)))
    folder.clear_progress()
    target = folder.path / "checkpoint"
    if setup.recipe.checkpoint and setup.method.trains:
        last = len(setup.recipe.tasks) - 1
        text = card.render(setup.base, folder, last, None, "merged" if setup.method.merges else "stage")
        if setup.method.merges:
            write_merged(setup, folder.archive(), last, None, target, text)
        else:
            write_stage(folder, last, target, text)
        console.print(f"{'merged model' if setup.method.merges else 'stage of the run'}: {target}")
    if lines := in_short(setup.recipe, summarised(folder)):
        console.print(lines)


def finish(setup: Setup, folder: RunFolder) -> None:
    """Write the reports, and the summary last: a run with a summary is finished."""
    folder.close_log()
    page.write([folder], folder.path / "report.html")
    summary = summarised(folder)
    folder.write_summary(summary, render(setup.recipe, summary, folder.updates))


def _task_data(setup: Setup, index: int) -> TaskData:
    records, epochs = setup.method.train_data(setup.stream, index)
    checked = setup.stream.records(index, "eval") if setup.recipe.optim.validate_every else []
    return TaskData(
        setup.recipe.tasks[index],
        index,
        setup.encoder.encode(records),
        epochs,
        setup.encoder.encode(checked) if checked else [],
        setup.method.epochs_apart(setup.stream, index),
    )


def _refuse_launch(setup: Setup, acc: Accelerator) -> None:
    stage, method = launch.zero_stage(acc), setup.method
    if setup.prompts and acc.is_main_process:  # only this process asks the judge, and has the key
        judge.require(setup.recipe.open_ended.judge)
    trackers.check(setup.recipe.trackers)
    if setup.recipe.eval.backend == "vllm":
        vllm.require()
    if stage > method.max_zero_stage:
        raise Fault(
            f"method {method.name} with these settings runs up to ZeRO stage {method.max_zero_stage} (0: "
            f"without DeepSpeed), this launch has stage {stage}; choose a lower stage in the accelerate "
            "config"
        )
    if stage == 3 and setup.recipe.model.quantization:
        raise Fault(
            f"model.quantization: '{setup.recipe.model.quantization}' runs up to ZeRO stage 2, this launch "
            "has stage 3, which shards floating-point weights; choose a lower stage in the accelerate "
            "config, or set it to null"
        )
    if stage and method.carries_optimizer:
        raise Fault(
            "method.carry_optimizer works with one process or DDP, not with DeepSpeed; set it to false or "
            "launch without DeepSpeed"
        )


def _manifest(setup: Setup, acc: Accelerator, base: str) -> dict:
    names = ["torch", "transformers", "accelerate", "datasets", "safetensors"]
    names += ["bitsandbytes"] if setup.recipe.model.quantization else []
    names += ["lm_eval"] if setup.suite else []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "codyra_llm": __version__,
        "python": sys.version.split()[0],
        **{name: version(name) for name in names},
        "device": gpu or "cpu",
        **({} if gpu else precision.arithmetic()),
        "dtype": str(setup.dtype),
        "world_size": acc.num_processes,
        "zero_stage": launch.zero_stage(acc),
        "base": base,
        "tokenizer": tokenizer_hash(setup.base),
        "stages": stages(setup),
        "benchmark": digest(setup.recipe.data.benchmark),
        "data": setup.stream.hashes(),
        "metrics": setup.metrics,
        **({"plugins": setup.origins} if setup.origins else {}),
    }

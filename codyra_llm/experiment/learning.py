"""One task of a run: from what is on disk to an update on disk."""

import time
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from codyra_llm.core.files import await_file
from codyra_llm.core.tensors import own_device
from codyra_llm.experiment.experiment import Experiment
from codyra_llm.experiment.setup import Setup
from codyra_llm.lora.merge import report as update_report
from codyra_llm.lora.shared import share_inputs
from codyra_llm.lora.update import Update
from codyra_llm.models import fused_norm, loading
from codyra_llm.models.weights import WeightReader
from codyra_llm.runtime import heartbeat, launch, signals
from codyra_llm.runtime.forecast import Piece
from codyra_llm.runtime.launch import collectively, is_first, of_first, say, wait
from codyra_llm.runtime.memory import ProcessPeak
from codyra_llm.store import observer
from codyra_llm.store.archive import Archive
from codyra_llm.store.checkpoint import Progress
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import CostRow, Stage, UpdateRow
from codyra_llm.train.task_data import TaskData
from codyra_llm.train.trainer import Trainer

OPTIMIZER = "optimizer."  # in a task's state: Adam's moments


class Learnt(NamedTuple):
    """The result of training on one task."""

    update: Update
    state: dict[str, Tensor]  # the method's
    trained: int  # parameters
    seconds: float


def learn(experiment: Experiment, stage: Stage, peak: ProcessPeak) -> None:
    """Train on the task of `stage`, and write its update, the method's state, its costs and its log to the
    run folder."""
    setup, store = experiment.setup, experiment.store
    archive = store.archive()
    observer.stage_begins(stage, Piece("learn", stage.after, stage.step))
    peak.restart()
    learnt = _train(experiment, stage, archive)  # its model is freed when this returns
    with heartbeat.waiting():
        peaks = gather_object([peak.read()])
    if is_first():
        most = None if None in peaks else max(peaks)
        store.add_costs(CostRow(stage.after, learnt.trained, round(learnt.seconds, 3), most))
        rows = _changes(setup, archive, stage, learnt.update)
        store.add_update_report(stage.after, rows)
        if learnt.state:
            store.save_state(stage.index, learnt.state)
        store.may_write()
        archive.append(stage.after, learnt.update)  # last, since a task counts as done when its update exists
        say(f"{stage.after}: learnt in {learnt.seconds:.0f} s{_ranks_kept(rows)}")
        store.clear_progress()
    wait()
    if learnt.state:
        collectively(True, await_file, store.state(stage.index))
    collectively(True, await_file, archive.path(stage.index, stage.after))


def pass_over(experiment: Experiment, stage: Stage) -> None:
    """Write an empty update for a task that a joint method learns later."""
    archive = experiment.store.archive()
    if is_first():
        archive.append(stage.after, Update({}, 1.0, experiment.method.mode))
    wait()
    collectively(True, await_file, archive.path(stage.index, stage.after))


def task_data(setup: Setup, index: int) -> TaskData:
    """What the method trains on at task `index`, encoded."""
    records, epochs = setup.method.train_data(setup.stream, index)
    checked = _validation(setup, index) if setup.recipe.optim.validate_every else []
    return TaskData(
        setup.recipe.tasks[index],
        index,
        setup.encoder.encode(records),
        epochs,
        setup.encoder.encode(checked) if checked else [],
        setup.method.epochs_apart(setup.stream, index),
    )


def _validation(setup: Setup, index: int) -> list[dict]:
    """The eval records of the task, or of all tasks where a joint method learns them together."""
    records = []
    for learnt in range(index + 1) if setup.method.joint else [index]:
        records += setup.stream.records(learnt, "eval")
    return records


def _train(experiment: Experiment, stage: Stage, archive: Archive) -> Learnt:
    """Run the method on the stage's task, on a model that is made for it and freed when this returns."""
    setup, recipe, method, store = experiment.setup, experiment.recipe, experiment.method, experiment.store
    model = _start(setup, archive, stage, experiment.acc)
    began = time.perf_counter()
    # The state after the previous task: the optimizer's moments, if they are carried over, and the method's
    # own.
    before = store.load_state(stage.index - 1)
    carried = {key: value for key, value in before.items() if key.startswith(OPTIMIZER)}
    state = {key: value for key, value in before.items() if key not in carried}
    task = setup.task(model, archive, stage.index, state)
    fused_norm.use(model)
    method.attach(model)
    share_inputs(model, recipe.model.fused, across=launch.zero_stage(experiment.acc) < 3)
    method.begin_task(model, task)
    if recipe.model.gradient_checkpointing:
        loading.checkpoint_layers(model)
    pad = setup.tokenizer.pad_token_id
    trainer = Trainer(experiment.acc, method, model, recipe.optim, pad, recipe.data.batching)
    if method.carries_optimizer and stage.index:
        trainer.load_state({key.removeprefix(OPTIMIZER): value for key, value in carried.items()})
    saves = store.progress(stage.index, stage.after, archive.lineage[-1])
    _fit(trainer, task_data(setup, stage.index), recipe.seed, saves, store)
    adapters = trainer.adapters()
    observer.at(f"task {stage.after}, its end")
    observer.noted("consolidating")
    # What fitted into memory while training fits now.
    task = setup.task(model, archive, stage.index, state, trainer.tokens)
    left = method.end_task(model, task, trainer.gradients)
    if method.carries_optimizer:
        left |= {OPTIMIZER + key: value for key, value in trainer.state().items()}
    update = method.consolidate(adapters, stage.index)
    trainer.free()
    return Learnt(update, left, trainer.trained, trainer.earlier + time.perf_counter() - began)


def _start(setup: Setup, archive: Archive, stage: Stage, acc: Accelerator) -> nn.Module:
    """The model that the stage's task starts from, packed if the recipe says so, on the device."""
    before = stage.index - 1 if setup.method.mode == "add" else -1
    model = setup.model(archive, before)
    kind = setup.recipe.model.quantization
    if kind:
        from codyra_llm.models.quantize import quantize  # bitsandbytes is an extra

        quantize(model, kind)
    return model.to(acc.device) if launch.zero_stage(acc) < 3 else model  # stage 3 moves it in shards


def _fit(trainer: Trainer, data: TaskData, seed: int, saves: Progress, store: RunFolder) -> None:
    """Train on `data`, from its start or, if there is one, from the last checkpoint inside the task, and log
    every step to `store`."""
    found = of_first(saves.newest)
    start = trainer.resume(found) if found else 0
    if is_first():
        store.restart_log(data.name, start)
    if start:
        say(f"{data.name}: going on after step {start}")
    observer.counted(start, data.steps(trainer.optim.batch_size))
    for row in trainer.fit(data, seed, saves, start):
        if is_first():
            store.log(row)


def _changes(setup: Setup, archive: Archive, stage: Stage, update: Update) -> list[UpdateRow]:
    """What `update`, which is not in the archive yet, changes in each of the base's weights."""
    before = archive.terms(stage.index - 1)
    after = {"add": [*before, update], "replace": [update], "apart": [update]}[update.mode]
    rank = getattr(setup.recipe.method, "rank", None)
    reader, device = WeightReader(setup.base), own_device()
    rows = []
    for change in update_report(reader, before, after, rank, setup.dtype, device):
        signals.check()
        observer.at(f"task {stage.after}, the update of {change.site}")
        rows.append(UpdateRow(stage.after, *change))
    return rows


def _ranks_kept(rows: list[UpdateRow]) -> str:
    """How many ranks the update kept, for the line that says what was learnt."""
    ranked = [row for row in rows if row.rank is not None]
    if not ranked:
        return ""
    kept = sum(row.kept or 0 for row in ranked)
    rank = sum(row.rank or 0 for row in ranked)
    return f", {kept} of {rank} ranks kept"

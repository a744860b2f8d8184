"""The whole experiment in one short file: for each task learn, consolidate, evaluate. What is already in the
run folder is skipped."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator

from codyra_llm.config.benchmark import digest
from codyra_llm.config.recipe import Recipe
from codyra_llm.core.version import __version__
from codyra_llm.experiment import agenda, observers, open_ended, scoring
from codyra_llm.experiment.experiment import Experiment
from codyra_llm.experiment.export import write_merged, write_stage
from codyra_llm.experiment.learning import learn, pass_over
from codyra_llm.experiment.preflight import preflight, refuse_launch
from codyra_llm.experiment.setup import Setup, prepare
from codyra_llm.models.tokenizer import tokenizer_hash
from codyra_llm.models.weights import fingerprint
from codyra_llm.report import card
from codyra_llm.report.html import page
from codyra_llm.report.summary import summarised
from codyra_llm.report.text import render
from codyra_llm.runtime import heartbeat, launch, precision
from codyra_llm.runtime.forecast import Piece
from codyra_llm.runtime.launch import by_machine, collectively, is_first, of_first, on_first, on_others, say
from codyra_llm.runtime.memory import ProcessPeak
from codyra_llm.store import observer
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.lock import Lease
from codyra_llm.store.observer import Observer
from codyra_llm.store.rows import Stage


@launch.in_one_thread()
def run(recipe: Recipe, observers: Sequence[Observer] = ()) -> RunFolder:
    """Run a recipe, or resume it where it stopped. Returns the finished run's folder. `observers` are called
    in the first process. Raises one Fault with everything that is wrong with the recipe, and where another
    thread is at work; and Stopped when the process was asked to stop (`signals.listen`): the same call
    resumes."""
    acc = launch.accelerator()
    setup, base = _prepared(recipe, acc)
    with (
        _opened(setup, acc, base) as experiment,
        _observed(experiment, observers),
        heartbeat.until_stopped(),
    ):
        _run(experiment)
    heartbeat.leave(0)  # the caller may do anything next, so stop watching for lost processes
    return experiment.store


def _run(experiment: Experiment) -> None:
    """Do what is missing in the run folder, stage by stage."""
    method, peak = experiment.method, ProcessPeak(experiment.acc.device)
    store = experiment.store
    learnt = of_first(lambda: len(store.archive().files))
    on_first(store.check_scores, learnt)
    on_first(_foresee, experiment, learnt)
    on_first(scoring.note_floor, experiment.setup, store)
    last = len(experiment.recipe.tasks) - 1
    evaluate(experiment, experiment.stage(-1))
    to_learn = range(last + 1) if method.trains else range(0)
    for index in to_learn:
        stage = experiment.stage(index)
        early = method.joint and index < last  # a joint method learns all tasks at the last stage
        if index >= learnt:
            pass_over(experiment, stage) if early else learn(experiment, stage, peak)
        if not early:
            evaluate(experiment, stage)
    finish(experiment)


def evaluate(experiment: Experiment, stage: Stage) -> None:
    """Score the model of `stage`; the base and the last one answer the open-ended prompts too."""
    scoring.evaluate(experiment, stage)
    if stage.step in (0, len(experiment.recipe.tasks)):
        open_ended.answer(experiment, stage)


def finish(experiment: Experiment) -> None:
    """The final checkpoint, the judge's verdicts, and the reports."""
    last = experiment.stage(len(experiment.recipe.tasks) - 1)
    observer.stage_begins(last, Piece("close", "", last.step))
    on_first(_checkpoint, experiment, last)
    open_ended.settle(experiment)
    on_first(_report, experiment)


def _prepared(recipe: Recipe, acc: Accelerator) -> tuple[Setup, str | None]:
    """What the recipe names, checked on all processes, and the hash of the base (None on processes that leave
    it to the first of their node)."""
    if acc.num_processes > 1:
        heartbeat.start(acc.process_index, acc.num_processes)
    setup = by_machine(partial(prepare, recipe, bfloat16=precision.agreed(acc)))
    collectively(True, refuse_launch, setup, acc)
    base = collectively(acc.is_local_main_process, fingerprint, setup.base)
    if acc.num_processes > 1:
        heartbeat.limit(setup.recipe.hang_minutes)
        say(preflight(acc, setup, base))
    return setup, base


@contextmanager
def _opened(setup: Setup, acc: Accelerator, base: str | None) -> Iterator[Experiment]:
    """Within this block this launch holds the lock of the run folder."""
    lease = Lease(Path(setup.recipe.output))
    on_first(lease.take)
    try:
        on_others(lease.await_token, of_first(lambda: lease.token))
        store = RunFolder(lease.folder, lease, acc.is_main_process)
        experiment = Experiment(setup, store, acc, models=store)
        on_first(_claim, experiment, base)
        on_others(store.await_files, of_first(store.read_by_all))
        yield experiment
    finally:
        lease.release()


@contextmanager
def _observed(experiment: Experiment, added: Sequence[Observer]) -> Iterator[None]:
    """Within this block the heartbeat, and in the first process the recipe's trackers and the `added`
    observers, are called."""
    listening: list[Observer] = [observers.Beats()]
    recipe = experiment.recipe
    if recipe.trackers:
        steps = agenda.steps(experiment.setup)
        trackers = on_first(observers.Trackers, recipe, experiment.store, experiment.acc, steps)
        listening += [trackers] if trackers else []
    if is_first():
        listening += added
    with observer.observing(recipe.tasks, *listening):
        yield


def _claim(experiment: Experiment, base: str) -> None:
    """Open the run folder for this recipe, new or to resume. Raises Fault where it is damaged or belongs to
    another recipe."""
    store = experiment.store
    store.clear_up()
    store.check_results()
    remark = store.open(experiment.recipe, _manifest(experiment.setup, experiment.acc, base))
    if remark:
        say(remark)


def _foresee(experiment: Experiment, learnt: int) -> None:
    """Report to observers what is still to do, and how long tasks took that an earlier process learnt."""
    setup, store = experiment.setup, experiment.store
    observer.expected(agenda.remaining(setup, store, learnt))
    if experiment.method.joint:
        return
    for index, row in enumerate(store.costs[:learnt]):
        observer.measured(Piece("learn", row.task, index + 1), agenda.tokens(setup, index), row.seconds)


def _checkpoint(experiment: Experiment, last: Stage) -> None:
    """Write the final merged model, if asked. That of a finished run is written anew, since nothing
    guarantees that no byte of it has changed."""
    setup, store, method = experiment.setup, experiment.store, experiment.method
    store.clear_progress()
    if not (setup.recipe.checkpoint and method.trains):
        return
    target = store.path / "checkpoint"
    text = card.render(setup.base, store, last.index, None, "merged" if method.merges else "stage")
    if method.merges:
        write_merged(setup, store.archive(), last.index, None, target, text)
        say(f"merged model: {target}")
    else:
        write_stage(store, last.index, target, text)
        say(f"stage of the run: {target}")


def _report(experiment: Experiment) -> None:
    """Write the reports, and the summary last: a run with a summary is finished."""
    store = experiment.store
    store.close_log()
    page.write([store], store.path / "report.html")
    summary = summarised(store)
    store.write_summary(summary, render(experiment.recipe, summary, store.updates))


def _manifest(setup: Setup, acc: Accelerator, base: str) -> dict:
    """What the run is made with: versions, device, launch, and hashes of the base, the data and the
    metrics."""
    names = ["torch", "transformers", "accelerate", "datasets", "safetensors"]
    if setup.recipe.model.quantization:
        names.append("bitsandbytes")
    if setup.suite:
        names.append("lm_eval")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    manifest = {
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
        "stages": agenda.evaluations(setup),
        "benchmark": digest(setup.recipe.data.benchmark),
        "data": setup.stream.hashes(),
        "metrics": setup.metrics,
    }
    own = setup.method.own_data(setup.stream)
    if own:
        manifest["method_data"] = own
    if setup.origins:
        manifest["plugins"] = setup.origins
    return manifest

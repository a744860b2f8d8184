"""The experiment on one page: for each task learn, consolidate, evaluate; what lies in the run folder is not done again."""

import sys
import time
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from safetensors.torch import save_file

from . import __version__, distributed, models
from .benchmarks.trace.metrics import headline, score
from .distributed import collectively
from .errors import Fault
from .evaluate import generate, vllm
from .evaluate.scores import summarise
from .export import write_merged, write_stage
from .files import await_file, replacing
from .folder import RunFolder
from .lora.archive import Adapter, Archive, Update
from .lora.merge import report as update_report
from .lora.shared import share_inputs
from .meter import ProcessPeak
from .preflight import preflight
from .recipe import Recipe
from .report import page
from .report.tables import render, summarise_run, table
from .setup import PROBE_TOKENS, Setup, prepare
from .train import TaskData, Trainer

console = Console(highlight=False)
BACKENDS = {"torch": generate.answering, "vllm": vllm.answering}
OPTIMIZER = "optimizer."  # in a task's state: Adam's moments


def run(recipe: Recipe) -> RunFolder:
    """Run a recipe, or go on with it where it stopped. Returns the finished run's folder."""
    acc = distributed.accelerator()
    first = acc.is_local_main_process  # of each node, so that what is made or converted on first use is made once
    setup = collectively(first, prepare, recipe)
    setup = collectively(not first, prepare, recipe) or setup
    collectively(True, _refuse_launch, setup, acc)
    base = models.fingerprint(setup.base) if first else None
    if acc.num_processes > 1:
        told = preflight(acc, setup, base)
        if acc.is_main_process:
            console.print(told, soft_wrap=True)
    peak = ProcessPeak(acc.device)
    folder = RunFolder(Path(recipe.output))
    manifest = _manifest(setup, acc, base) if acc.is_main_process else None
    collectively(acc.is_main_process, folder.open, setup.recipe, manifest)
    collectively(True, await_file, folder.path / "manifest.json")
    if setup.recipe.eval.zero_shot or not setup.method.trains or setup.probes or setup.suite:
        evaluate(setup, folder, acc, -1)
    # Of one process for all: what a later look into the folder finds depends on how far the first has come meanwhile.
    learnt = broadcast_object_list([len(folder.archive().files)])[0]
    for index in range(len(setup.recipe.tasks)) if setup.method.trains else ():
        early = setup.method.joint and index + 1 < len(setup.recipe.tasks)
        if index >= learnt:
            pass_over(setup, folder, acc, index) if early else learn(setup, folder, acc, peak, index)
        if not early:
            evaluate(setup, folder, acc, index)
    collectively(acc.is_main_process, finish, setup, folder)
    return folder


def learn(setup: Setup, folder: RunFolder, acc: Accelerator, peak: ProcessPeak, index: int) -> None:
    """Train on one task, from what is on disk to an update on disk."""
    archive, name = folder.archive(), setup.recipe.tasks[index]
    peak.restart()
    model, began = _start(setup, acc, archive, index), time.perf_counter()
    trainer, adapters, state = _train(setup, folder, acc, archive, model, index)
    seconds, peaks = time.perf_counter() - began, gather_object([peak.read()])
    if acc.is_main_process:
        folder.add_costs(name, {"trained": trainer.trained, "seconds": round(seconds, 3),
                                "peak_bytes": None if None in peaks else max(peaks)})
        rows = _archive(setup, folder, archive, index, setup.method.consolidate(adapters, index), state)
        ranks = [(r["kept"], r["rank"]) for r in rows if r["rank"] is not None]
        counted = f", {sum(k for k, _ in ranks)} of {sum(r for _, r in ranks)} ranks kept" if ranks else ""
        console.print(f"{name}: learnt in {seconds:.0f} s{counted}")
    trainer.engine.free()
    acc.wait_for_everyone()
    for file in [folder.state(index)] * bool(state) + [archive.path(index, name)]:
        collectively(True, await_file, file)


def _train(setup: Setup, folder: RunFolder, acc: Accelerator, archive: Archive, model: torch.nn.Module,
           index: int) -> tuple[Trainer, dict[str, Adapter], dict[str, torch.Tensor]]:
    """The method's whole course on task `index`: the trainer, the adapters that it left, the method's state."""
    recipe, method, before = setup.recipe, setup.method, folder.load_state(index - 1)
    task = setup.task(model, archive, index, {k: v for k, v in before.items() if not k.startswith(OPTIMIZER)})
    method.attach(model)
    share_inputs(model, recipe.model.fused, across=distributed.zero_stage(acc) < 3)
    method.begin_task(model, task)
    if recipe.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = Trainer(acc, method, model, recipe.optim, setup.tokenizer.pad_token_id, recipe.data.batching)
    if method.carries_optimizer and index:
        trainer.load_state({k.removeprefix(OPTIMIZER): v for k, v in before.items() if k.startswith(OPTIMIZER)})
    adapters = _fit(setup, folder, acc, trainer, index)
    state = method.end_task(model, task, trainer.gradients)
    if method.carries_optimizer:
        state |= {OPTIMIZER + k: v for k, v in trainer.state().items()}
    return trainer, adapters, state


def _start(setup: Setup, acc: Accelerator, archive: Archive, index: int) -> torch.nn.Module:
    """The model that task `index` starts from, packed if the recipe says so, on the device."""
    model = setup.model(archive, index - 1 if setup.method.mode == "add" else -1)
    if kind := setup.recipe.model.quantization:
        from .quantize import quantize  # bitsandbytes is an extra

        quantize(model, kind)
    return model.to(acc.device) if distributed.zero_stage(acc) < 3 else model  # stage 3 moves it in shards


def pass_over(setup: Setup, folder: RunFolder, acc: Accelerator, index: int) -> None:
    """Leave an empty update for a task that a joint method learns later."""
    archive, name = folder.archive(), setup.recipe.tasks[index]
    if acc.is_main_process:
        archive.append(name, Update({}, 1.0, setup.method.mode))
    acc.wait_for_everyone()
    collectively(True, await_file, archive.path(index, name))


def _fit(setup: Setup, folder: RunFolder, acc: Accelerator, trainer: Trainer, index: int) -> dict[str, Adapter]:
    name = setup.recipe.tasks[index]
    if acc.is_main_process:
        folder.restart_log(name)
    with console.status(f"{name}: learning") as status:
        def log(row: dict) -> None:
            if acc.is_main_process:
                folder.log(row)
                status.update(f"{name}: step {row['step']}/{row['steps']}, loss {row['loss']:.3f}")
        return trainer.fit(_task_data(setup, index), setup.recipe.seed, log)


def _archive(setup: Setup, folder: RunFolder, archive: Archive, index: int, update: Update,
             state: dict[str, torch.Tensor]) -> list[dict]:
    """Write what task `index` left; returns the rows of its update report."""
    before = archive.terms(index - 1)
    after = {"add": [*before, update], "replace": [update], "apart": [update]}[update.mode]
    rank = getattr(setup.recipe.method, "rank", None)
    rows = list(update_report(models.WeightReader(setup.base), before, after, rank, setup.dtype))
    folder.add_update_report(setup.recipe.tasks[index], rows)
    if state:
        with replacing(folder.state(index)) as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary)
    archive.append(setup.recipe.tasks[index], update)  # last: a task is done when its update is there
    return rows


def evaluate(setup: Setup, folder: RunFolder, acc: Accelerator, index: int) -> None:
    """Score the merged model after task `index` (-1: the base) on what the recipe asks for and no row holds yet."""
    tasks, wanted = setup.recipe.tasks, setup.recipe.eval
    zero_shot = index < 0 and (wanted.zero_shot or not setup.method.trains)
    count = len(tasks) if zero_shot or (index >= 0 and wanted.tasks == "all") else index + 1
    general = index in (-1, len(tasks) - 1) or setup.recipe.general.when == "each"
    known = {"after": tasks[index] if index >= 0 else "base", "step": index + 1}
    measure(setup, folder, acc, index, known, range(count), general, folder)


def measure(setup: Setup, folder: RunFolder, acc: Accelerator, index: int, known: dict, tasks: Iterable[int], general: bool,
            out: RunFolder) -> None:
    """Score the model after task `index` of the run in `folder` on these `tasks`, and on what `general` asks for, as far
    as `out` has no row of that step. `known` ("after", "step") goes into the rows."""
    recipe = setup.recipe
    done = broadcast_object_list([{row["task"] for row in out.scores if row["step"] == known["step"]}])[0]
    due = [(recipe.tasks[i], setup.test(i), setup.new_tokens(i)) for i in tasks]
    due += [(name, records, PROBE_TOKENS) for name, records in setup.probes.items()] if general else []
    if pending := [item for item in due if item[0] not in done]:
        with BACKENDS[recipe.eval.backend](acc, setup, folder, index) as answers:
            for task, records, new in pending:
                began, prompts = time.perf_counter(), [r["prompt"] for r in records]
                number = recipe.tasks.index(task) if task in recipe.tasks else None
                if number is not None:
                    prompts = setup.method.present(setup.stream, setup.encoder, number, prompts)
                predictions = answers(prompts, new, number)
                if number is not None:
                    predictions = [setup.method.read(task, p) for p in predictions]
                if acc.is_main_process:
                    _add_scores(setup, out, {**known, "task": task}, records, predictions, began)
    if names := [name for name in setup.suite if general and name not in done]:
        _measure_general(setup, folder, acc, index, known, names, out)
    acc.wait_for_everyone()


def _measure_general(setup: Setup, folder: RunFolder, acc: Accelerator, index: int, known: dict, names: list[str],
                     out: RunFolder) -> None:
    from .evaluate import harness  # lm_eval is an extra

    model, conditions = setup.stage(folder, index, acc.device)
    lm = harness.Live(acc, model, setup.tokenizer, setup.recipe.eval.batch_tokens,
                      conditions and partial(conditions, task=None))
    measured = []
    for name in names:
        found = harness.measure(lm, setup.suite[name], setup.recipe.general, setup.recipe.data.chat_template)
        if acc.is_main_process:
            measured.append(found)
            out.add_scores({**known, **found.row}, found.predictions)
            console.print(f"after {known['after']}: {name} {found.row['score']:.1f}  ({found.row['headline']}, "
                          f"{found.row['seconds']:.0f} s)")
    if acc.is_main_process:
        harness.write(out.path / "lm_eval", f"{known['step']:02d}-{known['after']}", lm, setup.recipe.general,
                      measured)


def finish(setup: Setup, folder: RunFolder) -> None:
    """If asked the final merged model, then the reports, and the summary last: whoever finds it finds a finished run."""
    summary = summarise_run(setup.recipe, bool(setup.method.trains), folder.scores, folder.costs)
    console.print(table(summary))
    target = folder.path / "checkpoint"
    if setup.recipe.checkpoint and setup.method.trains:
        last = len(setup.recipe.tasks) - 1
        if setup.method.merges:
            write_merged(setup, folder.archive(), last, None, target)
        else:
            write_stage(folder, last, target)
        console.print(f"{'merged model' if setup.method.merges else 'stage of the run'}: {target}")
    page.write([folder], folder.path / "report.html")
    folder.write_summary(summary, render(setup.recipe, summary, folder.updates))


def _add_scores(setup: Setup, folder: RunFolder, known: dict, records: list[dict], predictions: list[str],
                began: float) -> None:
    task, prompts, targets = known["task"], [r["prompt"] for r in records], [r["answer"] for r in records]
    scores, main = score(task, prompts, predictions, targets), headline(task, setup.recipe.data.protocol)
    row = {**known, "kind": "task" if task in setup.recipe.tasks else "general",
           "headline": main, "score": summarise(scores[main])["mean"],
           "metrics": {name: summarise(values) for name, values in scores.items()},
           "empty": sum(not p for p in predictions), "seconds": round(time.perf_counter() - began, 2)}
    folder.add_scores(row, [{"prompt": p, "prediction": q, "answer": t, **{n: v[i] for n, v in scores.items()}}
                            for i, (p, q, t) in enumerate(zip(prompts, predictions, targets))])
    console.print(f"after {known['after']}: {task} {row['score']:.1f}  ({main}, {row['seconds']:.0f} s)")


def _task_data(setup: Setup, index: int) -> TaskData:
    records, epochs = setup.method.train_data(setup.stream, index)
    checked = setup.stream.records(index, "eval") if setup.recipe.optim.validate_every else []
    return TaskData(setup.recipe.tasks[index], index, setup.encoder.encode(records), epochs,
                    setup.encoder.encode(checked) if checked else [])


def _refuse_launch(setup: Setup, acc: Accelerator) -> None:
    stage, method = distributed.zero_stage(acc), setup.method
    if setup.recipe.eval.backend == "vllm":
        vllm.require()
    if stage > method.max_zero_stage:
        raise Fault(f"method {method.name} with these settings runs up to ZeRO stage {method.max_zero_stage} "
                    f"(0: without DeepSpeed), this launch has stage {stage}; choose a lower stage in the accelerate config")
    if stage == 3 and setup.recipe.model.quantization:
        raise Fault(f"model.quantization: '{setup.recipe.model.quantization}' runs up to ZeRO stage 2, this launch has "
                    f"stage 3, which shards floating-point weights; choose a lower stage in the accelerate config, or "
                    f"set it to null")
    if stage and method.carries_optimizer:
        raise Fault("method.carry_optimizer works with one process or DDP, not with DeepSpeed; set it to false or "
                    "launch without DeepSpeed")


def _manifest(setup: Setup, acc: Accelerator, base: str) -> dict:
    names = ["torch", "transformers", "accelerate", "datasets", "safetensors"]
    names += ["bitsandbytes"] if setup.recipe.model.quantization else []
    names += ["lm_eval"] if setup.suite else []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"codyra_llm": __version__, "python": sys.version.split()[0], **{name: version(name) for name in names},
            "device": gpu or "cpu", "dtype": str(setup.dtype), "world_size": acc.num_processes,
            "zero_stage": distributed.zero_stage(acc), "base": base}

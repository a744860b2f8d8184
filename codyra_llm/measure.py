"""The scores of one stage of a run, or of a checkpoint: on tasks, and of general ability."""

import time
from collections.abc import Iterable
from functools import partial

from accelerate import Accelerator
from rich.console import Console

from . import stop, watch
from .distributed import of_first, wait
from .evaluate import generate, vllm
from .evaluate.scores import summarise
from .folder import RunFolder
from .setup import PROBE_TOKENS, Setup

console = Console(highlight=False)
BACKENDS = {"torch": generate.answering, "vllm": vllm.answering}


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
    done = of_first({row["task"] for row in out.scores if row["step"] == known["step"]} if acc.is_main_process else None)
    due = [(recipe.tasks[i], setup.test(i), setup.new_tokens(i)) for i in tasks]
    due += [(name, records, PROBE_TOKENS) for name, records in setup.probes.items()] if general else []
    if pending := [item for item in due if item[0] not in done]:
        with BACKENDS[recipe.eval.backend](acc, setup, folder, index) as answers:
            for task, records, new in pending:
                stop.check()
                watch.at(f"answers to {task} after {known['after']}")
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
    wait(acc)


def _measure_general(setup: Setup, folder: RunFolder, acc: Accelerator, index: int, known: dict, names: list[str],
                     out: RunFolder) -> None:
    from .evaluate import harness  # lm_eval is an extra

    model, conditions = setup.stage(folder, index, acc.device)
    lm = harness.Live(acc, model, setup.tokenizer, setup.recipe.eval.batch_tokens,
                      conditions and partial(conditions, task=None))
    for name in names:
        stop.check()
        watch.at(f"general ability {name} after {known['after']}")
        began = time.perf_counter()
        found = harness.measure(lm, setup.suite[name], setup.recipe.general, setup.recipe.data.chat_template)
        if acc.is_main_process:
            harness.write(out.path / "lm_eval", f"{known['step']:02d}-{known['after']}", lm, setup.recipe.general, found)
            out.add_scores({**known, **found.row}, found.predictions)
            console.print(f"after {known['after']}: {name} {found.row['score']:.1f}  ({found.row['headline']}, "
                          f"{time.perf_counter() - began:.0f} s)")


def _add_scores(setup: Setup, folder: RunFolder, known: dict, records: list[dict], predictions: list[str],
                began: float) -> None:
    task, prompts, targets = known["task"], [r["prompt"] for r in records], [r["answer"] for r in records]
    benchmark = setup.stream.benchmark
    scores, main = benchmark.score(task, prompts, predictions, targets), benchmark.headline(task, setup.recipe.data.protocol)
    row = {**known, "kind": "task" if task in setup.recipe.tasks else "general",
           "headline": main, "score": summarise(scores[main])["mean"],
           "metrics": {name: summarise(values) for name, values in scores.items()},
           "empty": sum(not p for p in predictions)}
    folder.add_scores(row, [{"prompt": p, "prediction": q, "answer": t, **{n: v[i] for n, v in scores.items()}}
                            for i, (p, q, t) in enumerate(zip(prompts, predictions, targets))])
    console.print(f"after {known['after']}: {task} {row['score']:.1f}  ({main}, {time.perf_counter() - began:.0f} s)")

"""The scores of one stage of a run, or of a checkpoint: on tasks, and of general ability."""

import time
from collections.abc import Iterable
from functools import partial

from accelerate import Accelerator

from codyra_llm.evaluate.statistics import summarise_all
from codyra_llm.experiment.backends import torch_answering, vllm_answering
from codyra_llm.experiment.setup import PROBE_TOKENS, Setup
from codyra_llm.runtime import display, heartbeat, signals
from codyra_llm.runtime.display import console
from codyra_llm.runtime.forecast import Piece
from codyra_llm.runtime.launch import of_first, wait
from codyra_llm.store.folder import RunFolder

BACKENDS = {"torch": torch_answering, "vllm": vllm_answering}


def evaluate(setup: Setup, folder: RunFolder, acc: Accelerator, index: int) -> None:
    """Score the merged model after task `index` (-1: the base) on everything that the recipe asks for and
    that has no row yet.
    """
    known = {"after": setup.recipe.tasks[index] if index >= 0 else "base", "step": index + 1}
    measure(setup, folder, acc, index, known, *asked(setup, index), folder)


def asked(setup: Setup, index: int) -> tuple[range, bool]:
    """The tasks to score after task `index` (-1: the base), and whether to measure general ability."""
    at_an_end = index in (-1, len(setup.recipe.tasks) - 1)
    return _tasks_asked(setup, index), at_an_end or setup.recipe.general.when == "each"


def _tasks_asked(setup: Setup, index: int) -> range:
    count, wanted = len(setup.recipe.tasks), setup.recipe.eval
    if index < 0:
        return range(count) if wanted.zero_shot or not setup.method.trains else range(0)
    if wanted.when == "ends" and index < count - 1:
        return range(index, index + 1)
    return range(count if wanted.tasks == "all" else index + 1)


def pieces(
    setup: Setup, step: int, tasks: Iterable[int], general: bool, done: set[str]
) -> dict[Piece, float]:
    """Evaluations still to run after `step` tasks, without those in `done`, each with its number of prompts
    (1 for general ability by the harness)."""
    due = {
        Piece("answer", name, step): len(records)
        for name, records, _ in _due(setup, tasks, general)
        if name not in done
    }
    suite = {Piece("general", name, step): 1.0 for name in setup.suite if general and name not in done}
    loads = {Piece("load", name, step): 1.0 for name, found in (("tasks", due), ("suite", suite)) if found}
    return loads | due | suite


def measure(
    setup: Setup,
    folder: RunFolder,
    acc: Accelerator,
    index: int,
    known: dict,
    tasks: Iterable[int],
    general: bool,
    out: RunFolder,
) -> None:
    """Score the model after task `index` of the run in `folder` on these `tasks`, and on what `general` asks
    for, as far as `out` has no row of that step. `known` ("after", "step") goes into the rows."""
    recipe = setup.recipe
    done = of_first(
        {row["task"] for row in out.scores if row["step"] == known["step"]} if acc.is_main_process else None
    )
    tasks, step, after = list(tasks), known["step"], known["after"]
    display.expect(pieces(setup, step, tasks, general, done))
    if pending := [item for item in _due(setup, tasks, general) if item[0] not in done]:
        display.begin(Piece("load", "tasks", step), after, recipe.tasks)
        with BACKENDS[recipe.eval.backend](acc, setup, folder, index) as answers:
            for task, records, new in pending:
                signals.check()
                heartbeat.at(f"answers to {task} after {after}")
                display.begin(Piece("answer", task, step), after, recipe.tasks)
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


def _due(setup: Setup, tasks: Iterable[int], general: bool) -> list[tuple[str, list[dict], int]]:
    """Name, records and longest answer in tokens of each set that is answered here, without the harness."""
    due = [(setup.recipe.tasks[i], setup.test(i), setup.new_tokens(i)) for i in tasks]
    return due + [(name, records, PROBE_TOKENS) for name, records in setup.probes.items() if general]


def _measure_general(
    setup: Setup,
    folder: RunFolder,
    acc: Accelerator,
    index: int,
    known: dict,
    names: list[str],
    out: RunFolder,
) -> None:
    from codyra_llm.evaluate import harness  # lm_eval is an extra

    step, after = known["step"], known["after"]
    display.begin(Piece("load", "suite", step), after, setup.recipe.tasks)
    model, conditions = setup.stage(folder, index, acc.device)
    lm = harness.Live(
        acc,
        model,
        setup.tokenizer,
        setup.recipe.eval.batch_tokens,
        conditions and partial(conditions, task=None),
        setup.encoder.ends,
    )
    for name in names:
        signals.check()
        heartbeat.at(f"general ability {name} after {after}")
        display.begin(Piece("general", name, step), after, setup.recipe.tasks)
        began = time.perf_counter()
        found = harness.measure(lm, setup.suite[name], setup.recipe.general, setup.recipe.data.chat_template)
        if acc.is_main_process:
            harness.write(out.path / "lm_eval", f"{step:02d}-{after}", lm, setup.recipe.general, found)
            out.add_scores({**known, **found.row}, found.predictions)
            console.print(
                f"after {after}: {name} {found.row['score']:.1f}  ({found.row['headline']}, "
                f"{time.perf_counter() - began:.0f} s)"
            )


def _add_scores(
    setup: Setup, folder: RunFolder, known: dict, records: list[dict], predictions: list[str], began: float
) -> None:
    task, prompts, targets = known["task"], [r["prompt"] for r in records], [r["answer"] for r in records]
    benchmark = setup.stream.benchmark
    scores = benchmark.score(task, prompts, predictions, targets)
    main, found = benchmark.headline(task, setup.recipe.data.protocol), summarise_all(scores)
    row = {
        **known,
        "kind": "task" if task in setup.recipe.tasks else "general",
        "headline": main,
        "score": found[main]["mean"],
        "metrics": found,
        "empty": sum(not p for p in predictions),
    }
    folder.add_scores(
        row,
        [
            {"prompt": p, "prediction": q, "answer": t, **{n: v[i] for n, v in scores.items()}}
            for i, (p, q, t) in enumerate(zip(prompts, predictions, targets, strict=True))
        ],
    )
    console.print(
        f"after {known['after']}: {task} {row['score']:.1f}  ({main}, {time.perf_counter() - began:.0f} s)"
    )

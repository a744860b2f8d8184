"""Stages `recipe` and `whole`: whole runs of a recipe, as `codyra-llm run` makes them."""

import shutil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from codyra_llm.bench.gpu.context import Context
from codyra_llm.bench.gpu.shapes import model
from codyra_llm.benchmarks.trace.mini import mini_model
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.experiment.run import run

TASKS = ["C-STANCE", "FOMC", "NumGLUE-cm"]


def recipe(context: Context) -> None:
    """A short run of codyra on mini-TRACE, on the small LLaMA that is shipped with it."""
    tasks, examples, answered = (TASKS[:2], 32, 8) if context.tiny else (TASKS, 400, 100)
    with TemporaryDirectory() as folder:
        section = {
            "model": {"path": "mini"},
            "data": {
                "root": "mini",
                "tasks": tasks,
                "epochs": 1,
                "max_train_examples": examples,
                "max_prompt_tokens": 128,
                "max_answer_tokens": 32,
            },
            "method": {"name": "codyra", "rank": 8},
            "optim": {"lr": 8e-3, "batch_size": 16, "schedule": "cosine"},
            "eval": {"max_new_tokens": 24, "max_examples": answered},
            "checkpoint": False,
            "output": f"{folder}/run",
        }
        context.attempt("mini-TRACE", lambda: run_costs(context, section))


def whole(context: Context) -> None:
    """Two tasks on Llama-3.2-1B's shape from disk: what a run takes in addition to its training steps."""
    with TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        context.attempt("writing the weights, s", lambda: write_model_folder(context, base))
        section = {
            "model": {"path": str(base), "dtype": "bfloat16"},
            "data": {
                "root": "mini",
                "tasks": TASKS[:2],
                "epochs": 1,
                "max_train_examples": 8 if context.tiny else 256,
                "max_prompt_tokens": 128 if context.tiny else 512,
                "max_answer_tokens": 32,
            },
            "method": {"name": "codyra", "rank": 4 if context.tiny else 16},
            "optim": {"lr": 1e-4, "batch_size": 4 if context.tiny else 16},
            "eval": {"max_new_tokens": 4 if context.tiny else 32, "max_examples": 4 if context.tiny else 48},
            "checkpoint": False,
            "output": f"{folder}/run",
        }
        context.attempt("two tasks", lambda: run_costs(context, section))


def write_model_folder(context: Context, folder: Path) -> float:
    """Write a model folder of random weights with mini-TRACE's tokenizer; returns the seconds it takes."""
    made = model(context, "llama-3.2-1b")
    began = perf_counter()
    made.save_pretrained(folder)
    for file in mini_model("mini").glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return round(perf_counter() - began, 2)


def run_costs(context: Context, section: dict) -> dict:
    """Run the recipe, and say what it took. `peak MB by task` grows from task to task if something of the
    task before was still in memory."""
    began = perf_counter()
    folder = run(parse_recipe(section))
    total, costs = perf_counter() - began, folder.costs
    steps = [row.seconds for row in folder.log_rows]
    learning = sum(row.seconds for row in costs)
    return {
        "device": folder.manifest["device"],
        "dtype": folder.manifest["dtype"],
        "steps": len(steps),
        "median step, s": round(median(steps), 4),
        "all, s": round(total, 2),
        "training steps, s": round(sum(steps), 2),
        "the rest of learning, s": round(learning - sum(steps), 2),
        "loads, merges, reports and answers, s": round(total - learning, 2),
        "peak MB by task": [row.peak_bytes and round(row.peak_bytes / 1e6, 1) for row in costs],
        "allocated afterwards, MB": _allocated(context),
    }


def _allocated(context: Context) -> float | None:
    return round(torch.cuda.memory_allocated(context.device) / 1e6, 1) if context.cuda else None

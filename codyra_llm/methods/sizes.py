"""What a run writes to disk, counted before it begins."""

from pathlib import Path

import torch
from torch import nn

from codyra_llm.config.recipe import Recipe
from codyra_llm.methods.base import Method, trained_bytes
from codyra_llm.models import loading, saved


def disk_bytes(recipe: Recipe, base: Path, method: Method, model: nn.Module) -> int:
    """The most bytes that a run has on disk; `model` is the one that trains, perhaps without weights."""
    return task_bytes(recipe, base, method, model) + model_bytes(recipe, base, method)


def task_bytes(recipe: Recipe, base: Path, method: Method, model: nn.Module) -> int:
    """What all tasks leave: updates in float32, or models in the run's dtype where the method archives
    weights, and states, which are all kept: a run can go on from any of its tasks."""
    if not method.trains:
        return 0
    update = trained_bytes(model)  # which train in float32
    # Adam's two moments of all that trains; the counts of steps are small.
    optimizer = 2 * update if method.carries_optimizer else 0
    if method.archives_weights:
        update = saved.size(base, getattr(torch, recipe.model.dtype))
    tasks = len(recipe.tasks)
    states = sum(method.state_bytes(model, index + 1) for index in range(tasks))
    return tasks * (update + optimizer) + states


def model_bytes(recipe: Recipe, base: Path, method: Method) -> int:
    """The merged model if it is asked for, or vLLM's copy, which is removed before."""
    merged = recipe.checkpoint and method.trains and method.merges
    checkpoint = saved.size(base) if merged else 0
    served = saved.size(base, getattr(torch, recipe.model.dtype)) if recipe.eval.backend == "vllm" else 0
    return max(checkpoint, served)


def bytes_to_write(recipe: Recipe, base: Path, method: Method, learns: bool) -> int:
    """What a run still has to write to its folder, if it is interrupted nowhere; `learns`: whether its tasks
    are learnt there."""
    if not (learns and method.trains):
        return model_bytes(recipe, base, method)
    model = loading.bare(base, getattr(torch, recipe.model.dtype), recipe.model.attention)
    alike = type(method)(method.config, method.seed)  # which keeps nothing of this model for the run
    alike.attach(model)
    of_tasks = task_bytes(recipe, base, alike, model)
    folder = Path(recipe.output)
    files = [*folder.glob("updates/*"), *folder.glob("state/*")]
    there = sum(file.stat().st_size for file in files)
    return max(of_tasks - there, 0) + model_bytes(recipe, base, method)

"""What relative drift costs in nats, in finished runs: `python tests/drift_in_nats.py RUN ... > FILE`.

For every update of a run, added to the base alone, on texts that the base writes by itself:

    kl    = KL(base ‖ base with the update), the mean over tokens
    drift = Σ over sites of E|ΔW x|² / E|W x|², x: the site's inputs in the base
    kfac  = ½ Σ over sites of tr(E[g gᵀ] ΔW E[x xᵀ] ΔWᵀ), g: the gradient of a text's log probability by the
            site's output. The texts are drawn by the base, so E[g gᵀ] is the true Fisher information; with
            one update per site this is the Kronecker-factored estimate of `kl` (Ritter et al., 1805.07810)
    fisher = ½ E[(Σ over sites and tokens of g · ΔW x)²] per token, the estimate of second order without the
            Kronecker product and across sites

One JSON line for each; the spread of kl/drift, kl/kfac and kl/fisher (geometric mean, and factor of one
standard deviation) comes last.
"""

import json
from collections.abc import Iterator
from math import exp, log
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from old_tasks import printed, weights
from torch import Tensor, nn

from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.update import Update
from codyra_llm.methods.parts.samples import self_sampled
from codyra_llm.store.folder import RunFolder

TEXTS, TOKENS = 32, 64


class Pass(NamedTuple):
    """What a site read [R, T, in], what it said and its gradient [R, T, out], without the first token."""

    inputs: Tensor
    outputs: Tensor
    gradients: Tensor


def rows_of(run: Path) -> Iterator[dict]:
    """The measures of every update of a finished run."""
    folder = RunFolder(run)
    setup = prepare(folder.recipe, open_ended=False)
    archive, recipe = folder.archive(), setup.recipe
    model = setup.model(archive, -1).float().eval().requires_grad_(False)
    texts = self_sampled(model, TEXTS, TOKENS, seed=1)
    ids = torch.tensor([text.prompt + text.answer for text in texts])
    passes, before = measured(model, ids, list(weights(model, recipe.method.targets)))
    for index, task in enumerate(recipe.tasks):
        update = archive.load(index)
        changed = setup.model(archive, -1).float().eval()
        add(changed, update)
        yield {
            "run": str(run),
            "task": task,
            "kl": divergence(before, changed, ids),
            **estimates(passes, update),
        }


def measured(model: nn.Module, ids: Tensor, sites: list[str]) -> tuple[dict[str, Pass], Tensor]:
    """Every site's pass over the texts, and the log probabilities [R, T, V]."""
    inputs, outputs = {}, {}

    def hook(name: str):
        def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            inputs[name] = args[0].detach()
            outputs[name] = output.requires_grad_()
            output.retain_grad()
            return output

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in sites]
    chances = model(ids).logits.log_softmax(-1)
    chances[:, :-1].gather(-1, ids[:, 1:, None]).sum().backward()
    for handle in handles:
        handle.remove()
    passes = {}
    for name in sites:
        gradients = outputs[name].grad[:, 1:]
        passes[name] = Pass(inputs[name][:, 1:], outputs[name].detach()[:, 1:], gradients)
    return passes, chances.detach()


@torch.no_grad()
def add(model: nn.Module, update: Update) -> None:
    for name, adapter in update.adapters.items():
        model.get_parameter(f"{name}.weight").add_(adapter.delta(update.scale))


@torch.no_grad()
def divergence(before: Tensor, changed: nn.Module, ids: Tensor) -> float:
    """KL(before ‖ changed) in the mean over the tokens after the second, which the model did not draw."""
    after = changed(ids).logits.log_softmax(-1)
    found = (before.exp() * (before - after)).sum(-1)
    return found[:, 1:-1].mean().item()


@torch.no_grad()
def estimates(passes: dict[str, Pass], update: Update) -> dict[str, float]:
    """`drift`, `kfac` and `fisher` of the module's docstring."""
    drift, kfac, along = 0.0, 0.0, 0.0
    for name, adapter in update.adapters.items():
        own = passes[name]
        change = own.inputs @ adapter.delta(update.scale).T
        drift += (change.square().sum() / own.outputs.square().sum()).item()
        kfac += (own.gradients.flatten(0, 1) @ change.flatten(0, 1).T).square().mean().item() / 2
        along = along + (own.gradients * change).sum((1, 2))
    fisher = along.square().mean().item() / (2 * (TOKENS + 1))
    return {"drift": drift, "kfac": kfac, "fisher": fisher}


def spreads(rows: list[dict]) -> dict[str, list[float]]:
    """Of kl over each estimate: geometric mean, and the factor of one standard deviation."""
    found = {}
    for key in ("drift", "kfac", "fisher"):
        ratios = [log(row["kl"] / row[key]) for row in rows]
        found[f"kl/{key}"] = [exp(fmean(ratios)), exp(stdev(ratios))]
    return found


if __name__ == "__main__":
    print(json.dumps(spreads(printed(rows_of))))

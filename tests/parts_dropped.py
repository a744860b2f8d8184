"""What is lost when parts of a task's update are dropped: `python tests/parts_dropped.py RUN ... > FILE`.

For every task of a finished run but the first: Σ_old are the second moments of the earlier tasks' training
inputs, Σ_new those of its own, all in the model as it was before the task. ΔW of all sites is then reduced by
a rule, and two cross entropies of gold answers are taken in nats: of the task's own test examples, and of the
earlier tasks'.

    whole     nothing is dropped
    none      everything is: the model before the task
    ratio     parts in the joint basis of Σ_old and Σ_new, those with the least gain per drift go first
    lot       parts of the same basis by lot
    size      singular parts, the smallest go first
    half      the smaller half of the singular parts of every site

ratio, lot and size each drop parts until at most half of the predicted drift of old outputs is left.
One JSON line for each rule and task; means over tasks come last.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from old_tasks import cross_entropy, printed, weights
from torch import Tensor, nn

from codyra_llm.core.tensors import generator
from codyra_llm.data.batches import collate
from codyra_llm.data.encoding import Encoded
from codyra_llm.experiment.setup import Setup, prepare
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.parts.moments import SecondMoment
from codyra_llm.methods.parts.pricing import joint
from codyra_llm.store.folder import RunFolder

TRAINING, OWN, EARLIER = 48, 24, 6  # examples: of each task for Σ, and scored of the task and of earlier ones
KEPT = 0.5  # of the predicted drift
DRAWS = 2  # of the lot
RIDGE = 1e-3

Parts = dict[str, tuple[Tensor, Tensor]]  # by site: rows [r, in] and columns [out, r] of its parts


def rows_of(run: Path) -> Iterator[dict]:
    """The measures of every task of a finished run but the first."""
    folder = RunFolder(run)
    setup = prepare(folder.recipe, open_ended=False)
    for index in range(1, len(setup.recipe.tasks)):
        model = setup.model(folder.archive(), index - 1).float().eval()
        update = folder.archive().load(index)
        adapters = {site: adapter for site, adapter in update.adapters.items() if len(adapter.a)}
        old, new = moments(setup, model, index, list(adapters))
        share = {}
        for site, weight in weights(model, setup.recipe.method.targets).items():
            share[site] = 1 / float(old[site].energy(weight)) if site in adapters else 0.0
        for rule, kept in reductions(adapters, old, new, share, update.scale):
            drift = sum(share[site] * float(old[site].energy(delta)) for site, delta in kept.items())
            with added(model, kept):
                own, earlier = scored(setup, model, index)
            yield {
                "run": str(run),
                "task": setup.recipe.tasks[index],
                "rule": rule,
                "own": own,
                "earlier": earlier,
                "drift": drift / len(adapters),
            }


@torch.no_grad()
def moments(setup: Setup, model: nn.Module, index: int, names: list[str]) -> tuple[dict, dict]:
    """Σ_old, the mean over the earlier tasks, and Σ_new by site; without the first token of each example."""
    found = []
    for task in range(index + 1):
        examples = setup.encoder.encode(setup.stream.records(task, "train")[:TRAINING])
        sums = dict.fromkeys(names, 0.0)
        with reading(model, sums):
            for number in range(len(examples)):
                collate(examples, [number], [1.0], 0).hidden(model)
        count = sum(len(example) - 1 for example in examples)
        found.append({name: total / count for name, total in sums.items()})
    old = {name: sum(each[name] for each in found[:-1]) / index for name in names}
    return (
        {name: SecondMoment(total.float()) for name, total in old.items()},
        {name: SecondMoment(total.float()) for name, total in found[-1].items()},
    )


@contextmanager
def reading(model: nn.Module, sums: dict[str, Tensor]):
    """Within this block x xᵀ of what the named modules read is summed, in float64."""

    def hook(name: str):
        def take(module: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].flatten(0, -2)[1:]
            sums[name] = sums[name] + (x.T @ x).double()

        return take

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reductions(
    adapters: dict[str, Adapter],
    old: dict[str, SecondMoment],
    new: dict[str, SecondMoment],
    share: dict[str, float],
    scale: float,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(rule, ΔW by site) of every rule."""
    yield "none", {}
    yield "whole", {site: adapter.delta(scale) for site, adapter in adapters.items()}
    priced, costs, gains = {}, {}, {}
    for site, adapter in adapters.items():
        relative = share[site] * scale**2
        parts, costs[site], gains[site] = joint(adapter, new[site], old[site], relative, RIDGE)
        priced[site] = parts.a * scale, parts.b
    cost, ratio = together(costs), together(gains) / together(costs)
    yield "ratio", reduced(priced, within(ratio.argsort(), cost))
    for draw in range(DRAWS):
        order = torch.randperm(len(cost), generator=generator("parts by lot", draw))
        yield f"lot {draw + 1}", reduced(priced, within(order, cost))
    singular, sizes = {}, {}
    for site, adapter in adapters.items():
        singular[site], sizes[site] = by_size(adapter.delta(scale), len(adapter.a))
    yield "size", until_within(singular, together(sizes).argsort(), old, share, float(cost.sum()))
    halves = [value < value.median() for value in sizes.values()]
    yield "half", reduced(singular, ~torch.cat(halves))


def together(values: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(values.values()))


def within(order: Tensor, cost: Tensor) -> Tensor:
    """Which parts stay, when they go in this order until KEPT of all costs is left."""
    left = cost.sum() - cost[order].cumsum(0)
    gone = int((left > KEPT * cost.sum()).sum()) + 1
    kept = torch.ones(len(cost), dtype=torch.bool)
    kept[order[:gone]] = False
    return kept


def reduced(parts: Parts, kept: Tensor) -> dict[str, Tensor]:
    """ΔW by site of the parts that stay."""
    masks = kept.split([len(rows) for rows, _ in parts.values()])
    found = {}
    for (site, (rows, columns)), mask in zip(parts.items(), masks, strict=True):
        found[site] = columns[:, mask] @ rows[mask]
    return found


def by_size(delta: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The singular parts of ΔW, and their sizes."""
    left, sizes, right = torch.linalg.svd(delta, full_matrices=False)
    return (right[:rank], left[:, :rank] * sizes[:rank]), sizes[:rank]


def until_within(
    parts: Parts, order: Tensor, old: dict[str, SecondMoment], share: dict[str, float], cost: float
) -> dict[str, Tensor]:
    """ΔW by site when singular parts go in this order until KEPT of `cost` is left. Their drifts have cross
    terms, so the number of those that go is found by bisection (more parts that go: less drift, nearly)."""
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        kept = torch.ones(len(order), dtype=torch.bool)
        kept[order[:middle]] = False
        found = reduced(parts, kept)
        drift = sum(share[site] * float(old[site].energy(delta)) for site, delta in found.items())
        low, high = (middle, high) if drift > KEPT * cost else (low, middle)
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[order[:high]] = False
    return reduced(parts, kept)


@contextmanager
def added(model: nn.Module, deltas: dict[str, Tensor]):
    """Within this block the weights have these ΔW."""
    before = {site: model.get_parameter(f"{site}.weight").detach().clone() for site in deltas}
    with torch.no_grad():
        for site, delta in deltas.items():
            model.get_parameter(f"{site}.weight").add_(delta)
    try:
        yield
    finally:
        with torch.no_grad():
            for site, weight in before.items():
                model.get_parameter(f"{site}.weight").copy_(weight)


def scored(setup: Setup, model: nn.Module, index: int) -> tuple[float, float]:
    """Cross entropy of the task's own test examples, and the mean over the earlier tasks of theirs."""
    own = cross_entropy(model, _test(setup, index, OWN))
    earlier = [cross_entropy(model, _test(setup, task, EARLIER)) for task in range(index)]
    return own, fmean(earlier)


def _test(setup: Setup, index: int, count: int) -> list[Encoded]:
    return setup.encoder.encode(setup.stream.records(index, "test")[:count])


def means(rows: list[dict]) -> dict[str, dict[str, float]]:
    """By rule the means over runs and tasks."""
    found = {}
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == rule]
        found[rule] = {key: fmean(row[key] for row in own) for key in ("own", "earlier", "drift")}
    return found


if __name__ == "__main__":
    print(json.dumps(means(printed(rows_of))))

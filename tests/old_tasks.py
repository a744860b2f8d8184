"""What the updates after a task do to it, in finished runs: `python tests/old_tasks.py RUN ... > FILE`.

For every task of a run but the last, on its first test examples: the cross entropy of the gold answers just
after the task and after the last one, and two measures of how far the weights have moved in between,

    drift = mean over sites of E|ΔW x|² / E|W x|²,  x: the site's inputs in the model just after the task
    norm  = sqrt(Σ over sites of ‖ΔW‖_F²)

One JSON line for each; the correlations of both measures with the rise of the cross entropy come last.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from codyra_llm.data.batches import collate
from codyra_llm.data.encoding import Encoded
from codyra_llm.experiment.setup import prepare
from codyra_llm.store.folder import RunFolder

EXAMPLES = 16


def rows_of(run: Path) -> Iterator[dict]:
    """The measures of every task of a finished run but the last."""
    folder = RunFolder(run)
    setup = prepare(folder.recipe, open_ended=False)
    targets, last = setup.recipe.method.targets, len(setup.recipe.tasks) - 1
    final = setup.model(folder.archive(), last).float().eval()
    for index in range(last):
        then = setup.model(folder.archive(), index).float().eval()
        examples = setup.encoder.encode(setup.stream.records(index, "test")[:EXAMPLES])
        moved = {}
        for name, weight in weights(then, targets).items():
            moved[name] = final.get_parameter(f"{name}.weight") - weight
        with measuring(then, moved) as drift:
            before = cross_entropy(then, examples)
        yield {
            "run": str(run),
            "task": setup.recipe.tasks[index],
            "just_learnt": before,
            "last": cross_entropy(final, examples),
            "drift": drift(),
            "norm": float(torch.stack([d.double().norm() for d in moved.values()]).norm()),
        }


def weights(model: nn.Module, targets: list[str]) -> dict[str, Tensor]:
    """The weights of the projections that the method adapts, by name."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }


@contextmanager
def measuring(model: nn.Module, moved: dict[str, Tensor]):
    """Within this block the model's passes are measured; the value is a function that gives the drift."""
    sums = {name: [0.0, 0.0] for name in moved}

    def hook(name: str):
        def measure(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inputs = args[0].flatten(0, -2)[1:]  # the first token attracts attention and has huge inputs
            sums[name][0] += float((inputs @ moved[name].T).double().square().sum())
            sums[name][1] += float((inputs @ module.weight.T).double().square().sum())

        return measure

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in moved]
    try:
        yield lambda: fmean(change / whole for change, whole in sums.values())
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def cross_entropy(model: nn.Module, examples: list[Encoded]) -> float:
    """Mean over the examples of the mean over their answers' tokens, in nats."""
    found = []
    for number, example in enumerate(examples):
        batch = collate(examples, [number], [1 / len(example.answer)], 0)
        found.append(float(batch.cross_entropy(model)))
    return fmean(found)


def correlations(rows: list[dict]) -> dict[str, float]:
    """Pearson's r of the rise of the cross entropy with drift and norm, and with their logarithms, over all
    runs and tasks, and over the runs' means where there are more than two."""
    runs = dict.fromkeys(row["run"] for row in rows)
    by_run = [[row for row in rows if row["run"] == run] for run in runs]
    found = {}
    for key in ("drift", "norm"):
        found |= _with(key, "runs and tasks", [(row[key], rise(row)) for row in rows])
        if len(runs) > 2:
            means = [(fmean(row[key] for row in own), fmean(map(rise, own))) for own in by_run]
            found |= _with(key, "runs", means)
    return found


def rise(row: dict) -> float:
    return row["last"] - row["just_learnt"]


def _with(key: str, over: str, pairs: list[tuple[float, float]]) -> dict[str, float]:
    x, y = np.array(pairs).T
    return {
        f"{key}, {over}": float(np.corrcoef(x, y)[0, 1]),
        f"log {key}, {over}": float(np.corrcoef(np.log(x), y)[0, 1]),
    }


def printed(rows_of: Callable[[Path], Iterator[dict]]) -> list[dict]:
    """The rows of the runs that the command names, each printed as soon as it is there."""
    measured = []
    for argument in sys.argv[1:]:
        for row in rows_of(Path(argument)):
            print(json.dumps(row), flush=True)
            measured.append(row)
    return measured


if __name__ == "__main__":
    print(json.dumps(correlations(printed(rows_of))))

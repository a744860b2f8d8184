"""Two tasks of methods on a device that is not there: `run_pretended.py MODELS STREAM OUT METHOD ...`, with
the library of `pretend/hooks.cpp` preloaded, since `import torch` already looks for devices. MODELS is a
folder of models, each by its family's name.

Prints a line of JSON for each method: the fault that ended it or null, how many recorded micro-batches were
replayed, of every step its loss and its gradients' norm, the same without recording (and for each micro-batch
of that, how many factors are in a graph of autograd when it begins), and by step its micro-batches, how many
shapes were recorded, and the waits of the host by what was asked for and by line.
"""

import gc
import json
import multiprocessing
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import outlived
import pretended
import pretended_graph
import pytest
import torch
from accelerate import Accelerator
from contract import collecting_no_cycles, raw, watched
from recorded_training import assert_the_same
from transformers import AutoModelForCausalLM

from codyra_llm.config.recipe import parse_recipe
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.experiment import Experiment
from codyra_llm.methods.parts.samples import self_sampled
from codyra_llm.runtime.memory import ProcessPeak
from codyra_llm.store.rows import LogRow
from codyra_llm.train import recorded
from codyra_llm.train.engine import Engine
from codyra_llm.train.trainer import Trainer

TASKS = ["ONE", "TWO"]
NEVER = 1 << 30  # micro-batches


class Variant(NamedTuple):
    """Settings or a family of models with code of their own in a step."""

    method: str
    settings: dict = {}
    model: str = "llama"


VARIANTS = {  # by what they are called here
    "codyra_drift by ratio": Variant("codyra_drift", {"selection": "ratio", "keep_drift": 0.5}),
    # Scores are capped, and half of the layers have a window.
    "seqlora, gemma2": Variant("seqlora", model="gemma2"),
    "codyra_drift, gemma2": Variant("codyra_drift", model="gemma2"),
    "lwf, gemma2": Variant("lwf", model="gemma2"),
    # Packed rows with a window, and padded ones.
    "seqlora, gemma3": Variant("seqlora", model="gemma3"),
    "l2p, gemma3": Variant("l2p", model="gemma3"),
}
# What does something once a task gets a third step: the first is another one anyway, and the second is its.
THREE_STEPS = {"batch_size": 7, "micro_batch_tokens": 40}
TWO_STEPS = {"batch_size": 10, "micro_batch_tokens": 65}
ONCE_A_TASK = ("codyra", "codyra_drift by ratio")
TRAIN = Trainer.fit
ACCUMULATE = Engine.accumulate


class Counted:
    """Waits of the host by step of one method. In the first of each task all adapters are read, to see that
    they moved."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.steps: list[dict] = []
        self.trained: list[tuple[float, float]] = []  # of every step: its loss and its gradients' norm
        self.micro_batches = self.recordings = 0
        patch.setattr(Trainer, "fit", lambda *args, **kwargs: self._fit(*args, **kwargs))
        patch.setattr(Engine, "accumulate", lambda *args, **kwargs: self._accumulate(*args, **kwargs))

    def _fit(self, *args, **kwargs) -> Iterator[LogRow]:
        self._restart()
        for row in TRAIN(*args, **kwargs):
            yield row
            self.trained.append((row.loss, row.grad_norm))
            self._count(row)
            if row.step == 1:
                read_back(args[0])
            self._restart()

    def _count(self, row: LogRow) -> None:
        """Add what was found in a step."""
        self.steps.append(
            {
                "task": row.task,
                "step": row.step,
                "micro_batches": self.micro_batches,
                "recordings": pretended_graph.recordings - self.recordings,
                "waits": by_line(),
            }
        )

    def _accumulate(self, engine, *args, **kwargs):
        self.micro_batches += 1
        return ACCUMULATE(engine, *args, **kwargs)

    def _restart(self) -> None:
        pretended.waits.clear()
        self.micro_batches, self.recordings = 0, pretended_graph.recordings


def read_back(trainer: Trainer) -> None:
    """Parameters and Adam's state as a run has them that resumes from a checkpoint."""
    kept = {key: tensor.detach().cpu().clone() for key, tensor in trainer.engine.state()}
    trainer.engine.load_state(iter(kept.items()))


def by_line() -> list[tuple[str, str, int]]:
    """What was asked for, the line, and how often."""
    return [(kind, line, number) for (kind, line), number in pretended.waits.items()]


def learn_both(experiment: Experiment) -> None:
    """A run without its evaluations, once the launch has found no device to start. Where a method does not
    merge, so that it computes something for every prompt, the last model is evaluated."""
    torch.cuda.is_available = lambda: True
    peak = ProcessPeak(experiment.acc.device)
    for index in range(len(TASKS)):
        stage = experiment.stage(index)
        if experiment.method.joint and index + 1 < len(TASKS):
            runs.pass_over(experiment, stage)
        else:
            runs.learn(experiment, stage, peak)
    if not experiment.method.merges:
        runs.evaluate(experiment, stage)


def section(models: str, stream: str, out: Path, called: str) -> dict:
    name, settings, model = VARIANTS.get(called, Variant(called))
    made = raw(Path(models) / model, stream, out, name)
    made["method"] |= settings
    made["model"]["dtype"] = "bfloat16"
    made["data"] |= {"tasks": TASKS, "epochs": 1}
    # Of two micro-batches each.
    made["optim"] |= THREE_STEPS if called in ONCE_A_TASK else TWO_STEPS
    if "inputs_at_once" in made["method"]:
        made["method"]["inputs_at_once"] = 5  # of eight: two passes over the prompts
    return made


def trained(models: str, stream: str, out: Path, name: str) -> dict:
    """One method's row. Where micro-batches were replayed, it trains once more without."""
    row = once(models, stream, out, name)
    if row["replays"] and not row["fault"]:
        recorded.SEEN = NEVER
        try:
            with pytest.MonkeyPatch.context() as patch:
                row["outlived"] = outlived.counted(patch)
                without = once(models, stream, out.with_name(f"{name} unrecorded"), name)
            row["unrecorded"] = without["trained"]
        finally:
            recorded.SEEN = 0
    return row


def once(models: str, stream: str, out: Path, name: str) -> dict:
    """A run of one method: what was found in it."""
    fault, replayed = None, pretended_graph.replays
    with pytest.MonkeyPatch.context() as patch, collecting_no_cycles():
        patch.setattr(runs, "_run", learn_both)
        patch.setattr(torch.cuda, "is_available", torch.cuda.is_available)  # put back, as it is set inside
        patch.setattr(Accelerator, "device", pretended.DEVICE)
        counted = Counted(patch)
        watched(patch)  # nothing of a model is alive after `learn`
        try:
            with pretended.Pretending():
                runs.run(parse_recipe(section(models, stream, out, name)))
        except Exception:  # told, with the others
            fault = traceback.format_exc()
    replayed = pretended_graph.replays - replayed
    found = {"steps": counted.steps, "replays": replayed, "trained": counted.trained}
    return {"method": name, "fault": fault, **found}


def check_the_device() -> None:
    """What CUDA refuses is refused, and each wait is counted once."""
    there, here = torch.arange(4.0, device=pretended.DEVICE), torch.ones(4)
    mixed = [
        lambda: there + here,
        lambda: here.add_(there),
        lambda: here.fill_(there[0]),
        lambda: torch.cat([there, here[0]]),
        lambda: here[there.long()],
    ]
    for wrong in mixed:
        with pytest.raises(pretended.DevicesMixed):
            wrong()
    assert (there + here[0]).is_cuda, "a scalar of the CPU is taken"
    torch.empty(4, pin_memory=True).to(pretended.DEVICE, non_blocking=True)
    assert not pretended.waits, pretended.waits
    waiting = [
        lambda: there.sum().item(),
        lambda: there.tolist(),
        lambda: there.cpu(),
        lambda: there[there > 1],
        lambda: bool((there > 1).all()),
        lambda: here.to(pretended.DEVICE, non_blocking=True),
        lambda: torch.cuda.synchronize(pretended.DEVICE),
        torch.cuda.empty_cache,
    ]
    for number, asked in enumerate(waiting, 1):
        asked()
        assert pretended.waits.total() == number, pretended.waits


def check_the_drawing(base: str) -> None:
    """Tokens are drawn on the device: how often the host waits doesn't depend on how many."""
    model = AutoModelForCausalLM.from_pretrained(base).to(pretended.DEVICE)
    waits = []
    for length in (2, 6):
        pretended.waits.clear()
        self_sampled(model, 3, length, seed=0)
        waits.append(by_line())
    assert waits[0] == waits[1], waits


def check_recordings(base: str) -> None:
    """What a GPU is tested with holds here too."""
    with pytest.MonkeyPatch.context() as patch, pretended.Pretending():
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(Accelerator, "device", pretended.DEVICE)
        assert_the_same(Path(base), steps=2)


def main() -> None:
    _, models, stream, out, *names = sys.argv
    base = str(Path(models) / "llama")
    pretended.install()
    pretended_graph.install()
    recorded.SEEN = 0  # every micro-batch that can be
    torch.set_num_threads(1)
    gc.freeze()  # the collection after each task need not walk what the packages hold
    with pretended.Pretending():
        check_the_device()
        check_the_drawing(base)
    # Both cores, after the imports, which take longer than a method's steps.
    # Each sets its threads before it has several: PyTorch makes its pool anew after a fork, and two threads
    # that ask for it at once can find none.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, fork, torch.set_num_threads, (1,)) as pool:
        asked = [pool.submit(trained, models, stream, Path(out) / name, name) for name in names]
        checked = pool.submit(check_recordings, base)
        for done in asked:
            print(json.dumps(done.result()), flush=True)
        checked.result()


if __name__ == "__main__":
    main()

"""What holds for every method, and its declarations against what it does."""

import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from codyra_llm.config.registry import METHODS
from codyra_llm.data.stream import Stream
from codyra_llm.experiment import run as runs
from codyra_llm.models import loading
from codyra_llm.store.folder import RunFolder

TASKS = ["ONE", "TWO", "THREE"]


# What a method needs to do something on three tiny tasks, and no data other than theirs.
SETTINGS = {
    "replay": {"general": None, "ratio": 0.3},
    "ewc": {"examples": 6},
    "ewclora": {"examples": 6, "weight": 1e3},
    "dream": {"samples": 20, "sample_tokens": 6, "batch": 5},
    "sdft": {"answer_tokens": 3, "probe": 0},
    "gainlora": {"inputs_at_once": 3, "hidden": 8},
    "gem": {"memory": 4, "batch": 4},
    "agem": {"memory": 4, "batch": 4},
    "ogd": {"examples": 3},
    "ilora": {"memory": 8, "batch": 4},
    "ilora_mixed": {"ratio": 0.3},
    "icl": {"shots": 2},
    "inflora": {"inputs_at_once": 3},
    "keeplora": {"inputs_at_once": 3, "energy_weights": 0.3, "energy_old": 0.9},
    # One of its inputs is wider than 4·8. Twenty prompts that are nearly alike leave most directions without
    # energy, where a small ridge would magnify rounding above the tolerance of two launches.
    "codyra_drift": {"samples": 40, "sample_tokens": 6, "sketch": 8, "ridge": 1e-2},
    "treelora": {"weight": 0.5},
    "treelora_repo": {"weight": 5.0},
    "pp": {"length": 4},
    "dualprompt": {"general_layers": [0], "expert_layers": [1]},
}


SHARED = {"rank": 3, "alpha": 3.0}  # a scale of 1: some have 32 / rank, with which so short a run is chaotic


def raw(model, stream, out, name) -> dict:
    config = METHODS[name].Config.model_fields
    shared = {key: value for key, value in SHARED.items() if key in config}
    if name == "rcl":
        shared["folder"] = str(
            stream
        )  # without markers in its answers, which leaves nothing to read in predictions
    return {
        "model": {"path": str(model)},
        "data": {"root": str(stream), "tasks": TASKS, "epochs": 2},
        "method": {"name": name, **shared, **SETTINGS.get(name, {})},
        # By tokens, unlike the protocol's default, as the committed trajectories were made.
        "optim": {"lr": 1e-2, "batch_size": 8, "micro_batch_tokens": 90, "loss_average": "token"},
        "eval": {"max_new_tokens": 3, "max_examples": 4},
        "output": str(out),
        "checkpoint": False,
    }


def watched(patch: pytest.MonkeyPatch) -> set[tuple[int, int, str]]:
    """(task that is learnt, task whose records are read, split), from now on. Nothing of a model may be alive
    when `learn` returns or when another model is loaded, by counting references alone."""
    read, now, models = set(), [], []
    records, learn, load = Stream.records, runs.learn, loading.load

    def loading_anew(*args, **kwargs):
        gone(models, "at the next load")
        model = load(*args, **kwargs)
        models.append(weakref.ref(model))
        models.extend(weakref.ref(module) for module in model.modules())
        models.extend(weakref.ref(p) for p in model.parameters())
        return model

    def spying(stream, index, split):
        read.update((current, index, split) for current in now)
        return records(stream, index, split)

    def learning(experiment, stage, peak):
        now.append(stage.index)
        learn(experiment, stage, peak)
        now.pop()
        gone(models, f"after task {stage.index} was learnt")

    patch.setattr(loading, "load", loading_anew)
    patch.setattr(Stream, "records", spying)
    patch.setattr(runs, "learn", learning)
    return read


@contextmanager
def collecting_no_cycles() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def gone(models: list[weakref.ref], when: str) -> None:
    alive = [ref() for ref in models if ref() is not None]
    assert not alive, f"{len(alive)} parts of a model are still alive {when}, a {type(alive[0]).__name__}"
    models.clear()


def rows(folder: RunFolder) -> list[dict]:
    path = folder.path / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

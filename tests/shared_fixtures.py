"""Shared fixtures: tiny models with a real tokenizer and tiny data, made here: no test needs the network.

`conftest.py` has this module loaded in processes that run tests."""

import fcntl
import gc
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from adapters import recipe
from contract import collecting_no_cycles, raw, watched
from hypothesis import settings
from sweeps import Ended
from tiny import SIZES, save_tiny
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from codyra_llm.config.recipe import parse_recipe
from codyra_llm.experiment import run as runs
from codyra_llm.store.folder import RunFolder
from codyra_llm.sweep import runner
from codyra_llm.train import estimate

# Helpers that assert say what differed, as test files do.
pytest.register_assert_rewrite(
    "commands", "fused", "helpers", "launches", "made_runs", "own_benchmark", "recorded_training"
)
settings.register_profile("any machine", deadline=None)  # a busy one is not a fault
settings.load_profile("any machine")
estimate.SECONDS = 0.0  # three products: no test asks how exact a plan's hours are
torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives
# No test takes the power away: tests/crash_points.py notes what is synced. Waiting for the disk, ninety times
# a run, takes longer than the run. A handle that is none still raises.
os.fsync = os.fstat


_frozen: list[object] = []


def pytest_runtest_logstart(nodeid):
    """Every task ends with a collection, which need not walk the million objects of imported packages, nor
    what earlier files left."""
    now = [nodeid.partition("::")[0], len(sys.modules)]
    if _frozen != now:
        gc.collect()
        gc.freeze()
        _frozen[:] = now


@pytest.fixture(autouse=True)
def interruptible():
    """Commands that listen to Ctrl-C leave the tests theirs."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a two-layer LLaMA, hidden 32, float32, untied embeddings."""
    config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", LlamaForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_gemma2(tmp_path_factory):
    """Folder of a two-layer Gemma 2 (sliding, then full attention), hidden 32, float32, tied embeddings."""
    config = Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-gemma2", Gemma2ForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory):
    """Folder of a two-layer Gemma 3 (sliding, then full attention), hidden 32, float32, tied embeddings."""
    config = Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-gemma3", Gemma3ForCausalLM, config)


@pytest.fixture(scope="session")
def whole_gemma3(tmp_path_factory):
    """Folder of the same with a vision tower, as Gemma 3 from 4B on, and longer positions."""
    from tiny_families import make  # slow to import, and of use to few tests

    return make("gemma3", tmp_path_factory.mktemp("models") / "whole-gemma3")


@pytest.fixture(scope="session")
def toy_stream(tmp_path_factory):
    """Folder of three tiny tasks in TRACE's layout: copy a letter (for eval "now": a prompt that test has
    not), name the next digit, answer in two words."""
    root = tmp_path_factory.mktemp("stream")
    makers = {
        "ONE": lambda i: (f"Say {'ABC'[i % 3]}{' now' * (20 <= i < 24)}:", "ABC"[i % 3]),
        "TWO": lambda i: (f"{i} next:", str(i + 1)),
        "THREE": lambda i: (f"Who is number {i} of the list?\nAnswer:", f"person {i % 4}"),
    }
    for task, make in makers.items():
        for split, numbers in (("train", range(20)), ("eval", range(20, 24)), ("test", range(24, 30))):
            (root / task).mkdir(exist_ok=True)
            rows = [dict(zip(("prompt", "answer"), make(i), strict=True)) for i in numbers]
            (root / task / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


@pytest.fixture
def real_model():
    """Function from a name of `codyra-llm model get` to its folder under $CODYRA_MODELS; skips where it is
    not.
    """

    def folder(name: str) -> Path:
        path = Path(os.environ.get("CODYRA_MODELS", "models")) / name
        if not (path / "config.json").is_file():
            pytest.skip(
                f"no weights in {path}; run `codyra-llm model get {name} {path}` or set CODYRA_MODELS"
            )
        return path

    return folder


@pytest.fixture(scope="module")
def run(tiny_llama, toy_stream, tmp_path_factory):
    """For tests of LoRA methods: function from a method's section to its finished run, each made once."""
    made = {}

    def finished(method):
        key = json.dumps(method, sort_keys=True)
        if key not in made:
            made[key] = runs.run(
                recipe(tiny_llama, toy_stream, tmp_path_factory.mktemp("runs") / "run", method)
            )
        return made[key]

    return finished


@pytest.fixture
def sweep_file(tiny_llama, toy_stream, tmp_path):
    """Function that writes a sweep file over a small recipe; keywords replace its sections."""
    recipe = {
        "model": {"path": str(tiny_llama)},
        "data": {"root": str(toy_stream), "tasks": ["ONE", "TWO"], "epochs": 1},
        "method": {"name": "seqlora", "rank": 2},
        "optim": {"lr": 1e-2, "batch_size": 8},
        "eval": {"max_new_tokens": 3, "max_examples": 4},
        "output": "replaced",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def write(**sections) -> Path:
        raw = {
            "recipe": str(tmp_path / "recipe.yaml"),
            "output": str(tmp_path / "out"),
            "set": {"checkpoint": False},
            "arms": {"seqlora": {}, "ewc": {"method.weight": 1e3, "method": "ewc"}},
            "grid": {"seed": [1, 2]},
            **sections,
        }
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        return tmp_path / "sweep.yaml"

    return write


@pytest.fixture
def launches(monkeypatch):
    """Runs go in this process; the list of those that were started."""
    started = []

    def launch(run, place, launcher, lock):
        started.append(f"{run.arm}/{run.folder.path.name}")
        runs.run(run.recipe)
        return Ended(0)

    monkeypatch.setattr(runner, "_launch", launch)
    return started


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all processes of the test run share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def finished(tiny_llama, toy_stream, shared):
    """Function from a method's name to its finished run, made once for all processes, and what it read of
    which split while it learnt.
    """
    made: dict[str, tuple[RunFolder, set]] = {}

    def run(name: str) -> tuple[RunFolder, set]:
        folder, known = shared / name, shared / f"{name}.json"
        if name in made:
            return made[name]
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not known.is_file():
                with pytest.MonkeyPatch.context() as patch, collecting_no_cycles():
                    read = watched(patch)
                    runs.run(parse_recipe(raw(tiny_llama, toy_stream, folder, name)))
                known.write_text(json.dumps(sorted(read)), encoding="utf-8")
        read = json.loads(known.read_text(encoding="utf-8"))
        made[name] = RunFolder(folder), {tuple(entry) for entry in read}
        return made[name]

    return run

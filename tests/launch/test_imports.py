"""Importing the package is not work: it changes nothing that the rest of the process shares."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT
from modules import modules

# Modules are imported twice in one process. The first time brings in all other libraries, which do as they
# like; then everything shared gets a value that it does not have by itself, and whatever a second time
# changes is ours.
PROGRAM = """
import csv, importlib, json, logging, os, signal, sys, threading, warnings
names = json.loads(sys.argv[1])
for name in names:
    importlib.import_module(name)

import datasets, huggingface_hub.utils, transformers, transformers.utils.logging
from transformers import AttentionInterface, AttentionMaskInterface

csv.field_size_limit(12345)
transformers.utils.logging.enable_progress_bar()
datasets.enable_progress_bars()
for logger in ("lm_eval", "transformers", "datasets", "accelerate", "deepspeed", ""):
    logging.getLogger(logger).setLevel(17)

def state():
    torch = sys.modules["torch"]
    return {
        "csv": csv.field_size_limit(),
        "bars of transformers": transformers.utils.logging.is_progress_bar_enabled(),
        "bars of the hub": not huggingface_hub.utils.are_progress_bars_disabled(),
        "bars of datasets": not datasets.are_progress_bars_disabled(),
        "levels": {name: logging.getLogger(name).level for name in [*logging.root.manager.loggerDict, ""]},
        "handlers": [str(handler) for handler in logging.root.handlers],
        "warnings": list(map(str, warnings.filters)),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "seed": torch.initial_seed(),
        "attention": sorted(AttentionInterface._global_mapping),
        "masks": sorted(AttentionMaskInterface._global_mapping),
        "folder": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
        "path": sys.path[:],
        "group": torch.distributed.is_initialized(),
    }

for name in [name for name in sys.modules if name.split(".")[0] == "codyra_llm"]:
    del sys.modules[name]
before = state()
for name in names:
    importlib.import_module(name)
after = state()
from codyra_llm.runtime import heartbeat, signals
assert signals._noted is None and heartbeat._watch is None and not signals.asked()
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
print(json.dumps(changed))
"""


def test_importing_every_module_changes_nothing():
    names = sorted(name for name in modules() if name != "codyra_llm.__main__")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(names)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="not a checkout")

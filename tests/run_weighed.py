"""Run a recipe and print after each task how many bytes of tensors this process still holds: `run_weighed.py
run RECIPE [KEY=VALUE ...]`."""

import gc
import sys
import warnings

import torch

from codyra_llm.cli import main
from codyra_llm.experiment import run

learn = run.learn


def weighed(experiment, stage, peak) -> None:
    learn(experiment, stage, peak)
    gc.collect()
    with warnings.catch_warnings():  # some objects warn when they are asked for their class
        warnings.simplefilter("ignore")
        storages = {
            s.data_ptr(): s.nbytes()
            for s in (t.untyped_storage() for t in gc.get_objects() if isinstance(t, torch.Tensor))
        }
    print(f"after task {stage.index}: {sum(storages.values())} bytes of tensors", flush=True)


run.learn = weighed
main(sys.argv[1:])

"""A run that tells after each task how many bytes of tensors its process holds and did not hold before."""

import gc
import warnings

import torch

from codyra_llm.cli import main
from codyra_llm.experiment import run as runs


def weighed(words: list[str]) -> None:
    """The command, in a process that ends with it."""
    learn = runs.learn

    def weighing(experiment, stage, peak) -> None:
        learn(experiment, stage, peak)
        gc.collect()
        print(f"after task {stage.index}: {held()} bytes of tensors", flush=True)

    runs.learn = weighing
    gc.freeze()  # what is there already is no longer listed
    main(words)


def held() -> int:
    """Bytes of all tensors that the collector lists."""
    with warnings.catch_warnings():  # some objects warn when they are asked for their class
        warnings.simplefilter("ignore")
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

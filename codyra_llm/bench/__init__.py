"""How fast training and evaluation are and what memory they take, against PEFT, transformers and a floor, on
this machine.
"""

import torch
from rich.console import Console

from codyra_llm.bench import evaluation, head, layers, measure, step
from codyra_llm.bench.measure import TOLERANCE, Options
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.parsing import listed
from codyra_llm.runtime.launch import leave_out_cudnn_attention

LEVELS = {
    "linear": layers.linear,
    "block": layers.block,
    "head": head.measure,
    "step": step.measure,
    "eval": evaluation.measure,
}

__all__ = ["LEVELS", "measured", "options", "show"]


def measured(level: str, options: Options) -> dict:
    """What a level found, as plain JSON values. Raises Fault for an unknown level, and where the outcome of
    an arm is too far from float64."""
    if level not in LEVELS:
        raise Fault(f"'{level}' is not a level; choose from {', '.join(LEVELS)}.{nearest(level, LEVELS)}")
    leave_out_cudnn_attention()  # for all arms, so that none pays for plans that a second round does not need
    if options.device.type == "cuda" and options.device.index is not None:
        torch.cuda.set_device(options.device)  # events are recorded there, whatever the tensors' device
    return LEVELS[level](options)


def show(result: dict, console: Console) -> None:
    """Print what `measured` found."""
    (evaluation if result["level"] == "eval" else measure).show(result, console)


def options(
    device: str | None, dtype: str | None, shape: str | None, arms: str | None, tasks: str | None, **others
) -> Options:
    """The options, parsed from the command line."""
    cuda = torch.cuda.is_available()
    device = device or ("cuda" if cuda else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not cuda):
        raise Fault(f"--device: '{device}' is not available here; choose {'cpu or cuda' if cuda else 'cpu'}")
    names = {str(known).removeprefix("torch."): known for known in TOLERANCE}
    dtype = dtype or ("bfloat16" if device != "cpu" else "float32")
    if dtype not in names:
        raise Fault(f"--dtype: '{dtype}' is unknown; choose from {', '.join(names)}.{nearest(dtype, names)}")
    try:
        numbers = tuple(int(n) for n in shape.split(",")) if shape else None
    except ValueError:
        raise Fault(
            f"--shape: '{shape}' must be whole numbers with commas between, e.g. 1024,576,1536,16"
        ) from None
    names_of = {"arms": listed(arms), "tasks": listed(tasks)}
    return Options(
        torch.device(device),
        names[dtype],
        shape=numbers,
        **{key: tuple(found) if found else None for key, found in names_of.items()},
        **others,
    )

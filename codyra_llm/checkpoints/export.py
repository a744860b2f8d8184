"""Exports of a run: the model after any of its tasks, in a format that other tools read."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import room_faults
from codyra_llm.experiment.export import (
    adapter_notes,
    write_gguf_folder,
    write_merged,
    write_peft,
    write_stage,
)
from codyra_llm.experiment.setup import prepare
from codyra_llm.models import saved
from codyra_llm.report import card
from codyra_llm.store.folder import RunFolder

FORMATS = {  # the options that each format knows
    "merged": ("dtype", "without"),
    "peft": ("rank", "without"),
    "gguf": ("type", "without"),
    "stage": (),
}
GGUF_TYPES = ("f16", "bf16", "q8_0", "f32")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Export:
    """What is exported: the model after a task (None: the last), less the update of the task `without`, in
    one of FORMATS; a dtype of merged models, a type of GGUF files, the rank that a PEFT adapter is cut to."""

    after: str | None = None
    without: str | None = None
    format: str = "merged"
    dtype: str | None = None
    type: str | None = None
    rank: int | None = None


def check(asked: Export, out: Path) -> None:
    """Raises one Fault for an unknown format, dtype or type, for an option of another format, and where `out`
    exists already."""
    if asked.format not in FORMATS:
        raise Fault(
            f"--format: '{asked.format}' is not a format; choose {', '.join(FORMATS)}."
            f"{nearest(asked.format, FORMATS)}"
        )
    faults = []
    for name in ("dtype", "type", "rank", "without"):
        if getattr(asked, name) is not None and name not in FORMATS[asked.format]:
            faults.append(
                f"--{name}: an export as {asked.format} has no such choice; leave it out, or choose another "
                "--format"
            )
    if asked.dtype not in (None, *DTYPES):
        faults.append(
            f"--dtype: '{asked.dtype}' is not a dtype of exports; choose one of {', '.join(DTYPES)}"
        )
    if asked.type not in (None, *GGUF_TYPES):
        faults.append(
            f"--type: '{asked.type}' is not a type of GGUF exports; choose one of {', '.join(GGUF_TYPES)}"
        )
    if out.exists():
        faults.append(f"{out} exists already; give a new name")
    if faults:
        raise Fault(*faults)


def export(folder: RunFolder, asked: Export, out: Path) -> list[str]:
    """Write the export to `out`, rebuilt from the base and the archived updates. Returns remarks for
    the user, in sentences. Raises Fault for what `check` refuses, for a task that is not learnt, and for a
    format that the run's method does not have."""
    check(asked, out)
    setup = prepare(folder.recipe, runs=False)
    archive = folder.archive()
    last = archive.index(asked.after) if asked.after else len(archive.files) - 1
    left_out = archive.index(asked.without) if asked.without else None
    if left_out is not None and not 0 <= left_out <= last:
        before = archive.tasks[: last + 1]
        raise Fault(
            f"--without: the model after {asked.after or archive.tasks[last]} has no update of "
            f"'{asked.without}'; choose one of {', '.join(before) or 'no task'}, or leave --without out"
        )
    setup.verify(folder, last)
    dtype = getattr(torch, asked.dtype) if asked.dtype else None
    faults = room_faults(out, _size(asked, setup.base, dtype), "OUT")
    if faults:
        raise Fault(*faults)
    written = partial(card.render, setup.base, folder, last, left_out, asked.format)
    notes = []
    if asked.format == "stage":
        write_stage(folder, last, out, written())
    elif asked.format == "peft":
        notes = adapter_notes(setup, write_peft(setup, archive, last, left_out, out, written, asked.rank))
    elif asked.format == "gguf":
        write_gguf_folder(setup, archive, last, left_out, out, written(), asked.type or "f16")
    else:
        write_merged(setup, archive, last, left_out, out, written(), dtype)
    less = f" without {asked.without}" if asked.without else ""
    name = archive.tasks[last] if last >= 0 else "base"
    return [*notes, f"{asked.format} model after {name}{less}: {out}"]


def _size(asked: Export, base: Path, dtype: torch.dtype | None) -> int:
    """About how many bytes the export takes, where it is a whole model; else 0."""
    if asked.format == "merged":
        return saved.size(base, dtype)
    if asked.format == "gguf":
        wide = saved.size(base, torch.float32 if asked.type == "f32" else torch.float16)
        return wide // 2 if asked.type == "q8_0" else wide
    return 0

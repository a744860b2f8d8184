"""The updates of a run on disk: one small safetensors file per task, chained by hashes to the base that they
belong to.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import replacing
from codyra_llm.core.tensors import save_tensors
from codyra_llm.lora.update import MODES, Adapter, Update, negative

DENSE = "dense."  # in a file: a whole parameter of that name


def _refuse_other_dtypes(task: str, update: Update) -> None:
    """Raises Fault where a method gives factors in another dtype than merges compute in."""
    for site, adapter in update.adapters.items():
        for name, factor in adapter._asdict().items():
            if factor is not None and factor.dtype != torch.float32:
                raise Fault(
                    f"the update of task {task}: factor {name} of {site} is {factor.dtype}, expected "
                    "torch.float32; let the method's `consolidate` give it as `.float()`"
                )


class Archive:
    """The updates of one run, in order: `<folder>/<index>-<task>.safetensors`.

    Lineage: hash_t = sha256(hash_{t-1} ‖ mode, scale and sites ‖ tensors of t), where ‖ joins bytes and
    hash_{-1} is the fingerprint of the base. A file that does not continue the chain is a Fault.
    """

    def __init__(self, folder: Path, base: str):
        self.folder, self.base = folder, base
        self.files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        self.lineage = [base]
        for file in self.files:
            meta = _metadata(file)
            if meta["parent"] != self.lineage[-1]:
                raise Fault(
                    f"{file}: this update was made on {meta['parent'][:12]}, but what stands before it is "
                    f"{self.lineage[-1][:12]}; restore the folder, or the base model that the run began with"
                )
            self.lineage.append(meta["lineage"])

    @property
    def tasks(self) -> list[str]:
        """The tasks that have an update, in the order of the run."""
        return [file.stem.partition("-")[2] for file in self.files]

    def index(self, task: str) -> int:
        """The position of `task` (a name, 'base' = -1) in the run. Raises Fault for a task that has no
        update.
        """
        if task == "base":
            return -1
        if task not in self.tasks:
            raise Fault(
                f"'{task}' is not a finished task of {self.folder.parent}; finished: "
                f"{', '.join(self.tasks) or 'none'}.{nearest(task, self.tasks)}"
            )
        return self.tasks.index(task)

    def path(self, index: int, task: str) -> Path:
        """The file of the update of `task`, the one at position `index`."""
        return self.folder / f"{index:02d}-{task}.safetensors"

    def append(self, task: str, update: Update) -> Path:
        """Write the next update, atomically. Raises Fault for factors that are not float32."""
        _refuse_other_dtypes(task, update)
        tensors = {
            f"{site}.{key}": value.contiguous()
            for site, adapter in update.adapters.items()
            for key, value in adapter._asdict().items()
            if value is not None
        }
        tensors |= {DENSE + name: value.contiguous() for name, value in update.dense.items()}
        meta = {
            "task": task,
            "mode": update.mode,
            "scale": repr(update.scale),
            "base": self.base,
            "parent": self.lineage[-1],
            "sites": json.dumps(list(update.adapters)),
        }
        meta["lineage"] = _chain(meta, tensors)
        path = self.path(len(self.files), task)
        with replacing(path) as temporary:
            save_tensors(tensors, temporary, meta)
        self.files.append(path)
        self.lineage.append(meta["lineage"])
        return path

    def is_empty(self, index: int) -> bool:
        """Whether update `index` changes nothing, as the one that a joint method leaves after each task but
        the last."""
        with safe_open(self.files[index], "pt") as file:
            return not list(file.keys())

    def load(self, index: int) -> Update:
        """Read update `index` and check its tensors against its hash."""
        meta = _metadata(self.files[index])
        with safe_open(self.files[index], "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if _chain(meta, tensors) != meta["lineage"]:
            raise Fault(
                f"{self.files[index]}: its content does not match its hash; restore the file from a copy"
            )
        try:
            adapters = {
                site: Adapter(tensors[f"{site}.a"], tensors[f"{site}.b"], tensors.get(f"{site}.w"))
                for site in json.loads(meta["sites"])
            }
            scale, mode = float(meta["scale"]), MODES[meta["mode"]]
        except (KeyError, TypeError, ValueError):
            raise Fault(
                f"{self.files[index]}: its header does not fit its tensors; restore the file from a copy"
            ) from None
        dense = {key.removeprefix(DENSE): value for key, value in tensors.items() if key.startswith(DENSE)}
        return Update(adapters, scale, mode, dense)

    def terms(self, after: int, without: int | None = None) -> list[Update]:
        """The updates whose sum is the model after task `after` (-1: the base), leaving task `without` out;
        none in mode "apart", where the base itself stays.

        In mode "replace" update k holds the sum of all tasks up to k, so task k's own part is update k minus
        k - 1.
        """
        if after < 0:
            return []
        last = self.load(after)
        if last.mode == "apart":
            return []
        if last.mode == "add":
            terms = [self.load(k) for k in range(after) if k != without]
            return terms if without == after else [*terms, last]
        if without is None or without > after:
            return [last]
        terms = [last, negative(self.load(without))]
        if without > 0:  # before the first task there is nothing to add back
            terms.append(self.load(without - 1))
        return terms


def _metadata(path: Path) -> dict[str, str]:
    """The header of an update's file. Raises Fault where it is damaged, or no update's."""
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise Fault(
            f"{path} is damaged ({error}); restore it from a copy, or remove it and what was made after it"
        ) from None
    missing = {"parent", "lineage", "mode", "scale", "sites"} - meta.keys()
    if missing:
        raise Fault(
            f"{path} is not an update of a run (its header lacks {', '.join(sorted(missing))}); restore it "
            "from a copy"
        )
    return meta


def _chain(meta: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """The hash that an update adds to the lineage."""
    digest = hashlib.sha256(json.dumps([meta[key] for key in ("parent", "mode", "scale", "sites")]).encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Finds the records of a task, in TRACE's layout or as benchmark.yaml declares them (files, or a data set of
`datasets`), and assigns them to splits. docs/own_data.md describes it for users."""

import hashlib
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from codyra_llm.config.sections import FILE
from codyra_llm.config.task import DatasetSource, Task
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.data import readers, records
from codyra_llm.data.examples import Chats, Columns, label_names
from codyra_llm.data.readers import Reading, class_names
from codyra_llm.data.records import SPLITS, read_split, refuse
from codyra_llm.data.rendering import Render, plain
from codyra_llm.runtime.quiet import without_data_bars

SHARES = {"test": 0.2, "eval": 0.1}  # of the distinct prompts in train, for a split that is not given
HUB = {"train": "train", "eval": "validation", "test": "test"}


class Table(NamedTuple):
    """The rows of a split: where they are, for messages, and the function that reads them."""

    where: str
    read: Callable[[], list]


def read(root: Path, name: str, task: Task, split: str, render: Render = plain) -> list[dict]:
    """The examples of one split, each {"prompt": str, "answer": str}, and of chats whose earlier turns are
    learnt `learnt` (data/examples.py). Raises Fault with what is wrong with them.
    """
    if not task.declared:
        return read_split(root, name, split)
    tables = _tables(root, name, task)
    table = tables.get(split) or tables.get("train")
    if not table:
        raise Fault(f"tasks.{name}: it has neither {split} nor train data; give one of them in {FILE}")
    rows = table.read()
    if not rows:
        raise Fault(f"{table.where} holds no record; give some, or leave task '{name}' out")
    maker = _maker(root, name, task, render, every=task.train_on == "assistant" and split == "train")
    faults = list(maker.lacking(rows, table.where))
    if faults:
        raise Fault(*faults)
    source = split if split in tables else "train"  # the split whose rows are read
    kept = [(i, row) for i, row in enumerate(rows) if source != "train" or not maker.skips(row)]
    made = [maker.make(row, source, f"{table.where}: record {i}") for i, row in kept]
    refuse([fault for _, faults in made for fault in faults], table.where, len(rows))
    # Splits that are not given are taken out of train, so some of its rows belong to them.
    missing = [key for key in SHARES if key not in tables]
    assigned = divided([maker.key(row) for _, row in kept], missing)
    examples = []
    for (example, _), goes_to in zip(made, assigned, strict=True):
        if example is not None and (source != "train" or goes_to == split):
            examples.append(example)
    if not examples:
        raise Fault(
            f"{table.where} has too few different prompts to be divided into {', '.join(SPLITS)}; give a "
            "file for each, or more records"
        )
    return examples


def _maker(root: Path, name: str, task: Task, render: Render, every: bool = False) -> Chats | Columns:
    """What makes examples of the task's rows. `every`: a chat's earlier turns are learnt too."""
    return Chats(task, render, every) if task.chat else Columns(task, label_names(root, name, task))


def reading(task: Task) -> Reading:
    """How the files of a task are read."""
    return Reading(task.delimiter, task.records, task.used)


def remarks(root: Path, name: str, task: Task) -> list[str]:
    """Remarks on files that are read otherwise than their names say, and on what is left out, a sentence
    each; only for readable files."""
    notes = [] if task.declared else records.remarks(root, name)
    for _, file in task.files or ():
        if not file:
            continue
        try:
            notes.append(readers.found(root / file, "records", reading(task)).remark)
        except Fault:  # reported where the file is read
            continue
    if task.skip_empty:
        notes += _left_out(root, name, task)
    return [f"tasks.{name}: {remark}" for remark in dict.fromkeys(notes) if remark]


def _left_out(root: Path, name: str, task: Task) -> Iterator[str]:
    """A remark on training records without an answer, if there are any and their table can be read."""
    try:
        table, maker = _tables(root, name, task).get("train"), _maker(root, name, task, plain)
        rows = table.read() if table else []
    except Fault:  # reported where the table is read
        return
    skipped = [row for row in rows if maker.skips(row)]
    if skipped:
        yield f"{table.where}: {len(skipped)} of {len(rows)} records have no answer, and are left out"


def place(root: Path, name: str, task: Task, split: str) -> str:
    """Where a split is read from, for sentences."""
    if not task.declared:
        return str(root / name / f"{split}.json")
    tables = _tables(root, name, task)
    return tables[split].where if split in tables else f"the {split} split of task '{name}'"


def divided(prompts: list[str], missing: list[str]) -> list[str]:
    """For each row of train, the split to which it goes: train, or one of the `missing` ones.

    The distinct prompts, ignoring white space, case and the form in which Unicode writes accents, are sorted
    by their sha256, and each missing split takes its share of them, at least one. So the split is the same on
    every machine, for every model and seed and any order of the rows, and a prompt that occurs twice is in
    only one split."""
    plain_prompts = [unicodedata.normalize("NFC", " ".join(prompt.split()).casefold()) for prompt in prompts]
    keys = [hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest() for prompt in plain_prompts]
    distinct, split_of, first = sorted(set(keys)), {}, 0
    for split in missing:
        last = first + max(1, round(SHARES[split] * len(distinct)))
        split_of |= dict.fromkeys(distinct[first:last], split)
        first = last
    return [split_of.get(key, "train") for key in keys]


def _tables(root: Path, name: str, task: Task) -> dict[str, Table]:
    """The tables of the splits that the benchmark gives, by split."""
    if task.files:
        files = {split: root / file for split, file in task.files if file}
        return {
            split: Table(
                str(path),
                partial(readers.rows, path, f"records of the {split} data of task '{name}'", reading(task)),
            )
            for split, path in files.items()
        }
    source = task.dataset
    found = _dataset(_local(root, source.path), source, name)
    wanted = {split: chosen for split, chosen in source.splits if chosen}
    faults = [
        f"tasks.{name}.dataset.splits: '{chosen}' is not a split of {source.path}.{nearest(chosen, found)} "
        f"Known: {', '.join(found)}"
        for chosen in wanted.values()
        if chosen not in found
    ]
    if faults:
        raise Fault(*faults)
    wanted = wanted or {split: chosen for split, chosen in HUB.items() if chosen in found}
    return {
        split: Table(f"{source.path} ({chosen})", partial(class_names, found[chosen]))
        for split, chosen in wanted.items()
    }


def _local(root: Path, path: str) -> str:
    return str(root / path) if (root / path).is_dir() else path


@lru_cache
def _dataset(path: str, source: DatasetSource, name: str):
    """The splits of a data set by name."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with without_data_bars():
            return load_dataset(path, source.name, revision=source.revision)
    # RuntimeError: a data set that is a script, which `datasets` no longer runs.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise Fault(
            f"tasks.{name}.dataset: '{source.path}' can't be read ({reason}); check the name, the "
            "configuration, the network and HF_HUB_OFFLINE, or give a folder below data.root"
        ) from None

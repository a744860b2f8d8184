"""Where the records of a task come from: TRACE's layout, or what benchmark.yaml declares: files, or a data
set of `datasets`; columns, or a chat. docs/own_data.md describes it for users."""

import csv
import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from codyra_llm.config.benchmark import DatasetSource, Task
from codyra_llm.config.sections import FILE
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.foreign import Failed
from codyra_llm.core.parsing import parse_json, read_text
from codyra_llm.data.records import LONGEST, SPLITS, parse, read_split, record_faults, refuse
from codyra_llm.models.tokenizer import render_chat
from codyra_llm.runtime.quiet import without_data_bars

SHARES = {"test": 0.2, "eval": 0.1}  # of the distinct prompts in train, for a split that is not given
HUB = {"train": "train", "eval": "validation", "test": "test"}


Chat = list[dict[str, str]]
Render = Callable[[Chat], str]


class Table(NamedTuple):
    """Rows that a split is made of: where they are, for sentences, and what reads them."""

    where: str
    read: Callable[[], list]


def plain(chat: Chat) -> str:
    """A chat as text where no model is there to say how: for `codyra-llm data check`."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in chat)


def by_template(tokenizer: PreTrainedTokenizerBase) -> Render:
    """A chat as the model's template writes it, up to where the answer begins."""
    return partial(render_chat, tokenizer)


def read(root: Path, name: str, task: Task, split: str, render: Render = plain) -> list[dict]:
    """The examples of one split, each {"prompt": str, "answer": str}. Raises Fault with what is wrong with
    them.
    """
    if not task.declared:
        return read_split(root, name, split)
    tables = _tables(root, name, task)
    table = tables.get(split) or tables.get("train")
    if not table:
        raise Fault(f"tasks.{name}: it has neither {split} nor train data; give one of them in {FILE}")
    if not (rows := table.read()):
        raise Fault(f"{table.where} holds no record; give some, or leave task '{name}' out")
    of = split if split in tables else "train"
    pairs = [_record(row, task, of, f"{table.where}: record {i}", render) for i, row in enumerate(rows)]
    refuse([fault for _, faults in pairs for fault in faults], table.where, len(rows))
    splits = divided([_prompt(task, row) for row in rows], [key for key in SHARES if key not in tables])
    records = [
        record for (record, _), own in zip(pairs, splits, strict=True) if of != "train" or own == split
    ]
    if not records:
        raise Fault(
            f"{table.where} has too few different prompts to be divided into {', '.join(SPLITS)}; give a "
            "file for each, or more records"
        )
    return records


def place(root: Path, name: str, task: Task, split: str) -> str:
    """Where a split is read from, for sentences."""
    if not task.declared:
        return str(root / name / f"{split}.json")
    tables = _tables(root, name, task)
    return tables[split].where if split in tables else f"the {split} split of task '{name}'"


def divided(prompts: list[str], missing: list[str]) -> list[str]:
    """For each row of train the split that it goes to: train, or one of those that are `missing`.

    The distinct prompts, white space and case aside, are put into the order of their sha256, and each missing
    split takes its share of them, at least one. So it is the same on every machine, for every model and seed
    and however the rows are ordered, and a prompt that is there twice is in one split alone.
    """
    keys = [
        hashlib.sha256(" ".join(prompt.split()).casefold().encode("utf-8", "replace")).hexdigest()
        for prompt in prompts
    ]
    distinct, of, first = sorted(set(keys)), {}, 0
    for split in missing:
        last = first + max(1, round(SHARES[split] * len(distinct)))
        of |= dict.fromkeys(distinct[first:last], split)
        first = last
    return [of.get(key, "train") for key in keys]


def _tables(root: Path, name: str, task: Task) -> dict[str, Table]:
    """By split what is given for it."""
    if task.files:
        files = {split: root / file for split, file in task.files if file}
        return {
            split: Table(str(path), partial(rows, path, f"records of the {split} data of task '{name}'"))
            for split, path in files.items()
        }
    source = task.dataset
    found = _dataset(_local(root, source.path), source, name)
    wanted = {split: chosen for split, chosen in source.splits if chosen}
    if unknown := [chosen for chosen in wanted.values() if chosen not in found]:
        raise Fault(
            *(
                f"tasks.{name}.dataset.splits: '{chosen}' is not a split of "
                f"{source.path}.{nearest(chosen, found)} Known: {', '.join(found)}"
                for chosen in unknown
            )
        )
    wanted = wanted or {split: chosen for split, chosen in HUB.items() if chosen in found}
    return {
        split: Table(f"{source.path} ({chosen})", partial(_listed, found[chosen]))
        for split, chosen in wanted.items()
    }


def rows(path: Path, expected: str) -> list:
    """The rows of a .json, .jsonl or .csv file. Raises Fault where it is none, or can't be read."""
    if path.suffix not in READERS:
        raise Fault(
            f"{path} must end in {', '.join(READERS)}.{nearest(path.suffix, READERS)} Save it as one of "
            "them, or give its folder as 'dataset'"
        )
    return READERS[path.suffix](path, expected)


def _jsonl(path: Path, expected: str) -> list:
    lines = read_text(path, expected).split("\n")  # splitlines() would split at U+2028 too
    return [
        parse_json(line, f"{path}, line {number}", "one record")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _csv(path: Path, expected: str) -> list[dict]:
    """Rows by the names in the first line; every value is text."""
    try:
        with _long_fields():
            header, *rows = csv.reader(io.StringIO(read_text(path, expected), newline=""), strict=True)
    except csv.Error as error:
        raise Fault(
            f"{path} is no CSV ({error}); put texts with commas, quotes or line breaks into quotes"
        ) from None
    except ValueError:
        raise Fault(
            f"{path} is empty, expected {expected} below a line with the columns' names; write it"
        ) from None
    rows = [row for row in rows if row]  # blank lines
    wrong = [
        f"{path}: record {i} has {len(row)} values, the first line names {len(header)}; put texts with "
        "commas into quotes"
        for i, row in enumerate(rows)
        if len(row) != len(header)
    ]
    wrong += [
        f"{path}: the column '{name}' is there twice; rename one"
        for name in sorted({n for n in header if header.count(n) > 1})
    ]
    refuse(wrong, path, len(rows))
    return [dict(zip(header, row, strict=True)) for row in rows]


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within it `csv` reads the longest text that a record may have, and one more character."""
    before = csv.field_size_limit(max(LONGEST.values()) + 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


READERS = {".json": parse, ".jsonl": _jsonl, ".csv": _csv}


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
    except (
        OSError,
        ValueError,
        RuntimeError,
        DatasetsError,
    ) as error:  # RuntimeError: a data set in a script
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise Fault(
            f"tasks.{name}.dataset: '{source.path}' can't be read ({reason}); check the name, the "
            "configuration, the network and HF_HUB_OFFLINE, or give a folder below data.root"
        ) from None


def _listed(rows) -> list[dict]:
    """The rows of a data set, numbers of classes as the classes' names."""
    from datasets import ClassLabel

    classes = {key: kind.names for key, kind in rows.features.items() if isinstance(kind, ClassLabel)}
    return [
        {
            **row,
            **{
                key: names[row[key]] if row[key] is not None and row[key] >= 0 else None
                for key, names in classes.items()
            },
        }
        for row in rows
    ]


def _prompt(task: Task, row: dict) -> str:
    """What tells one faultless row's prompt from another's, before any model writes it."""
    return plain(row[task.messages][:-1]) if task.messages else str(row[task.columns.prompt])


def _record(row: object, task: Task, split: str, where: str, render: Render) -> tuple[dict, list[str]]:
    """The example that a row is, and what is wrong with it."""
    fields = (task.columns.prompt, task.columns.answer)
    if task.messages:
        chat = row.get(task.messages) if isinstance(row, dict) else None
        if not _is_chat(chat):
            return {}, [
                f"{where}: '{task.messages}' must be a list of messages with the texts 'role' and 'content', "
                "of which the last is the assistant's; correct it."
            ]
        try:
            row, fields = {"prompt": render(chat[:-1]), "answer": chat[-1]["content"]}, ("prompt", "answer")
        except Failed as error:
            told = (
                f"{where}: the model's chat template refuses '{task.messages}' ({error.reason}); correct it, "
                "or choose another model."
            )
            if error.stopped:  # it would be at every other record too
                raise Fault(told) from None
            return {}, [told]
    if isinstance(row, dict):  # labels are often numbers, whose text is known; that of 1.10 is not
        row = {key: str(value) if type(value) is int else value for key, value in row.items()}
    faults = record_faults(row, split, where, fields)
    return ({} if faults else {"prompt": row[fields[0]], "answer": row[fields[1]]}), faults


def _is_chat(chat: object) -> bool:
    return (
        isinstance(chat, list)
        and len(chat) > 1
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in chat
        )
        and chat[-1]["role"] == "assistant"
    )

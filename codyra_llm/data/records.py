"""Examples in TRACE's layout: reading a split strictly, and checking a whole folder of tasks.

Layout: `<root>/<task>/{train,eval,test}.json`, each a JSON list of {"prompt": str, "answer": str}; other
fields are ignored. The four variants of the benchmark (500, 1000, 5000, Reasoning) share it; `sources.py`
reads others.
"""

import io
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from codyra_llm.config.sections import FILE
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.parsing import parse_json, read_text, shown

SPLITS = ("train", "eval", "test")
SURROGATE = re.compile("[\ud800-\udfff]")  # valid in JSON escapes, but no tokenizer can encode it

# Characters; TRACE has up to 164,000 and 18,000, and ROUGE is quadratic.
LONGEST = {"prompt": 1_000_000, "answer": 50_000}

# In place of a value: there is none; the label is -1, the mark of labels that are kept secret.
ABSENT, HIDDEN = object(), object()

LINES = "has one record in each line (JSON Lines), and is read that way"
NAMED = 5  # faults of one file that are listed one by one; the rest are counted


def read_split(root: Path, task: str, split: str) -> list[dict]:
    """The examples of one split, each {"prompt": str, "answer": str}. Raises Fault with all faults of the
    file.
    """
    path = root / task / f"{split}.json"
    if not os.path.isfile(path):
        raise Fault(missing(root, task, path))
    records = parse(path)
    faults = []
    for i, record in enumerate(records):
        faults += record_faults(record, split, f"{path}: record {i}")
    refuse(faults, path, len(records))
    return [_with_texts(record) for record in records]


def _with_texts(record: dict) -> dict[str, str]:
    return {part: str(record[part]) for part in LONGEST}


def refuse(faults: list[str], where: str | Path, count: int) -> None:
    """Raise Fault with the first of the faults that `count` records have, and the number of the others."""
    rest = len(faults) - NAMED
    if rest > 0:
        faults = [*faults[:NAMED], f"{where}: {rest} more faults in {count} records; correct these too."]
    if faults:
        raise Fault(*faults)


def missing(root: Path, task: str, path: Path) -> str:
    """The message for a file that isn't there: the root, the task folder or only the split may be
    wrong.
    """
    if not root.is_dir():
        return (
            f"{root} is not a folder: expected the benchmark's root, such as LLM-CL-Benchmark_500; correct "
            "the path."
        )
    if not path.parent.is_dir():
        tasks = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        return (
            f"{path.parent} doesn't exist: expected a folder for task '{task}' under {root}, which has "
            f"{', '.join(tasks) or 'none'}.{nearest(task, tasks)}"
        )
    if path.is_dir():
        return f"{path} is a folder, expected the {path.stem} split of task '{task}' in a file; put it there."
    return (
        f"{path} doesn't exist: expected the {path.stem} split of task '{task}'; add it or leave the "
        "task out."
    )


def parse(path: Path, expected: str = '{"prompt": ..., "answer": ...} records') -> list:
    """The JSON list of a file, or its JSON Lines; Fault with the byte or the line and column where reading it
    fails.
    """
    text = read_text(path, "one list of records")
    if has_lines(text):
        return json_lines(path, text)
    return listed(parse_json(text, str(path), "one list of records", long_numbers=True), path, expected)


def remarks(root: Path, task: str) -> list[str]:
    """Remarks on files that are read otherwise than their names say, where they can be read."""
    found = []
    for split in SPLITS:
        path = root / task / f"{split}.json"
        try:
            lines = path.is_file() and has_lines(read_text(path, "one list of records"))
        except Fault:  # reported where the file is read
            continue
        if lines:
            found.append(f"{path} {LINES}")
    return found


def has_lines(text: str) -> bool:
    """Whether each of the first two lines is an object, which is not possible in a single JSON value."""
    lines = (line.strip() for line in io.StringIO(text))
    first = list(islice((line for line in lines if line), 2))
    return len(first) == 2 and all(line.startswith("{") and line.endswith("}") for line in first)


def json_lines(path: Path, text: str) -> list:
    """The values of JSON Lines; Fault with every line that can't be read."""
    values, faults = [], []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split at U+2028 too
        if not line.strip():
            continue
        try:
            values.append(parse_json(line, f"{path}, line {number}", "one record", long_numbers=True))
        except Fault as fault:
            faults += fault.messages
    refuse(faults, path, len(values) + len(faults))
    return values


def listed(value: object, path: Path, expected: str) -> list:
    """A JSON value that must be a list with something in it."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise Fault(f"{path}: holds {found}, expected a list of {expected}; correct it.")
    return value


def record_faults(
    record: object, split: str, where: str, fields: tuple[str, str] = ("prompt", "answer")
) -> list[str]:
    """Faults of one record, whose prompt and answer are in these `fields`. Eval and test may have empty
    answers (Lima has no references); training may not."""
    if not isinstance(record, dict):
        return [
            f"{where} is a {type(record).__name__}, expected an object with '{fields[0]}' and '{fields[1]}'; "
            "correct it."
        ]
    faults = []
    for field, part in zip(fields, LONGEST, strict=True):
        value = as_text(record.get(field, ABSENT))
        if value is ABSENT:
            faults.append(f"{where} has no '{field}', expected a string; add it.{nearest(field, record)}")
        else:
            faults += text_faults(value, field, part, split == "train", where)
    return faults


def as_text(value: object) -> object:
    """An integer as its text, anything else unchanged. Labels are often integers; for 1.10 the original text
    is not known."""
    return str(value) if type(value) is int else value


def text_faults(value: object, field: str, part: str, learnt: bool, where: str) -> Iterator[str]:
    """What is wrong with the value of a field that becomes this `part` of an example, prompt or answer.
    `learnt`: whether the record trains."""
    most = LONGEST[part]
    if not isinstance(value, str):
        yield f"{where}: '{field}' is {_not_a_text(value, field, part)}"
    elif len(value) > most:
        yield f"{where}: '{field}' has {len(value):,d} characters, expected at most {most:,d}; shorten it."
    elif SURROGATE.search(value):
        yield f"{where}: '{field}' holds half of a surrogate pair, expected Unicode text; export it again."
    elif "\0" in value:
        yield f"{where}: '{field}' holds a NUL character, left by a wrong decoding; export it again."
    elif part == "answer" and learnt and not value:
        yield f"{where}: '{field}' is empty, expected text to learn; fill it in or remove the record."


def _not_a_text(value: object, field: str, part: str) -> str:
    if value is HIDDEN:
        return (
            "-1, the mark of a label that is kept secret; give a split whose labels are known, such as "
            "validation as test."
        )
    if value is None:
        return "null, expected a string; fill it in or remove the record."
    if isinstance(value, list):
        inner = f"a list of {len(value)}, expected a string; give one of them"
        return (
            f"{inner}, or name it in {FILE}, such as columns: {{{part}: {field}.0}}."
            if value
            else f"{inner}."
        )
    if isinstance(value, dict):
        names = ", ".join(shown(name) for name in list(value)[:5]) or "no field"
        first = next(iter(value), "NAME")
        return (
            f"an object with {names}, expected a string; give one of its fields, or name it in {FILE}, such "
            f"as columns: {{{part}: {field}.{first}}}."
        )
    return f"a {type(value).__name__}, expected a string; put it in quotes."

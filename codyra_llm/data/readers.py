"""Reads files of records: JSON, JSON Lines, CSV, TSV, Parquet, and the first four compressed by gzip."""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.parsing import decoded, parse_json, read_text
from codyra_llm.data.records import HIDDEN, LINES, LONGEST, has_lines, json_lines, listed, refuse
from codyra_llm.runtime.quiet import without_data_bars

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # tried where none is given
NAMED_DELIMITER = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # Excel's first line, which names the delimiter
MOST_BYTES = 1 << 32  # of text that a .gz unpacks to


class Reading(NamedTuple):
    """How a file is to be read, where its name does not say so."""

    delimiter: str | None = None  # None: detect it
    records: str | None = None  # the field with the list of records
    used: frozenset[str] | None = None  # the columns that matter; None: all


PLAIN = Reading()


class Found(NamedTuple):
    """Rows, and a remark if the file's content differs from what its name says."""

    rows: list
    remark: str = ""


def rows(path: Path, expected: str, reading: Reading = PLAIN) -> list:
    """The rows of a file. Raises Fault for a file of an unknown kind, or one that can't be read."""
    return found(path, expected, reading).rows


def found(path: Path, expected: str, reading: Reading = PLAIN) -> Found:
    """The rows of a file and a remark on it. Raises Fault as `rows` does."""
    suffix = kind(path)
    if suffix is None:
        raise Fault(
            f"{path} must end in {', '.join(KINDS)} (.gz may follow), or be given as its folder, as "
            f"'dataset'.{nearest(path.suffix, KINDS)} Save it as one of them"
        )
    if suffix == ".parquet":
        return Found(_parquet(path, expected))
    return READERS[suffix](path, _text(path, expected), expected, reading)


def kind(path: Path) -> str | None:
    """The suffix by which a file is read, without .gz; None where none is known."""
    packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    return suffix if suffix in READERS or (suffix == ".parquet" and not packed) else None


def stem(path: Path) -> str:
    """The file's name without the suffixes that say its kind."""
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def _text(path: Path, expected: str) -> str:
    if path.suffix.lower() != ".gz":
        return read_text(path, expected)
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise Fault(f"{path} can't be unpacked ({reason}); give {expected}, packed by gzip") from None
    if len(data) > MOST_BYTES:
        raise Fault(f"{path} unpacks to more than {MOST_BYTES >> 30} GiB; give a smaller file")
    return decoded(data, str(path))


def _json(path: Path, text: str, expected: str, reading: Reading) -> Found:
    """Reads one JSON value, or JSON Lines under the wrong name."""
    if has_lines(text):
        return Found(json_lines(path, text), f"{path} {LINES}")
    value = parse_json(text, str(path), "one list of records", long_numbers=True)
    return Found(_records(value, path, expected, reading))


def _jsonl(path: Path, text: str, expected: str, reading: Reading) -> Found:
    """Reads JSON Lines, or one JSON list under the wrong name."""
    if not text.lstrip().startswith("["):
        return Found(json_lines(path, text))
    value = parse_json(text, str(path), "one list of records", long_numbers=True)
    return Found(
        _records(value, path, expected, reading), f"{path} holds one JSON list, and is read that way"
    )


def _records(value: object, path: Path, expected: str, reading: Reading) -> list:
    """The list of records: the JSON value itself, or what it has in the field `reading.records`. The object's
    other fields are added to each record that lacks them."""
    if reading.records is None:
        inside = []
        if isinstance(value, dict):
            inside = [key for key, inner in value.items() if isinstance(inner, list)]
        if inside:
            raise Fault(
                f"{path} holds an object, expected a list of {expected}; say which of its lists has the "
                f"records ({', '.join(inside[:5])}), such as records: {inside[-1]}"
            )
        return listed(value, path, expected)
    if not isinstance(value, dict) or reading.records not in value:
        known = value if isinstance(value, dict) else ()
        raise Fault(
            f"{path} has no field '{reading.records}', which 'records' names."
            f"{nearest(reading.records, known)} Correct it, or leave it out for a file that is a list"
        )
    rows = listed(value[reading.records], path, expected)
    above = {key: inner for key, inner in value.items() if key != reading.records}
    return [{**above, **row} if isinstance(row, dict) else row for row in rows]


def _csv(path: Path, text: str, expected: str, reading: Reading) -> Found:
    named = NAMED_DELIMITER.match(text)
    if named:
        text = text[named.end() :]
    delimiter = reading.delimiter or (named[1] if named else _delimiter(text, reading.used))
    if f'{delimiter} "' in text and _quotes_after_spaces(text, delimiter):
        rows = _table(path, text, expected, delimiter, reading.used, spaces=True)
        return Found(rows, f"{path} has spaces in front of its quotes, and is read without them")
    rows = _table(path, text, expected, delimiter, reading.used)
    if reading.delimiter or delimiter == ",":
        return Found(rows)
    name = DELIMITERS.get(delimiter, f"'{delimiter}'")
    return Found(rows, f"{path} has {name} between its columns, and is read that way")


def _quotes_after_spaces(text: str, delimiter: str) -> bool:
    """Whether a value's quotes follow a space, as in `a, "b, c"`: `csv` takes these for part of the text,
    unless it is to skip spaces there."""
    try:
        with _long_fields():
            return list(_unspaced(text, delimiter, False)) != list(_unspaced(text, delimiter, True))
    except csv.Error:  # reported where it is read
        return False


def _unspaced(text: str, delimiter: str, skips: bool) -> Iterator[list[str]]:
    """The rows, without spaces in front of the values, which `csv` itself `skips` or not."""
    source = io.StringIO(text, newline="")
    for row in csv.reader(source, delimiter=delimiter, strict=skips, skipinitialspace=skips):
        yield [value.lstrip(" ") for value in row]


def _tsv(path: Path, text: str, expected: str, reading: Reading) -> Found:
    """Reads quotes as in CSV, or if that fails, as part of the text."""
    delimiter = reading.delimiter or "\t"
    try:
        return Found(_table(path, text, expected, delimiter, reading.used))
    except Fault as fault:
        try:
            rows = _table(path, text, expected, delimiter, reading.used, csv.QUOTE_NONE)
        except Fault:
            raise fault from None
    return Found(rows, f"{path} has quotes that are part of the text, and is read that way")


def _delimiter(text: str, used: frozenset[str] | None) -> str:
    """The delimiter with which the first line names most of the columns that are used; a tie goes to the
    comma."""

    def fit(delimiter: str) -> tuple[int, bool]:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        return len(set(names) & (used or set())), len(names) > 1

    try:
        with _long_fields():
            return max(DELIMITERS, key=fit)
    except csv.Error:  # reported where it is read
        return ","


def _table(
    path: Path,
    text: str,
    expected: str,
    delimiter: str,
    used: frozenset[str] | None,
    quoting: int = csv.QUOTE_MINIMAL,
    spaces: bool = False,
) -> list[dict]:
    """The rows as mappings, by the names in the first line; every value is text. `spaces`: drop the spaces in
    front of a value."""
    source = io.StringIO(text, newline="")
    name = DELIMITERS.get(delimiter, f"'{delimiter}'")
    try:
        with _long_fields():
            strict = quoting != csv.QUOTE_NONE
            header, *rows = csv.reader(
                source, delimiter=delimiter, strict=strict, quoting=quoting, skipinitialspace=spaces
            )
    except csv.Error as error:
        raise Fault(
            f"{path} is not CSV ({error}); put texts with {name}, quotes or line breaks into quotes"
        ) from None
    except ValueError:
        raise Fault(
            f"{path} is empty, expected {expected} below a line with the columns' names; write it"
        ) from None
    rows = [row for row in rows if any(row)]  # blank lines, which spreadsheets write as ",,"
    wrong = [
        f"{path}: record {i} has {len(row)} values, the first line names {len(header)}; put texts with "
        f"{name} into quotes"
        for i, row in enumerate(rows)
        if len(row) != len(header)
    ]
    twice = {column for column in header if header.count(column) > 1}
    wrong += [
        f"{path}: the column '{column}' is there twice; rename one"
        for column in sorted(twice if used is None else twice & used)
    ]
    refuse(wrong, path, len(rows))
    return [dict(zip(header, row, strict=True)) for row in rows]


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within this block `csv` reads the longest text that a record may have, and one more character."""
    before = csv.field_size_limit(max(LONGEST.values()) + 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, expected: str) -> list[dict]:
    if not path.is_file():
        raise Fault(f"{path} can't be read (No such file or directory); give {expected}")
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    try:
        with without_data_bars():
            table = Dataset.from_parquet(str(path))
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise Fault(f"{path} can't be read as Parquet ({reason}); write it again") from None
    return class_names(table)


def class_names(table) -> list[dict]:
    """The rows of a data set, with class numbers replaced by the classes' names, and objects in them without
    fields that are null. `datasets` gives all objects of a column the same fields, such as every argument of
    every tool that any call names, and fills those that an object did not have with null."""
    from datasets import ClassLabel

    classes = {key: kind.names for key, kind in table.features.items() if isinstance(kind, ClassLabel)}
    nested = {key: kind for key, kind in table.features.items() if _inner(kind) is not None}
    rows = []
    for row in table:
        named = {key: _name(row[key], names) for key, names in classes.items()}
        own = {key: _without_fillings(row[key], kind) for key, kind in nested.items()}
        rows.append({**row, **named, **own})
    return rows


def _inner(kind: object) -> object:
    """What a column of this kind consists of: the kinds of an object's fields, or the kind of a list's items;
    None for other columns."""
    from datasets import LargeList, List

    if isinstance(kind, List | LargeList):
        return kind.feature
    return kind if isinstance(kind, dict) else None


def _without_fillings(value: Any, kind: object) -> Any:
    """A value of this kind; its objects, at any depth, without fields that are null."""
    inner = _inner(kind)
    if isinstance(inner, dict) and isinstance(value, dict):
        own = {key: item for key, item in value.items() if item is not None}
        return {key: _without_fillings(item, inner[key]) for key, item in own.items()}
    if inner is not None and isinstance(value, list):
        return [_without_fillings(item, inner) for item in value]
    return value


def _name(number: int | None, names: list[str]) -> object:
    """The name of a class by its number; HIDDEN for -1, None for null."""
    if number is None:
        return None
    return names[number] if number >= 0 else HIDDEN


READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv}
KINDS = (*READERS, ".parquet")

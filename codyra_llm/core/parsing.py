"""Parses YAML and JSON that others wrote into plain values: strictly where parsers are lenient, and with
limits that parsers lack."""

import codecs
import json
import math
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any, TextIO

import yaml
from pydantic import AfterValidator, BeforeValidator

from codyra_llm.core.errors import Fault

DEPTH = 50  # nested sections; a recipe has 4
NODES = 20_000  # values, with every alias expanded
YAML_BYTES = 1 << 18
READ = 1 << 20  # characters of a long file at a time
ITEM = 1 << 24  # characters of one value of a list; a record has at most a million, escaped 6 million
_BLANK = re.compile(r"[ \t\n\r]*")

# Control characters, halves of surrogate pairs.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 100


def shown(value: Any) -> str:
    """`value` as Python writes it, cut to what fits into a sentence."""
    return _repr.repr(value)


def listed(text: str | None) -> list[str] | None:
    """The names in a text such as `FOMC, Py150`; None where there is none."""
    names = [name.strip() for name in (text or "").split(",")]
    return [name for name in names if name] or None


def _path(value: str) -> str:
    if not value or max(len(part.encode()) for part in value.split("/")) > 255 or len(value) > 4000:
        raise ValueError(
            f"{shown(value)} is not a path that a file system takes; give a shorter one, and not an empty one"
        )
    return value


def _text_of(value: Any) -> Any:
    """A path object as its text; anything else unchanged."""
    return str(value) if isinstance(value, PurePath) else value


PathText = Annotated[str, BeforeValidator(_text_of), AfterValidator(_path)]


def expanded(path: str) -> str:
    """`path` with $VARIABLES and a leading ~ written out, as a shell would."""
    return os.path.expanduser(os.path.expandvars(path))


def writable(path: str) -> str:
    """`expanded`, for a path to write to, so that no folder is ever called ~. Raises ValueError for the home
    of a user who is not known here."""
    found = expanded(path)
    if found.startswith("~"):
        raise ValueError(f"{shown(path)} names the home of a user that is not known here; write the path out")
    return found


def as_path(text: str | Path) -> Path:
    """A path that was given with a command or in Python, ~ expanded: shells do that only at the beginning of
    a word, not in quotes or after --out=, and Python doesn't. Raises Fault for the home of a user who is not
    known here."""
    try:
        return Path(writable(str(text)))
    except ValueError as error:
        raise Fault(str(error)) from None


WrittenPath = Annotated[PathText, AfterValidator(writable)]


def _without_dates(resolvers: list[tuple[str, re.Pattern]]) -> list[tuple[str, re.Pattern]]:
    """YAML reads 2024-05-01 as a date; here it stays text."""
    return [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]


class _Loader(yaml.SafeLoader):
    """Loads only plain values: no tags, dates or repeated keys, and with limits on depth and size."""

    yaml_implicit_resolvers = {
        first: _without_dates(known) for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag:
            raise _error(f"the tag {shown(tag)} asks for more than plain values", event.start_mark)
        self.depth += 1
        if self.depth > DEPTH:
            raise _error(f"it is nested deeper than {DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The document, whose values are counted at every alias again: a few aliases of aliases can expand to
        billions of values."""
        node = super().get_single_node()
        if node is None:
            return None
        pending: list[yaml.Node] = [node]
        seen = 0
        while pending:
            one = pending.pop()
            seen += 1
            if seen > NODES:
                raise _error(
                    f"it holds more than {NODES} values, with its aliases written out", node.start_mark
                )
            if isinstance(one, yaml.MappingNode):
                pending += [part for pair in one.value for part in pair]
            elif isinstance(one, yaml.SequenceNode):
                pending += one.value
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > 40:
            raise _error(
                f"a number of {len(node.value)} digits was given; give a smaller one", node.start_mark
            )
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key_node, _ in node.value:
            is_merge = key_node.tag.endswith(":merge")
            key = key_node.value if is_merge else self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or len(key) > 100 or UNPRINTABLE.search(key) or "\n" in key:
                raise _error(
                    f"the key {shown(key)} is not text of at most 100 letters; put it in quotes, or shorten "
                    "it",
                    key_node.start_mark,
                )
            if key in keys:
                raise _error(f"the key '{key}' is there twice", key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def parse_yaml(text: str, source: str) -> Any:
    """Strings, numbers, booleans, nulls, lists and mappings with text keys. Raises Fault, which names
    `source` and the place, for anything else, for repeated keys, and for what would exhaust memory or can't
    be written again."""
    if len(text) > YAML_BYTES:
        raise Fault(
            f"{source} has {len(text):,d} characters, expected at most {YAML_BYTES:,d}; give a smaller one"
        )
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Fault(
            f"{source} is not valid YAML{place}: {error.problem or error.context}; correct it there"
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML forbids; numbers that Python refuses
        raise Fault(f"{source} is not valid YAML: {' '.join(str(error).split())}; correct it") from None
    faults = list(_unusable(value))
    if faults:
        raise Fault(*(f"{source}: {fault}" for fault in faults))
    return value


def _unusable(value: Any, key: str = "") -> Iterator[str]:
    at = f"{key}: " if key else ""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _unusable(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _unusable(inner, key)
    elif isinstance(value, str) and UNPRINTABLE.search(value):
        yield f"{at}{shown(value)} holds a control character or half of a surrogate pair; write plain text"
    elif isinstance(value, int) and value.bit_length() > 64:
        yield f"{at}a number of more than 64 bits was given; give a smaller one"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{at}{value} was given, expected a finite number; give one"


def read_text(file: Path, expected: str) -> str:
    """The UTF-8 text of a file, without its byte order mark. Raises Fault where it can't be read."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise Fault(f"{file} can't be read ({error.strerror}); give {expected}") from None
    return decoded(data, str(file))


def decoded(data: bytes, source: str) -> str:
    """UTF-8 as text, without its byte order mark. Raises Fault, which names `source`, for other bytes."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        likely = "UTF-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "CP1252"
        raise Fault(
            f"{source}: byte {error.start}, in line {line}, is not UTF-8 ({error.reason}); save the file as "
            f"UTF-8, or convert it, perhaps from {likely}: iconv -f {likely} -t UTF-8 OLD > NEW"
        ) from None


def read_yaml(file: Path, expected: str) -> dict:
    """A YAML file that holds a mapping. Raises Fault with what is wrong with it."""
    value = parse_yaml(read_text(file, expected), str(file))
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise Fault(f"{file} holds {found}, expected a mapping of sections; give {expected}")
    return value


def read_json(file: Path, expected: str) -> Any:
    """The value in a JSON file. Raises Fault where it is not JSON, repeats a key within an object or nests
    too deeply.
    """
    return parse_json(read_text(file, expected), str(file), expected)


def read_items(file: Path, expected: str) -> Iterator[Any]:
    """The values of a JSON list, one after the other, of a file that need not fit into memory. Raises Fault
    with what `read_json` says of the file, and where it holds something other than a list; by then the values
    before the fault have been yielded."""
    count = 0
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            for item in _items(stream):
                yield item
                count += 1
        return
    except (OSError, ValueError, RecursionError):  # reading the whole file gives the better message
        pass
    whole = read_json(file, expected)
    if not isinstance(whole, list):
        raise Fault(f"{file} holds a {type(whole).__name__}, expected {expected}; correct it")
    yield from whole[count:]


def _items(stream: TextIO) -> Iterator[Any]:
    """The values of a JSON list in a stream. Raises ValueError or RecursionError where it holds another text,
    or a value of more than `ITEM` characters.

    `expects` is what may come next: "[" at the start, "value]" (a value or the end) after it, ",]" after a
    value, "value" after a comma."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
    text, at, expects = "", 0, "["
    while True:
        blank = _BLANK.match(text, at)  # always matches, if only the empty text
        at = blank.end() if blank else at
        if at == len(text):
            text, at = stream.read(READ), 0
            if not text:
                raise ValueError("it ends before its list does")
        elif expects == "value":
            value, text, at = _decoded(decoder, text, at, stream)
            yield value
            expects = ",]"
        elif text[at] == "]" and expects in (",]", "value]"):
            break
        elif expects == "value]":
            expects = "value"
        elif text[at] in expects:  # the "[" of the list, or a comma
            expects = "value]" if expects == "[" else "value"
            at += 1
        else:
            raise ValueError("it is not a list")
    if text[at + 1 :].strip() or stream.read().strip():
        raise ValueError("it goes on after its list")


def _decoded(decoder: json.JSONDecoder, text: str, at: int, stream: TextIO) -> tuple[Any, str, int]:
    """The value that begins at `at`, and the text and position after it. The amount of text is doubled until
    the value is complete, so that a long value is parsed only a few times."""
    while True:
        try:
            value, end = decoder.raw_decode(text, at)
            if end < len(text) and text[end] in " \t\n\r,]":  # else it may be a number that goes on
                return value, text, end
        except json.JSONDecodeError:
            pass
        if len(text) - at > ITEM:
            raise ValueError(f"a value of more than {ITEM:,d} characters, or none")
        more = stream.read(max(READ, len(text) - at))
        if not more:
            raise ValueError("it ends within a value")
        text, at = text[at:] + more, 0


def read_mapping(file: Path, expected: str) -> dict:
    """The object in a JSON file. Raises Fault where there is none."""
    value = read_json(file, expected)
    if not isinstance(value, dict):
        raise Fault(f"{file} holds a {type(value).__name__}, not an object; expected {expected}; correct it")
    return value


def parse_json(text: str, source: str, expected: str, long_numbers: bool = False) -> Any:
    """The value of a JSON text; faults are reported as by `read_json`. With `long_numbers` whole numbers of
    more than 20 digits are accepted, and stay text.
    """
    try:
        parse_int = _integer_or_text if long_numbers else _integer
        return json.loads(text, object_pairs_hook=_object, parse_int=parse_int)
    except json.JSONDecodeError as error:
        raise Fault(
            f"{source}: invalid JSON at line {error.lineno}, column {error.colno} ({error.msg}); expected "
            f"{expected}; correct it there"
        ) from None
    except ValueError as error:
        raise Fault(f"{source}: {error}; expected {expected}; correct it") from None
    except RecursionError:
        raise Fault(f"{source} is nested too deeply to be read; expected {expected}; correct it") from None


def _object(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(repeated)} is there twice in one object")
    return value


def _integer_or_text(digits: str) -> int | str:
    return digits if len(digits) > 20 else int(digits)


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)

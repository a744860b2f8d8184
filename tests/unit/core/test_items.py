"""Long JSON lists, read one value at a time. Oracle: json.loads of the whole text."""

import json
import random
import tracemalloc

import pytest

from codyra_llm.core import parsing
from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import read_items

LISTS = [
    [],
    [1, -2.5e10, 0.7246, True, None, ""],
    [{"a": 'é态"]},[\\', "b": [1, [2, {}]]}, [], [[]]],
    [{"prompt": "x" * 300, "answer": "😀"}] * 3,
]


@pytest.mark.parametrize("read", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("number", range(len(LISTS)))
def test_the_values_of_a_list(number, indent, read, tmp_path, monkeypatch):
    monkeypatch.setattr(parsing, "READ", read)
    file = tmp_path / "x.json"
    for plain in (True, False):
        text = json.dumps(LISTS[number], indent=indent, ensure_ascii=plain)
        file.write_text("\ufeff" + text + "\r\n", encoding="utf-8")
        assert list(read_items(file, "a list")) == LISTS[number]


@pytest.mark.parametrize("read", [1, 5, 1 << 20])
def test_damaged_ones_are_refused_as_a_whole(read, tmp_path, monkeypatch):
    """Whatever is cut off, left out or put in: the values of json.loads, or a Fault where it raises."""
    monkeypatch.setattr(parsing, "READ", read)
    file, draw = tmp_path / "x.json", random.Random(read)
    good = json.dumps(LISTS[2] + LISTS[1])
    for _ in range(300):
        at = draw.randrange(len(good))
        put = draw.choice(["", ",", "]", "[", "1", '"', "{", " "])
        text = good[:at] + put + good[at + draw.randrange(3) :] * (draw.random() < 0.9)
        file.write_text(text)
        try:
            whole = json.loads(text)
        except ValueError:
            whole = None
        if isinstance(whole, list):
            assert list(read_items(file, "a list")) == whole
        else:
            with pytest.raises(Fault):
                list(read_items(file, "a list"))


def test_memory_does_not_grow_with_the_list(tmp_path, monkeypatch):
    """A file of 6 MB in less than 2, a quarter of a megabyte at a time."""
    monkeypatch.setattr(parsing, "READ", 1 << 18)
    file, count = tmp_path / "x.json", 50_000
    file.write_text(json.dumps([{"prompt": "x" * 100}] * count))
    tracemalloc.start()
    assert sum(1 for _ in read_items(file, "a list")) == count
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 * parsing.READ < file.stat().st_size / 2

"""Which inputs are summed over in one pass."""

import pytest

from codyra_llm.methods.parts import inputs
from codyra_llm.methods.parts.inputs import portions

NAMES = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


@pytest.mark.parametrize(
    ("at_once", "expected"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (9, [4]), (None, [2, 1, 1])]
)
def test_inputs_go_by_count_or_by_what_memory_holds(at_once, expected, monkeypatch):
    """None: 100 numbers of 8 bytes; an input that alone is more goes alone."""
    monkeypatch.setattr(inputs, "AT_ONCE", 800)
    found = list(portions(NAMES, [36, 64, 36, 400], at_once))
    assert [len(portion) for portion in found] == expected
    assert [names for portion in found for names in portion] == NAMES


def test_nothing_is_no_portion():
    assert list(portions([], [], None)) == []

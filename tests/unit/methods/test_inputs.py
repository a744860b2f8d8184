"""Which inputs are summed over in one pass, and how much of their energy is kept."""

import pytest
from adapters import TASKS, a_task

from codyra_llm.config.methods.projection import InfLoraConfig
from codyra_llm.methods.parts import inputs
from codyra_llm.methods.parts.inputs import energy_at, portions

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


def test_the_share_of_energy_rises_by_the_same_amount_from_task_to_task():
    """From the first task on, so that it would reach the last one's value after the last of three."""
    config = InfLoraConfig(energy_first=0.9, energy_last=0.96)
    found = [energy_at(config, a_task(index)) for index in range(len(TASKS))]
    assert found == pytest.approx([0.9, 0.92, 0.94])

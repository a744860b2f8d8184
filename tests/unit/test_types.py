"""The count of pyright's errors may only fall; counting itself is a step of .ci/run."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "types.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="not a checkout")


@pytest.fixture(scope="module")
def counting():
    spec = importlib.util.spec_from_file_location("counting", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_more_errors_are_too_many(counting):
    assert counting.more({"a": 3, "b": 1}, {"a": 2, "b": 1}) == {"a": 1}
    assert counting.more({"new": 1}, {}) == {"new": 1}
    assert counting.more({"a": 1}, {"a": 2}) == {}


def test_what_is_noted_falls(counting):
    assert counting.lowered({"a": 3, "b": 1}, {"a": 2, "b": 4, "gone": 5}) == {"a": 2, "b": 1}
    assert counting.lowered({"new": 3, "codyra_llm/core": 1}, {}) == {"new": 3}


def test_clean_packages_have_no_allowance(counting):
    allowed = json.loads(counting.ALLOWED.read_text(encoding="utf-8"))
    assert not allowed.keys() & counting.CLEAN
    assert all((counting.ROOT / name).exists() for name in {*allowed, *counting.CLEAN})

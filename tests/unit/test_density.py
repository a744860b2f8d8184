"""One idea per line: the numbers of .ci/density.json may not rise, and nothing grows too long."""

import importlib.util
import json

import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="not a checkout")


def density():
    spec = importlib.util.spec_from_file_location("density", ROOT / ".ci" / "density.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_gets_denser():
    ci = density()
    allowed = json.loads((ROOT / ".ci" / "density.json").read_text())
    places = ci.found()
    over = ci.more(ci.counted(places), allowed)
    assert [one.where for one in places if f"{one.package} {one.kind}" in over] == []


def test_long_functions_and_files_have_no_allowance():
    allowed = json.loads((ROOT / ".ci" / "density.json").read_text())
    assert {key.split()[1] for key in allowed} <= {"comprehensions", "walrus"}


@pytest.mark.parametrize(
    "source, kinds",
    [
        ("a = [x for x in [y for y in z]]\n", ["comprehensions"]),
        ("def f():\n    a = [x for x in z]\n    b = [x for x in z]\n", []),
        ("for x in (y for y in z):\n    a = [x for x in z]\n", []),
        ("if any(x for x in z) and (n := len([y for y in z])):\n    pass\n", ["walrus", "comprehensions"]),
        ("def f():\n" + "    pass\n" * 59, []),
        ("def f():\n" + "    pass\n" * 60, ["function"]),
        ("a = 1\n" * 451, ["file"]),
    ],
)
def test_what_counts(source, kinds):
    assert sorted(one.kind for one in density().of_file(source, "p", "p/x.py")) == sorted(kinds)

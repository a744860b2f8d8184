"""A sample of the environments of `tests/environments.py`: one fresh process in which much is missing at
once, and a few that are forked.
"""

import pytest
from environments import CASES, FINE, TOGETHER, make, tried

QUICK = ["umask 077", "64 file descriptors", "read-only output, by mount", "names with a newline"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


def test_everything_at_once(made, tmp_path):
    assert tried(TOGETHER, made, tmp_path, 300) == "works"


@pytest.mark.parametrize("case", [case for case in CASES if case.name in QUICK], ids=lambda case: case.name)
def test_an_environment(case, made, tmp_path):
    found = tried(case, made, tmp_path, 120)
    if found.startswith("left out"):
        pytest.skip(found)
    assert found in FINE
    assert (found == "says so") == bool(case.says)


def test_every_kind_is_there():
    assert {case.name for case in CASES} >= set(QUICK) and len(CASES) > 30

"""A ~ in a path is the user's home, never a folder of that name."""

import pytest

from codyra_llm.commands.common import path
from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import expanded


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "runs")
    return tmp_path


def test_home_and_variables_are_written_out(home):
    assert expanded("~/a") == f"{home}/a" and expanded("a~/~") == "a~/~"
    assert path("~/out") == home / "out"
    assert load_recipe("quickstart", ["output=~/$WHERE/one"]).output == f"{home}/runs/one"


def test_the_home_of_nobody_is_refused():
    with pytest.raises(Fault, match="output: .*~no_such_user.*write the path out"):
        load_recipe("quickstart", ["output=~no_such_user/x"])
    with pytest.raises(Fault, match="write the path out"):
        path("~no_such_user/x")

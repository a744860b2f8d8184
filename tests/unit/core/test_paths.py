"""A ~ in a path is the user's home, never a folder of that name."""

import pytest

from codyra_llm.checkpoints.source import run_at
from codyra_llm.commands.common import path
from codyra_llm.config.overrides import find_recipe
from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import replacing, write_text
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


def test_a_recipe_in_the_home_is_found(home):
    (home / "own.yaml").write_bytes(find_recipe("quickstart").read_bytes())
    assert load_recipe("~/own.yaml") == load_recipe("quickstart")


def test_a_folder_in_the_home_is_no_recipe(home):
    (home / "own").mkdir()
    with pytest.raises(Fault, match="'~/own' is a folder, not a recipe"):
        load_recipe("~/own")


def test_only_a_run_has_tasks_after_an_at(home):
    (home / "run").mkdir()
    assert run_at("~/run@ONE") == (home / "run", "ONE") and run_at("~/run") == run_at("org/m@x") == (None, "")
    (home / "run@v2").mkdir()
    assert run_at(f"{home}/run@v2") == (None, "")


def test_a_link_stays_where_what_it_leads_to_is_replaced(tmp_path):
    """As of a checkpoint folder that lies on a larger disk."""
    (tmp_path / "disk" / "old").mkdir(parents=True), (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to("../disk/old")
    with replacing(tmp_path / "run" / "checkpoint") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert (tmp_path / "run" / "checkpoint").is_symlink()
    assert [file.name for file in (tmp_path / "disk" / "old").iterdir()] == ["new"]
    (tmp_path / "run" / "report.md").symlink_to("../disk/report.md")
    write_text(tmp_path / "run" / "report.md", "text")
    assert (tmp_path / "disk" / "report.md").read_text() == "text"
    assert sorted(file.name for file in (tmp_path / "disk").iterdir()) == ["old", "report.md"]

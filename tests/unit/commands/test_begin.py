"""`codyra-llm recipe init`: answers, defaults, mistakes, and a recipe that says of itself what is true."""

import io
import re

import pytest
import yaml
from helpers import call

from codyra_llm.config.draft import NEXT, SCHEMAS
from codyra_llm.config.recipe import load_recipe
from codyra_llm.config.registry import METHODS


def answered(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_the_defaults_are_a_recipe(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    code, out, err = call(capsys, "recipe", "init", file, "--yes")
    assert code == 0 and not err and "codyra-llm plan" in out
    recipe = load_recipe(file)
    assert (recipe.model.path, recipe.data.root, recipe.method.name) == ("mini", "mini", "codyra")
    assert (recipe.optim.batch_size, recipe.optim.micro_batch_tokens) in ((8, 4096), (32, 16384))
    assert recipe.output == "runs/mine"


def test_five_questions(tmp_path, capsys, monkeypatch, toy_stream):
    """A method that is none, and a device that is none, are asked for again."""
    answered(monkeypatch, "some/model", toy_stream, "seqlra", "seqlora", "tpu", "gpu 24", "runs/a b: #1")
    code, out, err = call(capsys, "recipe", "init", tmp_path / "mine.yaml")
    assert code == 0, err
    told = out + err
    assert "Did you mean 'seqlora'?" in told and "'tpu' is neither cpu nor gpu" in told
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.model.path, recipe.data.root) == ("some/model", str(toy_stream))
    assert (recipe.method.name, recipe.optim.batch_size) == ("seqlora", 24)
    assert recipe.tasks == ["ONE", "THREE", "TWO"]  # the folder's own, since it has not those of TRACE
    assert recipe.optim.micro_batch_tokens == 16384 and recipe.output == "runs/a b: #1"


def test_what_an_option_gives_is_not_asked(tmp_path, capsys, monkeypatch):
    answered(monkeypatch, "", "")
    words = ["--method", "ewc", "--device", "cpu 4", "--output", "x"]
    assert call(capsys, "recipe", "init", tmp_path / "mine.yaml", *words)[0] == 0
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.model.path, recipe.method.name, recipe.optim.batch_size, recipe.output) == (
        "mini",
        "ewc",
        4,
        "x",
    )


def test_a_benchmark_of_ones_own_is_told_from_trace(tmp_path, capsys):
    assert call(capsys, "benchmark", "new", tmp_path / "own")[0] == 0
    assert call(capsys, "recipe", "init", tmp_path / "a.yaml", "--yes", "--data", tmp_path / "own")[0] == 0
    assert load_recipe(tmp_path / "a.yaml").tasks == ["letters", "replies"]


def test_odd_names(tmp_path, capsys, monkeypatch):
    """A file is not a folder of tasks; a command that is shown can be pasted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    code, _, err = call(capsys, "recipe", "init", "a.yaml", "--yes", "--data", "mine.csv")
    assert code == 2 and "'mine.csv' is a file, and data is a folder; start one with `codyra-llm bench" in err
    _, out, _ = call(capsys, "recipe", "init", "my own.yaml", "--yes")
    assert out == "recipe: my own.yaml; check it with `codyra-llm plan 'my own.yaml'`\n"
    _, out, _ = call(capsys, "benchmark", "new", "my own")
    assert out == "benchmark: my own; try `codyra-llm plan 'my own/recipe.yaml'`\n"


@pytest.mark.parametrize("name", METHODS)
def test_what_is_commented_out_is_the_default(name, tmp_path, capsys):
    """With every comment taken off the recipe is the same, and each line has a meaning."""
    file = tmp_path / "mine.yaml"
    assert call(capsys, "recipe", "init", file, "--yes", "--method", name)[0] == 0
    text = file.read_text()
    lines = text.splitlines()[2:]
    assert all(re.search(r"^#? ?\w+:$|  # \S", line) for line in lines)
    (tmp_path / "all.yaml").write_text("\n".join(re.sub("^# ", "", line) for line in lines))
    whole = yaml.safe_load((tmp_path / "all.yaml").read_text())
    assert whole["method"].keys() == METHODS.settings(name).model_fields.keys()
    assert {section: set(NEXT[section]) - whole[section].keys() for section in SCHEMAS} == dict.fromkeys(
        SCHEMAS, set()
    )
    assert load_recipe(tmp_path / "all.yaml") == load_recipe(file)


def test_mistakes(tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.yaml"
    for words, told in (
        ((tmp_path / "x.json", "--yes"), "give one that ends in .yaml"),
        (
            (file, "--yes", "--method", "seqlra"),
            "--method: 'seqlra' is not a method. Did you mean 'seqlora'?",
        ),
        ((file, "--yes", "--device", "tpu"), "--device: 'tpu' is neither cpu nor gpu"),
        ((file, "--yes", "--device", "cpu 99999999"), "optim.batch_size: 99999999 is not valid"),
    ):
        code, _, err = call(capsys, "recipe", "init", *words)
        assert code == 2 and told in err, err
    answered(monkeypatch)
    code, _, err = call(capsys, "recipe", "init", file)
    assert code == 2 and "a question was not answered; answer it, or give --yes" in err
    assert not file.exists()
    file.write_text("")
    code, _, err = call(capsys, "recipe", "init", file, "--yes")
    assert code == 2 and "exists already" in err

"""A method and a metric of one's own in every command, and what a run made with them needs later."""

import shutil

import pytest
import yaml
from commands import forget_plugins
from helpers import call
from made_plugins import FILE

from codyra_llm.config import plugins
from codyra_llm.store.folder import RunFolder


@pytest.fixture(autouse=True)
def as_before():
    forget_plugins()
    yield
    forget_plugins()


@pytest.fixture(scope="module")
def place(tiny_llama, toy_stream, tmp_path_factory):
    """A plug-in, a benchmark that is scored by its metric, and a recipe."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "mine.py").write_text(FILE)
    benchmark = {
        "tasks": {name: {"metrics": ["length_gap", "exact_match"]} for name in ("ONE", "TWO")},
        "protocols": {"p": {"max_prompt_tokens": 32, "max_answer_tokens": 8, "max_new_tokens": 3}},
        "metrics": "../mine.py",
    }
    shutil.copytree(toy_stream, folder / "bench")
    (folder / "bench" / "benchmark.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))
    recipe = {
        "model": {"path": str(tiny_llama)},
        "data": {"benchmark": str(folder / "bench"), "epochs": 1},
        "method": {"name": "mine", "rank": 2},
        "optim": {"lr": 1e-2, "batch_size": 8},
        "eval": {"max_examples": 4},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def made(place):
    from codyra_llm.config.recipe import load_recipe
    from codyra_llm.experiment.run import run

    plugins.load([place / "mine.py"])
    done = run(load_recipe(place / "recipe.yaml"))
    forget_plugins()
    return done


def test_every_command_knows_it(place, made, capsys, tmp_path):
    option = ("--plugin", place / "mine.py")
    run = made.path
    for words in (
        ("plan", place / "recipe.yaml"),
        ("report", run),
        ("report", run, "--out", tmp_path / "r.csv"),
        ("status", run),
        ("export", run, tmp_path / "export"),
        ("generate", f"{run}@ONE", "Say A:", "--max-new-tokens", "2"),
        ("evaluate", f"{run}@TWO", "--out", tmp_path / "stage"),
        ("methods",),
    ):
        forget_plugins()
        code, _, err = call(capsys, *words, *option)
        assert code == 0, (words, err)
    rows = RunFolder(tmp_path / "stage").scores
    own = [row for row in made.scores if row.step == 2]
    assert [(row.task, row.score) for row in rows] == [(row.task, row.score) for row in own]
    card = (tmp_path / "export" / "README.md").read_text()
    assert (
        "method mine by --plugin mine.py, sha256 " in card
        and str(place) not in card.split("<details>")[0].split("In addition")[1]
    )


def test_a_run_says_what_it_needs(place, made, capsys, tmp_path):
    recorded = made.manifest["plugins"]
    assert recorded.keys() == {"method mine", "metric length_gap"}
    assert recorded["method mine"] == recorded["metric length_gap"]
    assert recorded["method mine"]["file"] == str(place / "mine.py")
    run = made.path
    for words in (("report", run), ("export", run, tmp_path / "x"), ("generate", run, "Say A:")):
        code, _, err = call(capsys, *words)
        assert (
            code == 2 and f"was made with method mine, which is not known here; give --plugin {place}" in err
        )
        assert "metric length_gap, which is not known here" in err


def test_another_version_of_the_file_is_not_gone_on_with(place, made, capsys, tmp_path):
    other = tmp_path / "mine.py"
    other.write_text(FILE + "\n# another\n")
    bench = shutil.copytree(place / "bench", tmp_path / "bench")
    words = [f"data.benchmark={bench}", f"data.root={bench}", "--plugin", other]
    code, _, err = call(capsys, "run", place / "recipe.yaml", *words)
    assert code == 2 and "another version of method mine" in err and "give the file as it was" in err
    code, _, err = call(capsys, "export", made.path, tmp_path / "out", "--plugin", other)
    assert code == 2 and "another version of method mine" in err


def test_another_method_is_not_run_in_its_folder(place, made, capsys, toy_stream):
    """Without the plug-in the run's own recipe can't be read; the user wants another folder, not the file."""
    shipped = ["method=seqlora", "data.benchmark=trace", f"data.root={toy_stream}", "data.tasks=[ONE,TWO]"]
    code, _, err = call(capsys, "run", place / "recipe.yaml", *shipped)
    assert code == 2 and "another version" not in err
    assert "belongs to another recipe: method.name was 'mine', now 'seqlora'; give another `output`" in err


def test_a_merged_checkpoint_needs_no_method(place, made, capsys, tmp_path, tiny_llama, toy_stream):
    """Of a run on shipped metrics: its export is a plain model. Oracle: the run's own last row."""
    from codyra_llm.config.recipe import load_recipe
    from codyra_llm.experiment.run import run

    plugins.load([place / "mine.py"])
    settings = ["data.benchmark=trace", f"data.root={toy_stream}", "data.tasks=[ONE,TWO]"]
    settings += ["data.max_prompt_tokens=32", "data.max_answer_tokens=8", "eval.max_new_tokens=3"]
    done = run(load_recipe(place / "recipe.yaml", [*settings, f"output={tmp_path / 'run'}"]))
    forget_plugins()
    code, out, err = call(capsys, "evaluate", done.path / "checkpoint", "--out", tmp_path / "scores")
    assert code == 0, err
    assert "made by method 'mine', which is not known here; scored as a plain model" in " ".join(out.split())
    found = {row.task: row.score for row in RunFolder(tmp_path / "scores").scores}
    assert found == {row.task: row.score for row in done.scores if row.step == 2}

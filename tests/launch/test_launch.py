"""Every shipped recipe runs as YAML and as a program; every launcher starts it; faults are sentences."""

import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from launches import free_port

import codyra_llm.recipes
from codyra_llm.cli import main

SHIPPED = Path(codyra_llm.recipes.__path__[0])
RECIPES = sorted(SHIPPED.glob("*.yaml"))
# Of quickstart's method: the thousand sequences that the base would write take longer than all else.
FEW = {"quickstart": ["method.samples=8"]}


@pytest.fixture
def small(tiny_llama, toy_stream, tmp_path):
    """Overrides that put a tiny model and two tiny tasks in a recipe's place."""
    return [
        f"model.path={tiny_llama}",
        f"data.root={toy_stream}",
        "data.tasks=[ONE,TWO]",
        "data.epochs=1",
        "data.max_prompt_tokens=32",
        "data.max_answer_tokens=8",
        "data.max_train_examples=4",
        "method.rank=2",
        "eval.max_new_tokens=2",
        "eval.max_examples=2",
        "general.data=null",
        f"output={tmp_path / 'run'}",
    ]


def finished(tmp_path) -> bool:
    return (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()


def called(*args) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in args])
    return caught.value.code


def test_there_are_recipes():
    assert {"quickstart", "trace_llama", "trace_gemma"} <= {path.stem for path in RECIPES}
    assert entry_points(group="console_scripts")["codyra-llm"].load() is main


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_yaml(recipe, small, tmp_path, capsys):
    small += FEW.get(recipe.stem, [])
    assert called("plan", recipe.stem, *small) == 0
    assert "ONE" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert called("run", recipe, *small, "--local_rank", "0") == 0
    assert finished(tmp_path)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_a_program(recipe, small, tmp_path, monkeypatch):
    """What `python recipe.yaml ...` does, without starting Python."""
    monkeypatch.setattr(sys, "argv", [str(recipe), *small, *FEW.get(recipe.stem, [])])
    with pytest.raises(SystemExit) as caught:
        exec(compile(recipe.read_text(encoding="utf-8"), str(recipe), "exec"), {"__name__": "__main__"})
    assert caught.value.code == 0 and finished(tmp_path)
    keys = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert list(keys)[0] == "_" and list(keys)[-1] == "launch"


def test_accelerate_launch(small, tmp_path, forked):
    """A recipe as a program of one process: `accelerate launch` starts `python RECIPE`."""
    options = ["--num_processes", "1", "--cpu", "--main_process_port", free_port()]
    words = [*options, SHIPPED / "trace_llama.yaml", *small]
    done = forked.module("accelerate.commands.launch", *words).wait(240)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path)


@pytest.mark.distributed
def test_a_launch_of_one_process(small, tmp_path, forked):
    """As torchrun's with one process: it gets a rank, and is alone."""
    done = forked.command("run", SHIPPED / "trace_llama.yaml", *small, processes=1)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path)


def test_all_faults_of_a_recipe_at_once(tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "model: {pth: x}\ndata: {root: /nowhere, tasks: [ONE]}\nmethod: codira\noptim: {lr: -1}\noutput: x\n",
        encoding="utf-8",
    )
    for command in ("run", "plan"):
        assert called(command, bad) == 2
        told = capsys.readouterr().err
        for part in (
            "'model.path' is missing",
            "unknown key 'model.pth'",
            "optim.lr: -1",
            "'codira'",
            "'codyra'",
        ):
            assert part in told
        assert "Traceback" not in told and all(line.startswith("error: ") for line in told.splitlines())


@pytest.mark.parametrize("config", sorted((SHIPPED / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_the_shipped_configs(config):
    """The keys are ones that the installed Accelerate knows: it refuses others."""
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(config))
    assert loaded.num_processes == 2 and loaded.num_machines == 1 + (config.stem == "two_nodes")
    stage = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}.get(config.stem)
    assert loaded.distributed_type == ("DEEPSPEED" if stage else "MULTI_GPU")
    assert loaded.deepspeed_config.get("zero_stage") == stage
    assert (loaded.deepspeed_config.get("offload_param_device") == "cpu") == config.stem.endswith("_offload")


def test_there_are_accelerate_configs():
    assert {path.stem for path in (SHIPPED / "accelerate").glob("*.yaml")} == {
        "ddp",
        "two_nodes",
        "zero1",
        "zero2",
        "zero3",
        "zero3_offload",
    }


def packaging() -> tuple[dict[str, Path], dict]:
    """Folders by package, and setuptools' table, of pyproject.toml."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    places, folders = listed["package-dir"], {}
    for package in listed["packages"]:
        top = max((name for name in places if f"{package}.".startswith(f"{name}.")), key=len)
        folders[package] = ROOT / places[top] / package[len(top) + 1 :].replace(".", "/")
    return folders, listed


def test_a_wheel_holds_every_package():
    """Each folder of Python files is named in pyproject.toml, and each name there is a folder."""
    folders, listed = packaging()
    named, tops = set(folders.values()), listed["package-dir"].values()
    assert all(folder.is_dir() for folder in named)
    assert {p.parent for top in tops for p in (ROOT / top).rglob("__init__.py")} <= named


def test_a_wheel_holds_every_file():
    """Recipes, benchmarks, templates, and the small base models with their weights."""
    folders, listed = packaging()
    shipped = {
        file
        for package, patterns in listed["package-data"].items()
        for pattern in patterns
        for file in folders[package].glob(pattern)
    }
    tops = [ROOT / top for top in listed["package-dir"].values()]
    there = {file for top in tops for file in top.rglob("*") if file.is_file()}
    data = {file for file in there if file.suffix not in (".py", ".pyc")}
    assert data and data <= shipped
    assert any(file.name == "model.safetensors" for file in shipped)

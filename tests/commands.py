"""Commands as pages and scripts write them, checked as far as they can be without being run."""

import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ROOT
from typer.main import get_command

from codyra_llm.cli import app
from codyra_llm.config import plugins
from codyra_llm.config.recipe import load_recipe
from codyra_llm.formats.pypi import SOURCES
from codyra_llm.sweep.spec import load_sweep


def check(words):
    """A command as far as it can be without being run: options parse, files exist, recipes and settings are
    valid.
    """
    settings = {}
    while re.match(r"[A-Z_]+=", words[0]):
        key, _, settings[key] = words[0].partition("=")
        words = words[1:]
    program = Path(words[0]).name
    assert program in CHECKS, f"nothing covers {words}"
    with pytest.MonkeyPatch.context() as patch, plugin():
        for key, value in settings.items():
            patch.setenv(key, value)
        CHECKS[program](words[1:])


def check_cli(arguments):
    """`codyra-llm`'s own parser; a command's name alone is a mention."""
    command = get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    if not arguments:
        return
    given = command.make_context(name, list(arguments)).params
    if "recipe" in given:
        load_recipe(given["recipe"], given["overrides"] or [])
    if name == "sweep":
        load_sweep(given["file"], given["overrides"] or [])
    if name == "get":
        assert given["name"] in {*SOURCES, "trace"}


def check_started(found):
    """What a launcher would start: a module, or a recipe or another file as a program."""
    module = getattr(found, "module", False)
    script, arguments = next(
        (vars(found)[key], vars(found)[more])
        for key, more in (("training_script", "training_script_args"), ("user_script", "user_args"))
        if key in vars(found)
    )
    check_python(["-m", script, *arguments] if module else [script, *arguments])


def check_python(arguments):
    script, *rest = arguments
    if script == "-m":
        script, *rest = rest
        assert find_spec(script), script
        if script in MODULES:
            MODULES[script](rest)
        return
    assert Path(script).is_file(), script
    if Path(script).suffix == ".yaml":
        check_cli(["run", script, *rest])


@contextmanager
def plugin(*files):
    """Within it these plug-ins are known, such as docs/extending.md's example, and afterwards none."""
    try:
        plugins.load(files)
        yield
    finally:
        forget_plugins()


def forget_plugins():
    for name in plugins._registered():
        plugins._drop(name)


def check_accelerate(arguments):
    from accelerate.commands.launch import launch_command_parser

    if arguments == ["launch"]:  # a mention
        return
    found = launch_command_parser().parse_args(arguments[1:])
    assert not found.config_file or Path(found.config_file).is_file(), found.config_file
    check_started(found)


def check_torchrun(arguments):
    from torch.distributed.run import get_args_parser

    check_started(get_args_parser().parse_args(arguments))


def check_deepspeed(arguments):
    from deepspeed.launcher.runner import parse_args

    check_started(parse_args(arguments))


def check_launch_script(arguments):
    """What launch.sh would become is checked in turn."""
    shown = subprocess.run(["./launch.sh", "--dry-run", *arguments], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    check(shlex.split(shown.stdout.rpartition("&& ")[2]))


def check_pip(arguments):
    command, *rest = arguments
    extras = set(re.findall(r"\w+", "".join(re.findall(r"\[(.*)\]", " ".join(rest)))))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert command == "install" and extras <= known.keys()
    assert "-c" not in rest or Path(rest[rest.index("-c") + 1]).is_file()


def check_sbatch(arguments):
    assert Path(arguments[0]).is_file()
    check_launch_script(arguments[1:])


CHECKS = {
    "codyra-llm": check_cli,
    "bench": lambda rest: check_cli(["bench", *rest]),
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "deepspeed": check_deepspeed,
    "launch.sh": check_launch_script,
    "pip": check_pip,
    "sbatch": check_sbatch,
    "python": check_python,
    Path(sys.executable).name: check_python,
    "env": check,
}
MODULES = {
    "codyra_llm": check_cli,
    "torch.distributed.run": check_torchrun,
    "deepspeed.launcher.runner": check_deepspeed,
    "accelerate.commands.launch": lambda rest: check_accelerate(["launch", *rest]),
}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


PROGRAMS = (
    "codyra-llm",
    "bench",
    "./launch.sh",
    "accelerate",
    "torchrun",
    "deepspeed",
    "sbatch",
    "python",
    "pip",
)


def named(command):
    return f"{command[0]}: {' '.join(command[1])}"

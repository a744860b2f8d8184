"""`codyra-llm recipe init`: five questions and a commented recipe."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from codyra_llm.commands.common import Plugins, console, path
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import write_text
from codyra_llm.core.gpus import has_nvidia_gpu


def recipe_init(
    file: Annotated[Path, typer.Argument(parser=path, metavar="FILE")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="hub id, folder, .gguf file, or mini")] = None,
    data: Annotated[
        str | None, typer.Option(help="folder of tasks, folder with a benchmark.yaml, or mini")
    ] = None,
    method: Annotated[str | None, typer.Option(help="as `codyra-llm methods` lists them")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|gpu [N]", help="where it runs, and examples per step")
    ] = None,
    output: Annotated[str | None, typer.Option(help="run folder")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="ask nothing, take the defaults")] = False,
    plugin: Plugins = None,
) -> None:
    """Write a commented recipe from five answers: model, data, method, device and batch, output. A question
    whose option is given is not asked.

    Example: codyra-llm recipe init mine.yaml --yes --method seqlora
    """
    from codyra_llm.config.draft import Answers, draft

    if file.exists():
        raise Fault(f"{file} exists already; give a new name")
    if file.suffix not in (".yaml", ".yml"):
        raise Fault(f"FILE: '{file}' is not a recipe's name; give one that ends in .yaml")

    def ask(option: str, given: str | None, question: str, default: str, check: Callable = str) -> Any:
        """What `check` makes of the answer: the option's value, the user's, or the default."""
        if given is None and not yes:
            given = _asked(question, default, check)
        try:
            return check(default if given is None else given)
        except typer.BadParameter as error:
            raise Fault(f"--{option}: {error}") from None

    path_of_model = ask("model", model, "Base model: hub id, folder, .gguf file, or mini", "mini")
    folder = ask("data", data, "Data: folder of tasks, or mini", "mini", _data)
    name = ask("method", method, "Method (`codyra-llm methods` lists them)", "codyra", _method)
    here = "gpu" if has_nvidia_gpu() else "cpu"
    kind, batch = ask("device", device, "Device, and examples per optimizer step", here, _device)
    out = ask("output", output, "Folder of the run", f"runs/{file.stem}")
    write_text(file, draft(Answers(path_of_model, folder, name, kind, batch, out), file))
    command = shlex.join(["codyra-llm", "plan", str(file)])
    console.print(f"recipe: {file}; check it with `{command}`", soft_wrap=True)


def _asked(question: str, default: str, check: Callable) -> str:
    """The user's answer; the question is asked again while the answer is not valid."""

    def checked(answer: str) -> str:
        check(answer)
        return answer

    try:
        return typer.prompt(question, default=default, value_proc=checked)
    except typer.Abort:
        raise Fault("recipe init: a question was not answered; answer it, or give --yes") from None


def _data(folder: str) -> str:
    if Path(folder).expanduser().is_file():
        raise typer.BadParameter(
            f"'{folder}' is a file, and data is a folder; start one with `codyra-llm benchmark new FOLDER`, "
            "whose benchmark.yaml names files"
        )
    return folder


def _method(name: str) -> str:
    from codyra_llm.config.plugins import has_method
    from codyra_llm.config.registry import METHODS

    if not has_method(name):
        raise typer.BadParameter(f"'{name}' is not a method.{nearest(name, METHODS)}")
    return name


def _device(answer: str) -> tuple[str, int]:
    """From `cpu` or `gpu`, perhaps with a number after it, the kind and the examples per step. Raises
    BadParameter for anything else."""
    from codyra_llm.config.draft import EXAMPLES

    kind, _, number = answer.strip().partition(" ")
    if kind not in EXAMPLES or (number and not number.strip().isdecimal()) or number.strip() == "0":
        raise typer.BadParameter(
            f"'{answer}' is neither cpu nor gpu; write e.g. 'gpu 32', 32 examples a step"
        )
    return kind, int(number) if number else EXAMPLES[kind]

"""The command line: its commands, and how their processes end."""

import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from codyra_llm.commands import begin, checkpoints, files, runs
from codyra_llm.core.errors import Fault, is_out_of_memory
from codyra_llm.core.terminal import log_printed, one_line, unbroken_output, write
from codyra_llm.core.version import __version__
from codyra_llm.runtime import cores, quiet, signals

COMPUTE = ("run", "evaluate", "generate")  # commands that keep the cores busy for long

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

data_app = typer.Typer(help="Get TRACE, check a folder of tasks, or write mini-TRACE.", no_args_is_help=True)
benchmark_app = typer.Typer(help="Your own task streams (docs/own_data.md).", no_args_is_help=True)
recipe_app = typer.Typer(help="Recipes, the files that describe runs.", no_args_is_help=True)
model_app = typer.Typer(help="Pretrained models for people without a hub account.", no_args_is_help=True)


class Command(TyperCommand):
    """A command whose usage says once that an argument may be repeated, where its name says so already."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [re.sub(r"( \.\.\.[\]}])\.\.\.$", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]


Traceback = Annotated[
    bool, typer.Option("--traceback", help="for an error, show where in the code it was raised")
]


def traceable(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the option --traceback added. `main` looks for it in the arguments, since an error may
    be raised before the command begins."""

    @wraps(command)
    def run(traceback: bool, **given: Any) -> None:
        command(**given)

    signature = inspect.signature(command)
    option = inspect.Parameter(
        "traceback", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Traceback
    )
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # pyright: ignore
    run.__annotations__ = {**command.__annotations__, "traceback": Traceback}
    return run


def _show_version(asked: bool) -> None:
    if asked:
        write(f"codyra-llm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    """Continual fine-tuning of LLaMA and Gemma on TRACE-like task streams."""


for command in (
    runs.run,
    runs.plan,
    runs.sweep,
    runs.report,
    runs.status,
    checkpoints.score,
    checkpoints.evaluate,
    checkpoints.generate,
    checkpoints.export,
    checkpoints.bench,
    runs.methods,
):
    app.command(cls=Command)(traceable(command))


data_app.command("check", cls=Command)(traceable(files.data_check))
data_app.command("get", cls=Command)(traceable(files.data_get))
data_app.command("make-mini", cls=Command)(traceable(files.make_mini))
benchmark_app.command("new", cls=Command)(traceable(files.benchmark_new))
recipe_app.command("init", cls=Command)(traceable(begin.recipe_init))
model_app.command("get", cls=Command)(traceable(files.model_get))

app.add_typer(recipe_app, name="recipe")
app.add_typer(data_app, name="data")
app.add_typer(benchmark_app, name="benchmark")
app.add_typer(model_app, name="model")


def _run(args: list[str] | None) -> None:
    """Run the command. A file of the user's that can't be read or written becomes a Fault, and so does
    running out of memory, wherever in the code it happens."""
    try:
        with quiet.without_chatter(), unbroken_output(), log_printed():
            given = sys.argv[1:] if args is None else args
            if given and given[0] in COMPUTE and "--help" not in given:
                cores.share()
            app(args=args, prog_name="codyra-llm")
    except OSError as error:
        if error.filename is None or error.errno is None or _is_installed(error.filename):
            raise
        raise Fault(
            f"{error.filename}: {error.strerror}; correct the path, or what may be done there "
            "(--traceback shows where it was raised)"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        raise Fault(
            f"memory ran out ({' '.join(str(error).split())[:200]}); lower optim.micro_batch_tokens or "
            "eval.batch_tokens, or turn on model.gradient_checkpointing; the same command continues from "
            "what is saved"
        ) from error


def _is_installed(path: Any) -> bool:
    """Whether a file belongs to this package or to another that is installed: if one of those can't be read,
    the user is not to blame."""
    here, packages = Path(__file__).parent, Path(typer.__file__).parents[1]
    found = Path(os.fsdecode(path)).absolute() if isinstance(path, str | bytes | os.PathLike) else None
    return found is not None and (found.is_relative_to(here) or found.is_relative_to(packages))


def main(args: list[str] | None = None) -> None:
    """Entry point. A Fault becomes its sentences on standard error and exit code 2, and a traceback with
    --traceback alone. Any other error is a fault of the program: it keeps its traceback and says so."""
    signals.note_parent()
    try:
        _need_utf8_names()
        _run(args)
    except Fault as fault:
        _announce_end(2)
        rank = int(os.environ.get("RANK", "0"))
        if rank and _first_reports_it():
            _end(2)
        if "--traceback" in (sys.argv[1:] if args is None else args):
            fault.__suppress_context__ = False  # show the error that became a sentence too
            traceback.print_exception(fault)
        for message in fault.messages:
            who = f"error (rank {rank})" if rank else "error"
            print(f"{who}: {one_line(message)}", file=sys.stderr, flush=True)
        _end(2)
    except signals.Stopped as stopped:
        _end_if_others_are_gone(keeper=False)
        signals.say_stopped(str(stopped))
        _end(signals.EXIT)
    except Exception as error:
        _end_if_others_are_gone()
        _announce_end(1)
        error.add_note(
            "This is a mistake of codyra_llm, of a plug-in or of a library, not of what you gave: please "
            "report it with these lines and the command."
        )
        raise


def _need_utf8_names() -> None:
    """Raises Fault where this process can't name every file: a task "Größe" would then not be
    found."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        raise Fault(
            f"file names are {encoding} here, by the locale and the environment, expected utf-8; set "
            "PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8"
        )


def _first_reports_it() -> bool:
    """Wait up to 15 s for rank 0 to report this error. True if it did: the others have its exit code, or,
    where the ranks have not met yet, the launcher sent SIGTERM."""
    before, last = signals.asked(), time.monotonic() + 15
    heartbeat = _module("heartbeat")
    while time.monotonic() < last:
        if (heartbeat and heartbeat.first_ended() == 2) or (signals.asked() and not before):
            return True
        time.sleep(0.1)
    return False


def _announce_end(code: int) -> None:
    """Tell the other processes of the launch that this one ends."""
    heartbeat = _module("heartbeat")
    if heartbeat:
        heartbeat.leave(code)


def _end_if_others_are_gone(keeper: bool = True) -> None:
    """If another process is gone, end this one and name that one: it broke a connection, or made the launcher
    end all. `keeper`: whether the process that keeps the store counts, if it is gone."""
    world, heartbeat = int(os.environ.get("WORLD_SIZE", "1")), _module("heartbeat")
    if world > 1 and heartbeat:
        verdict = heartbeat.lost(world, keeper)
        if verdict:
            heartbeat.end(verdict)


def _end(code: int) -> None:
    """End this process with the exit code: at once if it belongs to a process group."""
    launch = _module("launch")
    if launch:
        launch.leave(code)
    sys.exit(code)


def _module(name: str) -> Any:
    """A module of `runtime`, where this process has imported it: they are slow to import."""
    return sys.modules.get(f"codyra_llm.runtime.{name}")

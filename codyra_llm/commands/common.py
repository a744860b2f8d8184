"""What commands share: the console, and the arguments that mean the same in several of them."""

from pathlib import Path
from typing import Annotated

import typer

from codyra_llm.core.parsing import as_path as path
from codyra_llm.core.terminal import console as console

PathArg = Annotated[Path, typer.Argument(parser=path, metavar="PATH")]

RecipeArg = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a recipe file, or the name of a shipped one")
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE ...",
        help="settings that override the recipe's, e.g. method=seqlora optim.lr=1e-4 data.epochs=2",
    ),
]


def _load_plugins(files: list[Path] | None) -> list[Path] | None:
    """Run the files, so that their methods and metrics are known before the command begins."""
    from codyra_llm.config import plugins

    plugins.load(files or [])
    return files


Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        parser=path,
        metavar="FILE",
        callback=_load_plugins,
        help="a Python file with methods or metrics of your own, which is run; may be given several times",
    ),
]

# Launchers add it to every process; nothing here reads it.
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]

DeepSpeedConfig = Annotated[
    Path | None,
    typer.Option(
        "--deepspeed_config",
        "--deepspeed-config",
        metavar="FILE.json",
        help="ZeRO under `deepspeed` or torchrun, which run as DDP without it; `accelerate launch` has "
        "configs of its own",
    ),
]

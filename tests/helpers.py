"""What test files share: a recipe on tiny models, runs of it, and the command line in this process."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from codyra_llm.cli import main
from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.experiment import run as runs
from codyra_llm.report.status import show
from codyra_llm.store.folder import RunFolder

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def tiny_recipe(model, stream, out, **changes):
    raw = {
        "model": {"path": str(model)},
        "data": {"root": str(stream), "tasks": ["ONE", "TWO"], "epochs": 2},
        "method": {"name": "codyra", "rank": 4, "importance_lr": 0.02},
        "optim": {"lr": 1e-2, "batch_size": 8},
        "eval": {"max_new_tokens": 4},
        "output": str(out),
    }
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return parse_recipe(override(raw, overrides))


def weights(folder):
    return {f.name: load_file(f) for f in sorted((folder.path / "updates").glob("*.safetensors"))}


def logits(model, seed=0):
    ids = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def learnt(model, stream, out, method, epochs=2, **changes):
    raw = {
        "model": {"path": str(model)},
        "data": {"root": str(stream), "tasks": ["ONE", "TWO"], "epochs": epochs, "max_prompt_tokens": 12},
        "method": method,
        "optim": {"lr": 1e-2, "batch_size": 4},
        "eval": {"max_new_tokens": 3, "max_examples": 5},
        "output": str(out),
        **changes,
    }
    return runs.run(parse_recipe(raw))


def export(run, out, *options):
    with pytest.raises(SystemExit) as caught:
        main(["export", str(run.path), str(out), *options])
    assert caught.value.code == 0
    return out


def main_ends(args: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return ended.value.code or 0


def said(found: dict) -> list[str]:
    out = StringIO()
    show(found, Console(file=out, width=40))
    return out.getvalue().splitlines()


def like(asked, tmp_path) -> RunFolder:
    """A recipe as that of `straight` in a file, and the folder that its run will have."""
    own = asked.model_copy(update={"output": str(tmp_path / "run")})
    (tmp_path / "recipe.json").write_text(json.dumps(own.model_dump(mode="json")))
    return RunFolder(tmp_path / "run")


def call(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in args])
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return caught.value.code, out.out, out.err


def write_task(folder, rows, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")

"""What each entry to the package imports: seconds of every start, counted in modules since clocks vary."""

import json
import subprocess
import sys

import pytest
import yaml

# By the time that they take, or since a machine may be without them.
SLOW = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "evaluate",
    "gguf",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "nltk",
    "openai",
    "pandas",
    "peft",
    "pyarrow",
    "sacrebleu",
    "scipy",
    "scipy.stats",
    "sklearn",
    "tensorboard",
    "torch",
    "transformers",
}
# torch and what transformers' own models import.
MODELS = {"accelerate", "huggingface_hub", "scipy", "torch", "transformers"}
PROGRAM = """
import json, sys
{}
print(json.dumps([name for name in {} if name in sys.modules]))
"""


def imported(code: str) -> set[str]:
    """Those of SLOW that a fresh process has imported after `code`."""
    program = PROGRAM.format(code, sorted(SLOW))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def after_command(*arguments: object, then: str = "") -> set[str]:
    """The same after a command that ends well, and some more code."""
    words = [str(argument) for argument in arguments]
    return imported(
        "from codyra_llm.cli import main\n"
        f"try:\n    main({words!r})\n"
        f"except SystemExit as end:\n    assert not end.code, end.code\n{then}"
    )


def test_the_package():
    assert imported("import codyra_llm") == set()
    assert imported("import codyra_llm.cli") == set()


@pytest.mark.parametrize("module", ["codyra_llm.metrics.text", "codyra_llm.config.registry"])
def test_text_and_settings(module):
    assert imported(f"import {module}") == set()


def test_a_recipe_is_validated():
    code = "from codyra_llm.config.recipe import load_recipe\nload_recipe('quickstart', []).resolved()"
    assert imported(code) == set()


def test_every_method_is_validated():
    code = (
        "from codyra_llm.config.recipe import load_recipe\n"
        "from codyra_llm.config.registry import METHODS\n"
        "for name in METHODS:\n    load_recipe('quickstart', [f'method={name}']).resolved()\n"
    )
    assert imported(code) == set()


def test_score(tmp_path):
    rows = [{"prompt": "p.", "prediction": "A", "answer": "A"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    assert after_command("score", "FOMC", tmp_path / "rows.json") == set()
    assert after_command("score", "20Minuten", tmp_path / "rows.json") == {"sacrebleu"}  # its SARI


def test_plan_and_run(tiny_llama, toy_stream, tmp_path):
    """Extras are left to recipes that ask: notebooks can't start processes after bitsandbytes is imported.
    What the imports made is not collected again, what the command makes is."""
    recipe = {
        "model": {"path": str(tiny_llama)},
        "data": {"root": str(toy_stream), "tasks": ["ONE"]},
        "method": {"name": "codyra", "rank": 2},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    then = (
        "import gc\nassert gc.isenabled() and gc.get_freeze_count() > 300_000\n"
        "import codyra_llm.experiment.run"
    )
    assert after_command("plan", tmp_path / "recipe.yaml", then=then) == MODELS


def test_what_tells_of_runs(run):
    folder = run({"name": "seqlora"}).path
    assert after_command("status", folder) == set()
    # The run's method is asked whether it trains; its file imports torch.
    assert after_command("report", folder) <= {"huggingface_hub", "torch", "transformers"}


def test_a_module_that_is_imported_is_found():
    assert imported("import scipy.stats") == {"scipy", "scipy.stats"}

"""The lowest versions that pyproject.toml allows, installed and tried: `python .ci/floors.py [FOLDER]`.

Makes a virtual environment in FOLDER (default: one that is removed afterwards), installs every requirement of
the package and of the extras that tests use at its floor, says what else pip chose, and runs a part of the
tests and a short quickstart with it. Exits with 1 where something fails: then a floor is to be raised.
"""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
EXTRAS = ("deepspeed", "peft", "bitsandbytes", "general", "judge", "tensorboard", "figures", "test")
LEFT_OUT = ("ruff", "pyright")  # they read the code and run none of it
FLOOR = re.compile(r"^([\w-]+)(\[[\w,]+\])?>=([\w.]+)$")
TESTS = [
    *(f"tests/unit/{part}" for part in ("lora", "metrics", "core", "config", "store", "models", "evaluate")),
    "tests/runs/test_run.py",
    "tests/runs/test_trackers.py",
    "tests/runs/test_quantized_run.py",
]
QUICKSTART = ["recipes/quickstart.yaml", "data.tasks=[C-STANCE,FOMC]", "data.epochs=1", "eval.max_examples=8"]


def floors() -> list[str]:
    """`name[extras]==floor` of every requirement. Exits where one has another form than `name>=version`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"]]
    for extra in EXTRAS:
        asked += project["optional-dependencies"][extra]
    found = {}
    for requirement in asked:
        match = FLOOR.match(requirement)
        if match is None:
            sys.exit(f"pyproject.toml: '{requirement}' has no floor of the form name>=version")
        name, extras, version = match.groups()
        if name not in LEFT_OUT:
            found[name] = f"{name}{extras or ''}=={version}"
    return list(found.values())


def run(*command: object, **environment: str) -> None:
    """Run a command in the checkout; exits with 1 where it fails."""
    print("+", *command, flush=True)
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=os.environ | environment)
    if done.returncode:
        sys.exit(1)


def main(folder: Path) -> None:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    # DeepSpeed's operators would be compiled here, and nothing needs them.
    run(*pip, "install", "--quiet", *floors(), DS_BUILD_OPS="0")
    run(*pip, "install", "--quiet", "--no-deps", "--editable", ".")
    run(*pip, "list")
    run(python, "-m", "pytest", "-p", "no:cacheprovider", "--numprocesses", "2", *TESTS, HF_HUB_OFFLINE="1")
    with TemporaryDirectory() as out:
        run(python, "-m", "codyra_llm", "run", *QUICKSTART, f"output={out}/run", HF_HUB_OFFLINE="1")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with TemporaryDirectory() as made:
            main(Path(made))

"""All readers on all exports: `matrix.py FOLDER NAME=PYTHON ...` after exports.py has written FOLDER, e.g.

    python tests/readers/matrix.py work transformers=python transformers=env-tf4/bin/python \\
        llama.cpp=env-llama/bin/python

Writes what they found to figures.json next to this file, over what it says of the same cells, and the table
of docs/serving.md from it.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FIGURES, PAGE = HERE / "figures.json", HERE.parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- measured: readers -->\n", "<!-- end -->"
SCRIPTS = {"transformers": "read_transformers.py", "llama.cpp": "read_llamacpp.py"}
EXPORTS = ("merged", "peft", "peft-rank", "gguf")


def read(folder: Path, kind: str, python: str) -> list[dict]:
    """What one environment's readers make of a model's exports, each cell with the reader's version."""
    command = [python, str(HERE / SCRIPTS[kind]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    cells = told.pop("cells")
    for cell in cells:
        cell["by"] = _called(cell["reader"], told)
    return cells


def _called(reader: str, versions: dict[str, str]) -> str:
    if reader == "llama.cpp":
        return f"llama.cpp (xllamacpp {versions['xllamacpp']})"
    transformers = f"transformers {versions['transformers']}"
    return transformers if reader == "transformers" else f"PEFT {versions['peft']}, {transformers}"


def table(figures: dict) -> str:
    """The matrix in Markdown: rows are a model's export, columns the readers."""
    readers = list(dict.fromkeys(cell["by"] for cells in figures["models"].values() for cell in cells))
    lines = [f"| model, export | {' | '.join(readers)} |", "|---|" + "---|" * len(readers)]
    for model, cells in figures["models"].items():
        for export in EXPORTS:
            found = {cell["by"]: shown(cell) for cell in cells if cell["export"] == export}
            row = " | ".join(found.get(reader, "-") for reader in readers)
            lines.append(f"| {model}, {export.replace('-', ' --')} | {row} |")
    return "\n".join(lines) + "\n"


def shown(cell: dict) -> str:
    if "error" in cell:
        return f"refuses: {cell['error'][:60]}"
    wrong = [name for name in ("tokens", "answers") if not cell[name]]
    return f"{cell['logits']:.1g}" + (f", other {' and '.join(wrong)}" if wrong else "")


def write_page(figures: dict) -> str:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + table(figures) + "\n" + END + rest.partition(END)[2]


def main(folder: Path, environments: list[str]) -> None:
    models = json.loads(FIGURES.read_text(encoding="utf-8"))["models"] if FIGURES.is_file() else {}
    for place in sorted(path for path in folder.iterdir() if (path / "expected.json").is_file()):
        known = {(cell["export"], cell["by"]): cell for cell in models.get(place.name, [])}
        for given in environments:
            kind, _, python = given.partition("=")
            known |= {(cell["export"], cell["by"]): cell for cell in read(place, kind, python)}
            print(place.name, given, "read", flush=True)
        models[place.name] = list(known.values())
    figures = {"machine": f"{platform.machine()}, CPU", "models": models}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(write_page(figures), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

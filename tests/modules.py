"""The files of the package, by the names under which they are imported."""

from pathlib import Path

from helpers import ROOT

TOP = {
    "codyra_llm": ROOT / "codyra_llm",
    "codyra_llm.benchmarks": ROOT / "benchmarks",
    "codyra_llm.recipes": ROOT / "recipes",
}


def modules() -> dict[str, Path]:
    """By dotted name, the files of the package as it is installed."""
    found = {}
    for name, folder in TOP.items():
        for path in folder.rglob("*.py"):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found

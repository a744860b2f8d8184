"""Packages import downwards only, by every import statement, deferred and typing-only too; and no circles."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT
from modules import modules

# From the ground up. A package may import from itself and from what stands before it.
LAYERS = [
    "codyra_llm.benchmarks",
    "codyra_llm.benchmarks.olora",
    "codyra_llm.benchmarks.superni",
    "codyra_llm.benchmarks.trace",
    "codyra_llm.benchmarks.trace.general",
    "codyra_llm.recipes",
    "codyra_llm.metrics",
    "codyra_llm.core",
    "codyra_llm.config.methods",
    "codyra_llm.config",
    "codyra_llm.runtime",
    "codyra_llm.models.families",
    "codyra_llm.models.attention",
    "codyra_llm.models",
    "codyra_llm.formats",
    "codyra_llm.data",
    "codyra_llm.lora",
    "codyra_llm.store",
    "codyra_llm.methods",
    "codyra_llm.methods.parts",
    "codyra_llm.methods.sequential",
    "codyra_llm.methods.baselines",
    "codyra_llm.methods.regularised",
    "codyra_llm.methods.projection",
    "codyra_llm.methods.prompts",
    "codyra_llm.methods.experts",
    "codyra_llm.train",
    "codyra_llm.evaluate",
    "codyra_llm.evaluate.judging",
    "codyra_llm.report",
    "codyra_llm.report.html",
    "codyra_llm.benchmarks.trace.mini",
    "codyra_llm.benchmarks.starter",
    "codyra_llm.experiment",
    "codyra_llm.checkpoints",
    "codyra_llm.sweep",
    "codyra_llm.bench",
    "codyra_llm.bench.gpu",
    "codyra_llm.commands",
    "codyra_llm",
]
MOST_MODULES = 12  # of a package
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="not a checkout")


def package(module: str, path: Path) -> str:
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """By module, the modules of the project that it imports, wherever the statement stands."""
    found = defaultdict(set)
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import hides where it leads; write it out"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found[module] |= {name if name in known else node.module for name in names} & known.keys()
            elif isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names} & known.keys()
    return found


def test_imports_go_down():
    known = modules()
    rank = {name: number for number, name in enumerate(LAYERS)}
    assert {package(module, path) for module, path in known.items()} == set(LAYERS)
    upward = [
        f"{module} imports {other}"
        for module, others in imports(known).items()
        for other in others
        if rank[package(other, known[other])] > rank[package(module, known[module])]
    ]
    assert not upward, upward


def test_nothing_imports_the_judge():
    """An extra, loaded by its name where a recipe names an endpoint; a run without it works without it."""
    importing = {
        module for module, others in imports(modules()).items() for other in others if "judging" in other
    }
    assert importing
    assert not [name for name in importing if not name.startswith("codyra_llm.evaluate.judging")]


def test_there_are_no_circles():
    graph = {module: others - {module} for module, others in imports(modules()).items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_package_is_crowded():
    sizes = defaultdict(int)
    for module, path in modules().items():
        if path.name != "__init__.py":
            sizes[package(module, path)] += 1
    assert {name: size for name, size in sizes.items() if size > MOST_MODULES} == {}

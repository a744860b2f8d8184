"""Importing the package is not work: it changes nothing that the rest of the process shares."""

import ast
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from modules import TOP, modules

# What may be called where a module is imported: what only makes or completes an object of that module.
OWN = {"codyra_llm.cli", "codyra_llm.core.parsing", "codyra_llm.__main__"}


def bare_calls(path: Path) -> list[str]:
    """The calls at the top level of a file whose result nobody keeps."""
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    return [
        f"{path.relative_to(ROOT)}:{statement.lineno}: {ast.unparse(statement)}"
        for statement in statements
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    ]


def test_no_module_calls_for_an_effect_when_it_is_imported():
    assert set(TOP) == {"codyra_llm", "codyra_llm.benchmarks", "codyra_llm.recipes"}
    found = [call for name, path in modules().items() if name not in OWN for call in bare_calls(path)]
    assert found == []


def test_a_call_for_an_effect_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("import csv\ncsv.field_size_limit(1)\nkept = csv.field_size_limit()\n")
    assert bare_calls(tmp_path / "a.py") == ["a.py:2: csv.field_size_limit(1)"]


pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="not a checkout")

"""docs/quickstart.ipynb, executed from end to end as a reader would."""

import os
import re
import sys

import nbformat
import pytest
from commands import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
# The same in less time: fewer prompts are answered, and fewer texts written by the base.
QUICK = {
    '"eval.max_examples=40"': '"eval.max_examples=10"',
    "settings + own)": 'settings + own + (["method.samples=200"] if "drift" in method else []))',
}
pytestmark = pytest.mark.skipif(not NOTEBOOK.is_file(), reason="not a checkout")


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:  # what a reader's machine gives differs, so that none is kept
        assert not cell.get("outputs") and cell.get("execution_count") is None
    for written, quicker in QUICK.items():
        (cell,) = [cell for cell in notebook.cells if written in cell.source]
        cell.source = cell.source.replace(written, quicker)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    tables = [output.data["text/markdown"] for output in shown if "text/markdown" in output.get("data", {})]
    plain, ours = re.findall(
        r", after \| FOMC \| C-STANCE \| NumGLUE-cm\n.*?, bwt (\S+)", tables[0], re.DOTALL
    )
    assert float(plain) < float(ours) - 20  # the point of the page
    assert any("image/svg+xml" in output.get("data", {}) for output in shown)
    told = "".join(output.text for output in notebook.cells[-2].outputs if output.output_type == "stream")
    assert re.search(r"\nsays: +\d+$", told.strip())

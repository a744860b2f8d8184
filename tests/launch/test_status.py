"""Where a run stands, as its folder says it at every moment; what it would go on with is what it then
does.
"""

import json
import subprocess
import sys

import pytest

from codyra_llm.report.status import look


@pytest.fixture
def folder(tmp_path):
    """A run's folder as it is shortly after its begin."""
    resolved = {"data": {"tasks": ["ONE"]}, "method": {"name": "codyra"}}
    (tmp_path / "recipe.json").write_text(json.dumps(resolved))
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": {"base": [], "ONE": ["ONE"]}}))
    return tmp_path


def test_the_command_is_quick_and_speaks_json(folder):
    code = (
        "import sys; from codyra_llm.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "status", str(folder), "--json"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) == look(folder)

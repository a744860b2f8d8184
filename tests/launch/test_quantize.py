"""Packed bases: what a packed weight stands for, training on it against the same weights unpacked, and whole
runs.
"""

import pytest
import yaml
from forked import zero
from launches import assert_same_run, sections

from codyra_llm.config.recipe import load_recipe
from codyra_llm.experiment import run


@pytest.fixture(scope="module")
def quantised_recipe(tiny_llama, toy_stream, tmp_path_factory):
    """A recipe file, and the run of one process."""
    folder = tmp_path_factory.mktemp("quantised")
    raw = sections(tiny_llama, toy_stream, "codyra")
    raw["model"]["quantization"], raw["method"]["targets"] = "nf4", ["q_proj", "v_proj", "down_proj"]
    (folder / "nf4.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder / "nf4.yaml", run.run(load_recipe(folder / "nf4.yaml", [f"output={folder / 'one'}"])).path


@pytest.mark.distributed
def test_ddp(quantised_recipe, tmp_path, forked):
    file, one = quantised_recipe
    done = forked.command("run", file, f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert_same_run(one, tmp_path / "run", 0)


@pytest.mark.distributed
def test_zero_2(quantised_recipe, tmp_path, forked):
    file, one = quantised_recipe
    done = forked.command("run", file, f"output={tmp_path / 'run'}", environment=zero("zero2"))
    assert done.returncode == 0, done.stderr
    assert_same_run(one, tmp_path / "run", 2)

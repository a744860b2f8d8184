"""A finished recipe that is run again: its final model is written anew, whatever has happened to it."""

import os

import pytest
from helpers import learnt

from codyra_llm.experiment import run as runs

MERGED = {"name": "seqlora", "rank": 2}
STAGE = {"name": "pp", "length": 2, "mlp": False}


@pytest.fixture(scope="module")
def finished(tiny_llama, toy_stream, tmp_path_factory):
    """Function from a method's section to its finished run, each made once."""
    made = {}

    def run(method):
        if method["name"] not in made:
            out = tmp_path_factory.mktemp("runs") / method["name"]
            made[method["name"]] = learnt(tiny_llama, toy_stream, out, method, epochs=1)
        return made[method["name"]]

    return run


def half(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    """One bit of the last weight: the file is as long as before, and as easy to read."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def append(file):
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")


@pytest.mark.parametrize(
    "method, name, change",
    [
        (MERGED, "model.safetensors", flip),
        (MERGED, "model.safetensors", half),
        (MERGED, "model.safetensors", os.remove),
        (MERGED, "tokenizer.json", os.remove),
        (MERGED, "generation_config.json", os.remove),
        (MERGED, "codyra_llm.json", append),
        (MERGED, "README.md", append),
        (STAGE, "state/01.safetensors", flip),
        (STAGE, "state/01.safetensors", half),
        (STAGE, "recipe.json", os.remove),
        (STAGE, "README.md", append),
    ],
)
def test_what_was_lost_or_told_otherwise_is_written_again(method, name, change, finished):
    run = finished(method)
    file = run.path / "checkpoint" / name
    content = file.read_bytes()
    change(file)
    runs.run(run.recipe)
    assert file.read_bytes() == content


def test_a_setting_that_changes_no_result_is_told(finished):
    run = finished(MERGED)
    lineage = run.path / "checkpoint" / "codyra_llm.json"
    before = lineage.read_text(encoding="utf-8")
    assert '"keep": 1' in before
    save = run.recipe.save.model_copy(update={"keep": 2})
    again = runs.run(run.recipe.model_copy(update={"save": save}))
    assert lineage.read_text(encoding="utf-8") == before.replace('"keep": 1', '"keep": 2')
    assert again.path == run.path

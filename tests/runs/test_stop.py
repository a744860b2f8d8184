"""A process that is asked to stop saves, ends with a code of its own, and the same command resumes it to the
same end.
"""

import json
import logging
import shutil
import sys

import pytest
from helpers import like, tiny_recipe

from codyra_llm.config.recipe import load_recipe
from codyra_llm.config.sections import SaveSection
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import read_jsonl
from codyra_llm.data.batches import Batch
from codyra_llm.evaluate import generate
from codyra_llm.experiment import learning, run
from codyra_llm.runtime import signals
from codyra_llm.store.checksums import Seals
from codyra_llm.store.folder import RunFolder


@pytest.fixture(scope="module")
def straight(tiny_llama, toy_stream, tmp_path_factory):
    """A run that nobody stops, and the recipe for others like it."""
    out = tmp_path_factory.mktemp("runs")
    asked = tiny_recipe(tiny_llama, toy_stream, out / "straight", data__epochs=6, checkpoint=False)
    return asked, run.run(asked)


@pytest.mark.parametrize("place", ["generation", "a method's passes", "consolidation"])
def test_asked_outside_of_training(place, straight, tmp_path, monkeypatch, tiny_llama, toy_stream):
    asked, other = straight
    if place == "a method's passes":  # the Fisher's, after the last step
        asked = tiny_recipe(tiny_llama, toy_stream, tmp_path / "straight", method="ewc", checkpoint=False)
        other = run.run(asked)
    folder = like(asked, tmp_path)
    where = {
        "generation": (generate, "generate_ids"),
        "a method's passes": (Batch, "cross_entropy"),
        "consolidation": (learning, "update_report"),
    }[place]
    action = getattr(*where)

    def asking(*arguments, **options):
        if place != "a method's passes" or sys._getframe(2).f_code.co_name == "_sum":
            signals.ask("a test")
        return action(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
        patch.setattr(signals, "_asked", [])
        patch.setattr(*where, asking)
        run.run(load_recipe(tmp_path / "recipe.json"))
    assert not (folder.path / "lease.json").exists()
    run.run(load_recipe(tmp_path / "recipe.json"))
    assert (folder.path / "scores.jsonl").read_bytes() == (other.path / "scores.jsonl").read_bytes()


@pytest.mark.parametrize("fault", ["a byte", "a file", "the mark", "other updates"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    fault, straight, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "codyra_llm")
    asked, other = straight
    asked = asked.model_copy(update={"save": SaveSection(minutes=1e-9, keep=2)})
    folder = like(asked, tmp_path)
    log = RunFolder.log
    with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
        patch.setattr(signals, "_asked", [])
        patch.setattr(RunFolder, "log", lambda f, row: (log(f, row), row.step == 4 and signals.ask("a test")))
        run.run(load_recipe(tmp_path / "recipe.json"))
    before, last = sorted((folder.path / "progress").iterdir())
    assert (before.name, last.name) == ("00-ONE-00000004", "00-ONE-00000005")
    weights, mark = last / "000.safetensors", last / "complete.json"
    if fault == "a byte":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif fault == "a file":
        weights.unlink()
    elif fault == "the mark":
        mark.write_text(mark.read_text()[:20])
    else:
        mark.write_text(mark.read_text().replace('"parent": "', '"parent": "0'))
    run.run(load_recipe(tmp_path / "recipe.json"))
    told = caplog.text
    assert (
        "00-ONE-00000005" in told
        and "continuing from the state before it" in told
        and "going on after step 4" in told
    )
    assert (folder.path / "scores.jsonl").read_bytes() == (other.path / "scores.jsonl").read_bytes()


def test_what_a_run_goes_on_with_must_be_what_it_left(straight, tmp_path):
    """Every file that a restart reads, altered in one place, is named, and nothing is trained."""
    asked, other = straight
    for name in (
        "recipe.json",
        "manifest.json",
        "scores.jsonl",
        "updates.jsonl",
        "costs.jsonl",
        "updates/00-ONE.safetensors",
    ):
        path = tmp_path / name.replace("/", "-")
        shutil.copytree(other.path, path)
        file = path / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        (path / "updates" / "01-TWO.safetensors").unlink()
        rows = (
            [row for row in read_jsonl(path / "scores.jsonl") if row["step"] < 2]
            if name != "scores.jsonl"
            else None
        )
        if rows is not None:  # as it was before the second task
            folder = RunFolder(path)
            folder._write("scores.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        with pytest.raises(Fault, match=file.name):
            run.run(asked.model_copy(update={"output": str(path)}))
        assert not (path / "updates" / "01-TWO.safetensors").exists()


def test_an_update_that_was_lost_is_missed(straight, tmp_path):
    asked, other = straight
    shutil.copytree(other.path, tmp_path / "run")
    (tmp_path / "run" / "updates" / "01-TWO.safetensors").unlink()
    with pytest.raises(Fault, match="has no update of TWO"):
        run.run(asked.model_copy(update={"output": str(tmp_path / "run")}))


def test_changed_data_are_not_gone_on_with(straight, tmp_path, toy_stream):
    asked, other = straight
    shutil.copytree(other.path, tmp_path / "run")
    shutil.copytree(toy_stream, tmp_path / "data")
    file = tmp_path / "data" / "ONE" / "eval.json"
    file.write_text(file.read_text() + " ")
    moved = (tmp_path / "run" / "recipe.json").read_text().replace(str(toy_stream), str(tmp_path / "data"))
    with Seals(tmp_path / "run").replacing(tmp_path / "run" / "recipe.json") as temporary:
        temporary.write_text(moved)
    data = asked.data.model_copy(update={"root": str(tmp_path / "data")})
    with pytest.raises(Fault, match="ONE/eval.json was .*, and is .* now"):
        run.run(asked.model_copy(update={"output": str(tmp_path / "run"), "data": data}))


def test_a_run_without_its_hashes_is_not_gone_on_with(straight, tmp_path):
    asked, other = straight
    shutil.copytree(other.path, tmp_path / "run")
    (tmp_path / "run" / "seals.json").unlink()
    with pytest.raises(Fault, match="seals.json is missing"):
        run.run(asked.model_copy(update={"output": str(tmp_path / "run")}))

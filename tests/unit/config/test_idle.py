"""Settings that nothing would read are refused by name, all at once, before anything loads."""

import pytest

from codyra_llm.benchmarks.trace.mini.make import BASES
from codyra_llm.checkpoints.source import Source, Wanted, recipe_of
from codyra_llm.config import idle
from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment.setup import prepare

RAW = {"data": {"root": "mini", "tasks": ["FOMC"]}, "method": "none", "output": "out"}


def found(*overrides, path="owner/name", **sections):
    raw = {**RAW, "model": {"path": path}, **sections}
    return idle.settings(parse_recipe(override(raw, overrides)), BASES)


@pytest.mark.parametrize(
    "given, said",
    [
        ("general.tasks=[piqa]", "general.tasks: ['piqa'] has no effect without general.data; give that too"),
        ("general.limit=5", "general.limit: 5 has no effect without general.data"),
        ("general.seed=3", "general.seed: 3 has no effect without general.data"),
        ("general.when=each", "general.when: 'each' has no effect without general.data"),
        ("general.trust_code=true", "general.trust_code: True has no effect without general.data"),
        ("open_ended.files=[a]", "open_ended.files: ['a'] has no effect without open_ended.prompts"),
        ("open_ended.limit=5", "open_ended.limit: 5 has no effect without open_ended.prompts"),
        ("open_ended.max_new_tokens=5", "open_ended.max_new_tokens: 5 has no effect without open_ended.pro"),
        ("open_ended.judge.model=j", "open_ended.judge.model: 'j' has no effect without open_ended.judge.ba"),
    ],
)
def test_a_key_without_its_switch(given, said):
    (fault,) = found(given)
    section, _, key = given.partition("=")[0].rpartition(".")
    assert fault.startswith(said) and f"leave {key} out, or write " in fault and ": null to " in fault
    switch = {"general": "data", "open_ended": "prompts", "open_ended.judge": "base_url"}[section]
    assert found(given, f"{section}.{switch}=null") == []  # switched off by name


def test_a_seed_that_draws_nothing():
    (fault,) = found("general.data=hub", "general.seed=3")
    assert fault.startswith("general.seed: 3 has no effect without general.limit")
    (fault,) = found("open_ended.prompts=p", "open_ended.seed=3")
    assert fault.startswith("open_ended.seed: 3 has no effect without open_ended.limit")
    assert found("general.data=hub", "general.limit=9", "general.seed=3") == []


def test_trust_without_files_to_trust():
    for data in ("mini", "hub"):
        (fault,) = found(f"general.data={data}", "general.trust_code=true")
        assert fault.startswith(f"general.trust_code: true has no effect with general.data '{data}'")
    assert found("general.data=folder", "general.trust_code=true") == []


def test_a_revision_of_what_has_none(tmp_path):
    (tmp_path / "model.gguf").touch()
    kinds = {"mini": "a shipped model", str(tmp_path): "a folder", str(tmp_path / "model.gguf"): "a file"}
    for path, kind in kinds.items():
        (fault,) = found("model.revision=main", path=path)
        assert fault.startswith(
            f"model.revision: 'main' has no effect, since model.path, '{path}', is {kind}"
        )
    assert found("model.revision=main") == [] and found(path=str(tmp_path)) == []


def test_a_run_reports_them_together_and_a_finished_one_is_still_read(tiny_llama, toy_stream, tmp_path):
    raw = {
        **RAW,
        "model": {"path": str(tiny_llama), "revision": "main"},
        "data": {"root": str(toy_stream), "tasks": ["ONE"]},
        "general": {"limit": 5},
        "output": str(tmp_path),
    }
    with pytest.raises(Fault) as caught:
        prepare(parse_recipe(raw))
    assert [line.partition(":")[0] for line in caught.value.messages] == ["model.revision", "general.limit"]
    prepare(parse_recipe(raw), runs=False)


def test_a_model_made_of_a_revision_has_none_itself(tmp_path):
    """An export is a folder, whatever its base was; a stage of a run is merged from the base again."""
    raw = {**RAW, "model": {"path": "owner/name", "revision": "abc"}}
    export, stage = Source(raw, model=str(tmp_path)), Source(raw, after="FOMC")
    assert recipe_of(str(tmp_path), export, Wanted(out=tmp_path)).model.revision is None
    assert recipe_of("run@FOMC", stage, Wanted(out=tmp_path)).model.revision == "abc"

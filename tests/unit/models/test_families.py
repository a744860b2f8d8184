"""Which families there are, how others are added, and what each states for people. The contract of their
models is tests/runs/test_families.py."""

import json
import re
import runpy
import shutil
from dataclasses import fields

import pytest
from helpers import ROOT
from tiny_families import MADE, OLMO2, make
from transformers import AutoConfig, AutoTokenizer

from codyra_llm.config.sections import DataSection
from codyra_llm.core.errors import Fault
from codyra_llm.data.encoding import Encoder
from codyra_llm.experiment.inspection import hints
from codyra_llm.models import families, loading
from codyra_llm.models.ends import answer_ends
from codyra_llm.models.families import known
from codyra_llm.models.tokenizer import load_tokenizer

PAGE = ROOT / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(known, "_registered", dict(known._registered))


@pytest.fixture(scope="module")
def olmo2(tmp_path_factory):
    return make("olmo2", tmp_path_factory.mktemp("families") / "olmo2")


def test_every_model_type_has_a_tiny_model():
    assert {config().model_type for _, config in MADE.values()} == set(families.registered())


def test_a_family_that_is_not_registered_is_refused(olmo2):
    config = AutoConfig.from_pretrained(olmo2)
    assert "model_type 'olmo2': expected one of llama" in loading.check(olmo2)[0]
    with pytest.raises(Fault, match="'olmo2'"):
        families.of(config)


def test_a_model_type_belongs_to_one_family():
    assert families.register(OLMO2) is families.register(OLMO2) is OLMO2
    with pytest.raises(Fault, match="'llama' belongs to LLaMA 1 to 3; register"):
        families.register(families.Family("mine", ("llama",)))


def test_a_package_adds_a_family_by_an_entry_point(tmp_path, monkeypatch, olmo2):
    """As installed: a distribution whose metadata name the family."""
    (tmp_path / "their_models.py").write_text(
        "from codyra_llm.models.families import Family\nOLMO2 = Family('OLMo 2', ('olmo2',))\n"
    )
    metadata = tmp_path / "their_models-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-models\nVersion: 1.0\n")
    points = metadata / "entry_points.txt"
    points.write_text("[codyra_llm.families]\nolmo2 = their_models:OLMO2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    known._from_packages.cache_clear()
    try:
        assert loading.check(olmo2) == []
        for value, words in (
            ("their_models:GONE", "can't be loaded"),
            ("json:dumps", "a function: expected"),
        ):
            points.write_text(f"[codyra_llm.families]\nolmo2 = {value}\n")
            known._from_packages.cache_clear()
            with pytest.raises(Fault, match=f"entry point 'olmo2' of codyra_llm.families .*{words}"):
                families.registered()
    finally:
        points.unlink()
        known._from_packages.cache_clear()


def test_the_page_has_the_family_of_the_example_and_every_field(olmo2, tmp_path):
    """docs/extending.md: its program registers what it says, its table has every field and no other."""
    text = PAGE.read_text()
    program = re.search(r"```python\n(# olmo.py\n.*?)```", text, re.S)[1]
    (tmp_path / "olmo.py").write_text(program)
    runpy.run_path(str(tmp_path / "olmo.py"))
    assert loading.check(olmo2) == [] and families.registered()["olmo2"] == OLMO2
    table = re.search(r"\| field \|.*?(?=\n\n)", text, re.S)[0]
    told = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told == {field.name for field in fields(families.Family)}


def a_turn_ends(folder, token):
    """The folder's tokenizer knows this special token, and its config names EOS alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(token)


@pytest.mark.parametrize(
    "base, token, ends",
    [
        ("tiny_gemma3", "<end_of_turn>", True),
        ("tiny_llama", "<|eot_id|>", True),
        ("tiny_llama", "<end_of_turn>", False),
        ("tiny_gemma3", "<|eot_id|>", False),
    ],
)
def test_an_answer_ends_where_a_turn_of_the_family_does(base, token, ends, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(base), tmp_path / "model")
    number = a_turn_ends(folder, token)
    assert answer_ends(folder, load_tokenizer(folder)) == ({2, number} if ends else {2})


def test_ends_of_a_whole_model_are_those_of_its_text_model(whole_gemma3, tmp_path):
    """Where nothing but the text model's part of config.json names them."""
    folder = shutil.copytree(whole_gemma3, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config.pop("eos_token_id", None)
    config["text_config"]["eos_token_id"] = [2, 7]
    (folder / "config.json").write_text(json.dumps(config))
    assert answer_ends(folder, load_tokenizer(folder)) == {2, 7}


@pytest.mark.parametrize("base, told", [("tiny_gemma3", True), ("tiny_llama", False)])
def test_a_tokenizer_without_bos_is_told_of_where_the_family_needs_one(base, told, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(base), tmp_path / "model")
    section = DataSection(root="-", max_prompt_tokens=8, max_answer_tokens=8)

    def said():
        encoder = Encoder(load_tokenizer(folder), section, {2})
        config = AutoConfig.from_pretrained(folder)
        return hints(None, [], encoder, config, folder)

    assert said() == []
    core = json.loads((folder / "tokenizer.json").read_text())
    core["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(core))
    found = said()
    assert len(found) == told and all("puts no BOS" in hint and "Gemma 3" in hint for hint in found)

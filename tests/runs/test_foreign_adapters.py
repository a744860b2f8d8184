"""PEFT adapters that others made: scored as PEFT computes them, or refused in one sentence that says what to
do."""

import json
import shutil

import pytest
import torch
from adapters import recipe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from codyra_llm.checkpoints.evaluate import _prepare
from codyra_llm.checkpoints.generate import answer
from codyra_llm.checkpoints.source import Wanted
from codyra_llm.core.errors import Fault
from codyra_llm.experiment.export import LINEAGE, write_merged, write_peft
from codyra_llm.experiment.setup import prepare
from codyra_llm.models import loading
from codyra_llm.models.weights import stored

PAIR = ["q_proj", "v_proj"]
KINDS = {
    "plain": {"target_modules": PAIR},
    "rslora": {"target_modules": PAIR, "use_rslora": True},
    "dora": {"target_modules": PAIR, "use_dora": True},
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "bias": {"target_modules": PAIR, "bias": "all"},
    "patterns": {"target_modules": PAIR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "head": {"target_modules": [*PAIR, "lm_head"]},
    "embeddings": {"target_modules": [*PAIR, "embed_tokens"]},
    "vocab": {"target_modules": PAIR, "modules_to_save": ["embed_tokens", "lm_head"]},
}


def make(base, out, more=0, **settings):
    """An adapter on `base` as PEFT saves it, with that many tokens more and their tokenizer."""
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if more:
        names = [f"<tool_{number}>" for number in range(more)]
        tokenizer.add_special_tokens({"additional_special_tokens": names})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(out)
    if more:
        tokenizer.save_pretrained(out)
    return adapted.eval()


def logits(model):
    ids = torch.randint(4, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def prepared(adapter, stream, **wanted):
    return _prepare(str(adapter), Wanted(data=str(stream), tasks=None, **wanted))[0]


@pytest.fixture
def stream(tmp_path, toy_stream):
    """The toy tasks under names that the TRACE benchmark has."""
    for own, name in zip(("ONE", "TWO"), ("FOMC", "C-STANCE"), strict=True):
        shutil.copytree(toy_stream / own, tmp_path / "data" / name)
    return tmp_path / "data"


def scored(adapter, stream):
    wanted = Wanted(data=str(stream), overrides=["data.tasks=[FOMC,C-STANCE]"])
    return _prepare(str(adapter), wanted)[0]


# An own head, a tied one, and other towers, which the adapters reach into as well.
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gemma2", "whole_gemma3"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_peft_computes(base, kind, request, stream, tmp_path):
    folder, more = request.getfixturevalue(base), 3 * (kind == "vocab")
    theirs = make(folder, tmp_path / "adapter", more, **KINDS[kind])
    setup = scored(tmp_path / "adapter", stream)
    model = setup.model(None, 0).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=2e-5)
    assert answer(str(tmp_path / "adapter"), "Say A:", 2) is not None


def test_tokens_that_an_adapter_adds_are_read_with_its_own_tokenizer(tiny_llama, stream, tmp_path):
    make(tiny_llama, tmp_path / "adapter", 3, **KINDS["vocab"])
    rows = stored(tmp_path / "adapter" / "adapter_model.safetensors")
    setup = scored(tmp_path / "adapter", stream)
    first = len(AutoTokenizer.from_pretrained(tiny_llama))
    assert setup.encoder.prompt("<tool_1>")[0][-1] == first + 1
    assert any(shape[0] == first + 3 for name, (shape, _) in rows.items() if "embed_tokens" in name)


def test_an_adapters_own_chat_template_is_used(tiny_llama, stream, tmp_path):
    make(tiny_llama, tmp_path / "adapter", **KINDS["plain"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{{ messages[0]['content'] }} now:"
    tokenizer.save_pretrained(tmp_path / "adapter")
    overrides = ["data.tasks=[FOMC]", "data.chat_template=true"]
    setup = _prepare(str(tmp_path / "adapter"), Wanted(data=str(stream), overrides=overrides))[0]
    assert setup.tokenizer.decode(setup.encoder.prompt("Say A")[0][1:]) == "Say A now:"


def test_generate_reads_a_runs_own_peft_export(run, tmp_path):
    folder = run({"name": "seqlora"})
    write_peft(prepare(folder.recipe), folder.archive(), 2, None, tmp_path / "peft")
    for prompt in ("Say B:", "4 next:", "Who is number 2 of the list?\nAnswer:"):
        assert answer(str(tmp_path / "peft"), prompt, 3) == answer(f"{folder.path}@THREE", prompt, 3)
    assert answer(str(folder.path), "Say B:", 3) == answer(f"{folder.path}@THREE", "Say B:", 3)


def adapter_config(folder, **changed):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_the_base_of_another_machine_is_given(tiny_llama, stream, tmp_path):
    theirs = make(tiny_llama, tmp_path / "adapter", **KINDS["plain"])
    adapter_config(tmp_path / "adapter", base_model_name_or_path="/home/someone/models/Llama-3.2-1B")
    with pytest.raises(Fault, match=r"/home/someone.*give the base with --base"):
        scored(tmp_path / "adapter", stream)
    with pytest.raises(Fault, match="give the base with --base"):
        answer(str(tmp_path / "adapter"), "Say A:", 2)
    wanted = Wanted(data=str(stream), base=str(tiny_llama), overrides=["data.tasks=[FOMC]"])
    model = _prepare(str(tmp_path / "adapter"), wanted)[0].model(None, 0).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=2e-5)
    assert answer(str(tmp_path / "adapter"), "Say A:", 2, str(tiny_llama)) is not None


def test_an_adapter_is_read_on_the_revision_that_it_names(tiny_llama, stream, tmp_path, monkeypatch):
    """And a base that is given instead on its newest, unless it is the one that the carried recipe names."""
    asked = set()
    monkeypatch.setattr(loading, "download", lambda *named: asked.add(named) or tiny_llama)
    make(tiny_llama, tmp_path / "adapter", **KINDS["plain"])
    adapter_config(tmp_path / "adapter", base_model_name_or_path="owner/name", revision="v1")
    setup = scored(tmp_path / "adapter", stream)
    assert setup.recipe.model.revision == "v1"
    answer(str(tmp_path / "adapter"), "Say A:", 2)
    assert asked == {("owner/name", "v1")}
    asked.clear()
    answer(str(tmp_path / "adapter"), "Say A:", 2, "other/name")
    assert asked == {("other/name", None)}
    adapter_config(tmp_path / "adapter", revision=5)
    with pytest.raises(Fault, match="revision is 5, expected text or null"):
        answer(str(tmp_path / "adapter"), "Say A:", 2)


def test_the_base_of_a_comparison_is_not_sought_at_the_revision_of_another(
    run, tiny_llama, tmp_path, monkeypatch
):
    asked = set()
    monkeypatch.setattr(loading, "download", lambda *named: asked.add(named) or tiny_llama)
    folder = run({"name": "seqlora"})
    write_merged(prepare(folder.recipe), folder.archive(), 2, None, tmp_path / "merged")
    file = tmp_path / "merged" / LINEAGE
    carried = json.loads(file.read_text())
    carried["recipe"]["model"] |= {"path": "owner/name", "revision": "v1"}
    carried["recipe"]["general"] = {"data": "mini"}
    file.write_text(json.dumps(carried))
    for base, expected in (("owner/name", "v1"), ("other/name", None)):
        asked.clear()
        _prepare(str(tmp_path / "merged"), Wanted(base=base))
        assert asked == {(base, expected)}


def pickled(folder, base):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def inside_a_base(folder, base):
    shutil.copytree(base, folder, dirs_exist_ok=True)


def of_another_base(folder, base):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def of_another_kind(folder, base):
    adapter_config(folder, peft_type="IA3")


def empty(folder, base):
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    "change, words",
    [
        (pickled, "only adapter_model.bin, a pickle.*save_pretrained"),
        (inside_a_base, "a whole model and an adapter.*move adapter_config.json"),
        (of_another_base, r"lora_A.*of shape \[4, 64\].*--base"),
        (of_another_kind, "peft_type IA3"),
        (empty, "no adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_one_sentence(tiny_llama, stream, tmp_path, change, words):
    make(tiny_llama, tmp_path / "adapter", **KINDS["plain"])
    change(tmp_path / "adapter", tiny_llama)
    for asked in (
        lambda: scored(tmp_path / "adapter", stream),
        lambda: answer(str(tmp_path / "adapter"), "A", 2),
    ):
        with pytest.raises(Fault, match=words) as caught:
            asked()
        assert len(caught.value.messages) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "named, words",
    [
        ("run", "a run's folder or a stage of one.*codyra-llm export"),
        ("adapter", "a PEFT adapter, not a model"),
    ],
)
def test_what_is_no_base_says_what_it_is(run, tiny_llama, toy_stream, tmp_path, named, words):
    make(tiny_llama, tmp_path / "adapter", **KINDS["plain"])
    path = {"run": run({"name": "seqlora"}).path, "adapter": tmp_path / "adapter"}[named]
    with pytest.raises(Fault, match=words):
        prepare(recipe(path, toy_stream, tmp_path / "out", {"name": "seqlora"}))


def test_our_own_export_scores_as_peft_reads_it(run, tmp_path):
    folder = run({"name": "seqlora"})
    write_peft(prepare(folder.recipe), folder.archive(), 2, None, tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(folder.recipe.model.path)
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    setup = _prepare(str(tmp_path / "peft"), Wanted())[0]
    torch.testing.assert_close(logits(setup.model(None, 0).eval()), logits(theirs), rtol=1e-4, atol=2e-5)

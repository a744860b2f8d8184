"""What ends an answer, by one rule for every way of answering."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from adapters import recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from codyra_llm.checkpoints.generate import answer
from codyra_llm.config.sections import DataSection
from codyra_llm.data.encoding import Encoder
from codyra_llm.evaluate.generate import answers, generate_ids
from codyra_llm.experiment.setup import prepare
from codyra_llm.models.ends import answer_ends, end_of_turn, without_end
from codyra_llm.models.tokenizer import load_tokenizer
from codyra_llm.store.archive import Archive

PROMPT = "Who is number 3 of the list?\nAnswer:"
TURNS = (
    "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
SECTION = DataSection(root="-", max_prompt_tokens=64, max_answer_tokens=32)


def copy(folder, out, **generation):
    shutil.copytree(folder, out)
    file = out / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | generation))
    return out


def free_run(folder, new=12):
    """What the model answers where nothing ends an answer."""
    tokenizer = load_tokenizer(folder)
    ids = Encoder(tokenizer, SECTION).prompt(PROMPT)[0]
    return generate_ids(AutoModelForCausalLM.from_pretrained(folder).eval(), [ids], new, [])[0]


@pytest.fixture
def chat_model(tiny_llama, tmp_path):
    """A model whose generation config names two ends, the second of which it soon writes; and that token."""
    said = free_run(tiny_llama)
    end = next(token for number, token in enumerate(said) if number >= 2 and token not in said[:number])
    return copy(tiny_llama, tmp_path / "chat", eos_token_id=[2, end]), end, said


def test_an_answer_ends_where_transformers_ends_it(chat_model):
    folder, end, said = chat_model
    tokenizer = load_tokenizer(folder)
    assert answer_ends(folder, tokenizer) == {2, end}
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoder = Encoder(tokenizer, SECTION, answer_ends(folder, tokenizer))
    ids = encoder.prompt(PROMPT)[0]
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert theirs == said[: said.index(end) + 1] == generate_ids(model, [ids], 12, encoder.ends)[0]
    text = tokenizer.decode(theirs[:-1], skip_special_tokens=True)  # the end is not a part of the answer
    assert answers(Accelerator(cpu=True), model, encoder, [PROMPT], 12) == [(text, False)]
    assert answer(str(folder), PROMPT, 12) == text


def test_methods_are_told_what_ends_an_answer(chat_model, toy_stream, tmp_path):
    folder, end, _ = chat_model
    setup = prepare(recipe(folder, toy_stream, tmp_path / "run", {"name": "seqlora"}))
    model, archive = AutoModelForCausalLM.from_pretrained(folder), Archive(tmp_path / "updates", "base")
    assert setup.task(model, archive, 0, {}).ends == setup.encoder.ends == {2, end}


def test_the_harness_ends_answers_there_too(chat_model):
    harness = pytest.importorskip("codyra_llm.evaluate.harness")
    from lm_eval.api.instance import Instance

    folder, _, _ = chat_model
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    lm = harness.InMemoryLM(Accelerator(cpu=True), model, tokenizer, ends=answer_ends(folder, tokenizer))
    asked = (PROMPT, {"until": ["nothing"], "max_gen_toks": 12, "do_sample": False})
    request = Instance(request_type="generate_until", doc={}, arguments=asked, idx=0)
    assert lm.generate_until([request]) == [answer(str(folder), PROMPT, 12)]


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 9}, {2, 5, 7}),
        ({"eos_token_id": 5}, {}, {2, 5}),
        ({}, {"eos_token_id": 9}, {2}),  # as transformers: a generation config goes before the config
        (None, {"eos_token_id": [2, 9]}, {2, 9}),
        (None, {"eos_token_id": None}, {2}),
    ],
)
def test_where_the_ends_are_written(tiny_llama, tmp_path, generation, config, expected):
    shutil.copytree(tiny_llama, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    (tmp_path / "model" / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    assert answer_ends(tmp_path / "model", load_tokenizer(tmp_path / "model")) == expected


@pytest.mark.parametrize(
    "template, expected",
    [
        (TURNS, "<turn>"),
        (TURNS.replace("<turn>", "\n<turn>"), "<turn>"),
        (TURNS.replace("<turn>", ""), None),  # a plain template ends a turn by a line break
        ("{{ raise_exception('no') }}", None),
        (None, None),
        ({"rag": TURNS, "tool_use": TURNS}, None),
        ({"default": TURNS, "tool_use": "x"}, "<turn>"),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes_after_an_answer(tiny_llama, template, expected):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<turn>", "<turn>x"]})
    tokenizer.chat_template = template
    found = end_of_turn(tokenizer)
    assert (found and tokenizer.convert_ids_to_tokens(found)) == expected


def test_only_the_last_token_ends_an_answer():
    assert without_end([5, 2], {2}) == [5] and without_end([2, 5], {2}) == [2, 5]
    assert without_end([], {2}) == []

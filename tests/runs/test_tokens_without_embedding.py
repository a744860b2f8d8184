"""Models whose tokenizer has an added token past their last embedding, as the text models of Gemma 3 have for
images: they learn, answer and are exported, and only texts that contain the token are refused."""

import json
import shutil

import gguf
import pytest
from adapters import recipe
from transformers import AutoTokenizer

from codyra_llm.checkpoints.generate import answer
from codyra_llm.core.errors import Fault
from codyra_llm.experiment.export import write_gguf_folder, write_peft
from codyra_llm.experiment.run import run
from codyra_llm.experiment.setup import prepare
from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer

TOKEN = "<image_soft_token>"
SEQLORA = {"name": "seqlora"}


def with_token(base, out, **named):
    """A copy of the model with one token more, of which it has no embedding."""
    shutil.copytree(base, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.add_tokens([TOKEN], special_tokens=True)
    for name, token in named.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(out)
    rows = json.loads((out / "config.json").read_text())["vocab_size"]
    assert tokenizer.convert_tokens_to_ids(TOKEN) == rows
    return out


@pytest.fixture
def model(tiny_llama, tmp_path):
    return with_token(tiny_llama, tmp_path / "model")


def test_such_a_model_learns_answers_and_is_exported(model, toy_stream, tmp_path):
    folder = run(recipe(model, toy_stream, tmp_path / "run", SEQLORA))
    setup = prepare(folder.recipe, runs=False)
    file = write_gguf_folder(setup, folder.archive(), 2, None, tmp_path / "gguf")
    tokens = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 320 and TOKEN not in tokens
    write_peft(setup, folder.archive(), 2, None, tmp_path / "peft")
    asked = answer(f"{folder.path}@THREE", "20 next:", 4)
    assert asked == answer(str(tmp_path / "peft"), "20 next:", 4)


def test_a_text_with_the_token_is_refused_before_anything_loads(model, toy_stream, tmp_path):
    stream = shutil.copytree(toy_stream, tmp_path / "stream")
    for split, part in (("train", "prompt"), ("test", "answer")):
        file = stream / "TWO" / f"{split}.json"
        rows = json.loads(file.read_text())
        rows[3][part] += TOKEN
        file.write_text(json.dumps(rows))
    with pytest.raises(Fault) as caught:
        prepare(recipe(model, stream, tmp_path / "run", SEQLORA))
    assert [message.partition(" holds")[0] for message in caught.value.messages] == [
        "TWO/train: record 3",
        "TWO/test: record 3",
    ]
    with pytest.raises(Fault, match=f"holds the token {TOKEN}, of which the model has no embedding"):
        answer(str(model), f"a {TOKEN}", 2)


def test_a_model_without_embeddings_of_tokens_that_any_text_needs_is_refused(tiny_llama, model, tmp_path):
    assert loading.check(model) == []
    for name in ("pad_token", "eos_token"):
        folder = with_token(tiny_llama, tmp_path / name, **{name: TOKEN})
        assert load_tokenizer(folder).convert_tokens_to_ids(TOKEN) == 320
        assert "tokenizer of 321 tokens and a vocab_size of 320" in loading.check(folder)[0]

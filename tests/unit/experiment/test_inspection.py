"""What base and data together make impossible is reported before any weights load."""

import json
import shutil
from io import StringIO

import pytest
import sentencepiece
from adapters import recipe
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import SIZES
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.data.check import check_root
from codyra_llm.evaluate import vllm
from codyra_llm.experiment.plan import plan
from codyra_llm.experiment.setup import prepare
from codyra_llm.metrics.text import METRICS

NONE = {"name": "seqlora"}


def without_bos(folder, out):
    """The tiny model with a tokenizer that puts nothing in front of a text."""
    shutil.copytree(folder, out)
    core = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps(core | {"post_processor": None}))
    return out


def stream_of(out, prompts, answers=None, split="test"):
    """Three tasks, of which ONE has these prompts and answers in one split."""
    for task in ("ONE", "TWO", "THREE"):
        for part in ("train", "eval", "test"):
            (out / task).mkdir(parents=True, exist_ok=True)
            rows = [{"prompt": f"Say {part} {number}:", "answer": "B"} for number in range(4)]
            if task == "ONE" and part == split:
                given = answers or ["ok"] * len(prompts)
                rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, given, strict=True)]
            (out / task / f"{part}.json").write_text(json.dumps(rows))
    return out


def planned(model, stream, out, **sections):
    asked = recipe(model, stream, out, NONE)
    for section, values in sections.items():
        changed = getattr(asked, section).model_copy(update=values)
        asked = asked.model_copy(update={section: changed})
    console = Console(record=True, width=400, file=StringIO())
    plan(asked, console)
    return console.export_text()


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_prompt_without_bos_is_refused(tiny_llama, tmp_path, split):
    model = without_bos(tiny_llama, tmp_path / "model")
    stream = stream_of(tmp_path / "data", ["x", "", "y", ""], split=split)
    with pytest.raises(Fault, match=f"ONE/{split}: record 1 has an empty prompt \\(2 of 4 records\\)"):
        prepare(recipe(model, stream, tmp_path / "run", NONE))


def test_an_empty_prompt_is_answered_where_bos_is_in_front(tiny_llama, tmp_path):
    stream = stream_of(tmp_path / "data", ["x", ""])
    setup = prepare(recipe(tiny_llama, stream, tmp_path / "run", NONE))
    assert setup.encoder.prompt("")[0] == [1]


def test_white_space_is_a_prompt_where_it_has_tokens(tiny_llama, tmp_path):
    model = without_bos(tiny_llama, tmp_path / "model")
    setup = prepare(recipe(model, stream_of(tmp_path / "data", ["x", "\n\n"]), tmp_path / "run", NONE))
    assert setup.encoder.prompt("\n\n")[0] and not setup.encoder.prompt("")[0]


def test_data_check_tells_of_empty_prompts_and_padded_answers(tmp_path):
    report = check_root(stream_of(tmp_path / "data", ["", "x", "y"], ["ok", " the cat", "the dog\n"]))
    text = "\n".join(report["warnings"])
    assert "ONE/test: 1 of 3 records have an empty prompt" in text
    assert "ONE/test: 2 of 3 records have an answer that begins or ends with white space" in text


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A tiny LLaMA with a tokenizer as LLaMA 2's: a SentencePiece file, a space in front of each word."""
    folder = tmp_path_factory.mktemp("sp") / "model"
    folder.mkdir()
    (folder.parent / "corpus.txt").write_text(
        "\n".join(f"the cat sat on {i} mats and is ok." for i in range(200))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder.parent / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    told = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    size = len(AutoTokenizer.from_pretrained(folder))
    LlamaForCausalLM(LlamaConfig(**SIZES | {"pad_token_id": None}, vocab_size=size)).save_pretrained(folder)
    return folder


def test_a_space_that_decoding_drops_is_told_and_the_lenient_rule_forgives_it(sentencepiece_model, tmp_path):
    stream = stream_of(tmp_path / "data", ["x", "y"], ["the cat", " the cat"])
    told = planned(sentencepiece_model, stream, tmp_path / "run")
    assert "ONE/test: 1 of 2 answers can't be given as they are" in told
    assert "record 1 ' the cat' becomes 'the cat'" in told
    encoder = prepare(recipe(sentencepiece_model, stream, tmp_path / "run", NONE)).encoder
    scores = [
        METRICS["exact_match_treelora"].example("", encoder.perfect(a), a) for a in ("the cat", " the cat")
    ]
    assert scores == [100, 100]


def test_an_answer_with_the_text_of_eos_is_told(tiny_llama, tmp_path):
    stream = stream_of(tmp_path / "data", ["x", "y", "z"], ["A", "B <eos> C", "<unk>"])
    told = planned(tiny_llama, stream, tmp_path / "run")
    assert "ONE/test: 2 of 3 answers can't be given as they are" in told and "becomes 'B '" in told
    assert "TWO/test" not in told


SPACED = "ONE/train: 2 of 5 prompts end in a space, the first is record 1, and tokenizers join"


def test_training_prompts_that_end_in_a_space_are_told(tiny_llama, tmp_path):
    """Not where a number follows, of which a digit may be a token of its own."""
    prompts = ["Answer:\n", "Answer: ", "Answer:", "Answer: ", "Answer: "]
    answers = ["good", "good", "good", "Größe", "7"]
    stream = stream_of(tmp_path / "data", prompts, answers, split="train")
    told = planned(tiny_llama, stream, tmp_path / "run")
    assert SPACED in told and "end prompts in a line break, as in 'Answer:\\n'" in told
    assert "prompts end in a space" not in told.replace(SPACED, "")


def test_a_chat_template_parts_prompt_and_answer(tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    stream = stream_of(tmp_path / "data", ["Answer: "], ["good"], split="train")
    told = planned(model, stream, tmp_path / "run", data={"chat_template": True})
    assert "first example" in told and "end in a space" not in told


def test_prompts_past_the_models_positions_are_refused(tiny_llama, tmp_path):
    stream = stream_of(tmp_path / "data", ["word " * 400, "x"])
    with pytest.raises(Fault, match="data.max_prompt_tokens: ONE/test.* 256 positions; lower it"):
        prepare(recipe(tiny_llama, stream, tmp_path / "run", NONE))
    told = planned(
        tiny_llama, stream, tmp_path / "run", data={"max_prompt_tokens": 200, "max_answer_tokens": 56}
    )
    assert "go past" not in told
    asked = {"data": {"max_prompt_tokens": 200, "max_answer_tokens": 56}, "eval": {"max_new_tokens": 100}}
    assert "go past the model's 256 positions" in planned(tiny_llama, stream, tmp_path / "run", **asked)


@pytest.mark.parametrize(
    "method, taken", [({"name": "pp", "length": 20}, 60), ({"name": "l2p", "chosen": 4, "length": 15}, 60)]
)
def test_prompts_of_the_method_count(method, taken, tiny_llama, tmp_path):
    """200 tokens with an answer have room in 256 positions, but not after 60 of the method's own, of three
    tasks or of four that are chosen."""
    stream = stream_of(tmp_path / "data", ["word " * 400, "x"])
    lengths = {"max_prompt_tokens": 197, "max_answer_tokens": 8}

    def asked(chosen, **changes):
        whole = recipe(tiny_llama, stream, tmp_path / "run", NONE)
        config = METHODS[chosen["name"]].Config(**chosen)
        data = whole.data.model_copy(update=lengths | changes)
        return whole.model_copy(update={"method": config, "data": data})

    prepare(asked(NONE))
    told = f"256 positions, of which the method's own prompts take {taken}"
    with pytest.raises(Fault, match=f"ONE/test.* {told}"):
        prepare(asked(method))
    prepare(asked(method, max_prompt_tokens=195))
    console = Console(record=True, width=400, file=StringIO())
    longer = asked(method, max_prompt_tokens=195)
    longer = longer.model_copy(update={"eval": longer.eval.model_copy(update={"max_new_tokens": 2})})
    plan(longer, console)
    assert told in console.export_text()


def test_demonstrations_in_the_prompt_count(tiny_llama, tmp_path):
    """Each test prompt alone has room; with six demonstrations of 50 tokens before it there is none."""
    stream = stream_of(tmp_path / "data", [f"{i} " + "word " * 30 for i in range(12)], split="train")
    asked = recipe(tiny_llama, stream, tmp_path / "run", NONE)
    data = asked.data.model_copy(update={"max_prompt_tokens": 600})
    prepare(asked.model_copy(update={"data": data}))
    method = METHODS["icl"].Config(shots=6)
    with pytest.raises(Fault, match="data.max_prompt_tokens: ONE/test.* 256 positions; lower it"):
        prepare(asked.model_copy(update={"data": data, "method": method}))


def test_weights_that_nobody_reads_are_told(tiny_llama, tmp_path, toy_stream):
    shutil.copytree(tiny_llama, tmp_path / "model")
    save_file(
        {"model.norm.weight": load_file(tiny_llama / "model.safetensors")["model.norm.weight"]},
        tmp_path / "model" / "old.safetensors",
    )
    assert "weights that are not read" in planned(tmp_path / "model", toy_stream, tmp_path / "run")
    assert "weights that are not read" not in planned(tiny_llama, toy_stream, tmp_path / "run")


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_config_with_another_head_is_refused(tiny_gemma2, toy_stream, tmp_path, same):
    shutil.copytree(tiny_gemma2, tmp_path / "model")
    weights = load_file(tiny_gemma2 / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (1 if same else 2)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    asked = recipe(tmp_path / "model", toy_stream, tmp_path / "run", NONE)
    if same:
        prepare(asked)
        return
    with pytest.raises(Fault, match="stores a head that is not the embeddings"):
        prepare(asked)


def test_named_chat_templates_without_a_default_are_one_sentence(tiny_llama, toy_stream, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        file = tmp_path / "model" / "additional_chat_templates" / f"{name}.jinja"
        file.write_text("{{ messages[0]['content'] }}")
    asked = recipe(tmp_path / "model", toy_stream, tmp_path / "run", NONE)
    prepare(asked)
    chats = asked.model_copy(update={"data": asked.data.model_copy(update={"chat_template": True})})
    with pytest.raises(Fault, match="chat templates rag, tool_use and none of them is the default"):
        prepare(chats)


def test_a_plan_hints_at_answers_that_teach_no_end(tiny_llama, tmp_path):
    """Of 4 training answers 2 are cut, which is not most of them, then 3."""
    told = "ONE: most training answers are cut to data.max_answer_tokens (4) and have no end to learn"
    long = "one two three four five six seven"
    for longer, new, hinted in ((3, 5, True), (3, 4, False), (2, 5, False)):
        answers = [long] * longer + ["B"] * (4 - longer)
        stream = stream_of(tmp_path / f"{longer}-{new}", [f"Say {i}:" for i in range(4)], answers, "train")
        said = planned(
            tiny_llama,
            stream,
            tmp_path / "run",
            data={"max_answer_tokens": 4},
            eval={"max_new_tokens": {"ONE": new, "TWO": 5, "THREE": 5}},
        )
        assert (told in said) == hinted


def test_an_attention_that_is_not_here_is_told_with_all_else(tiny_llama, toy_stream, tmp_path):
    """Without a package that takes a GPU; it used to be found as the weights loaded."""
    asked = recipe(tiny_llama, toy_stream, tmp_path / "run", {"name": "seqlora", "rank": 4000})
    model = asked.model.model_copy(update={"attention": "flash_attention_2"})
    with pytest.raises(Fault, match="attention 'flash_attention_2'.*choose eager") as caught:
        prepare(asked.model_copy(update={"model": model}))
    assert len(caught.value.messages) == 2 and "method.rank: 4000" in caught.value.messages[0]


def test_a_plan_tells_all_that_this_machine_lacks(tiny_llama, toy_stream, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    asked = recipe(tiny_llama, toy_stream, tmp_path / "run", {"name": "seqlora"})
    lacks = {"eval": asked.eval.model_copy(update={"backend": "vllm"}), "trackers": ["nothing"]}
    with pytest.raises(Fault) as caught:
        plan(asked.model_copy(update=lacks), Console(file=StringIO()))
    assert [message.partition(": ")[0] for message in caught.value.messages] == ["eval.backend", "trackers"]

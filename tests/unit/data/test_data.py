"""Label masks by position, truncation, weights, orders, micro-batches."""

import json
from copy import deepcopy
from itertools import pairwise

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from codyra_llm.config.sections import DataSection
from codyra_llm.core.errors import Fault
from codyra_llm.data.batches import collate, micro_batches, shuffled
from codyra_llm.data.encoding import Encoded, Encoder
from codyra_llm.data.stream import Stream
from codyra_llm.models.tokenizer import adds_bos, load_tokenizer

TEXTS = [
    ("The answer is", "B"),
    ("判断：\n态度：", "A"),
    ("Solve.\nQuestion:\n2+2\nAnswer:", "4.0"),
    ("<EOL> import os <EOL>", "x = <STR_LIT> <EOL>"),
    ("Choices:\nA. a\nB. b\n\nAnswer:", "B\nBecause it is.\n"),
]


def section(prompt=200, answer=64, **more):
    return DataSection(root="-", tasks=["T"], max_prompt_tokens=prompt, max_answer_tokens=answer, **more)


@pytest.fixture(params=["llama", "gemma3"])
def tokenizer(request, tiny_llama, tiny_gemma3):
    return load_tokenizer({"llama": tiny_llama, "gemma3": tiny_gemma3}[request.param])


def assert_masks(tokenizer, data):
    encoder = Encoder(tokenizer, data)
    for prompt, answer in TEXTS:
        (e,) = encoder.encode([{"prompt": prompt, "answer": answer}])
        ids = e.prompt + e.answer
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        if adds_bos(tokenizer):
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(e.answer, skip_special_tokens=True) == answer
        assert e.prompt == encoder.prompt(prompt)[0], "training and generation must see the same prompt"
        batch = collate(
            [e, Encoded(e.prompt * 2, e.answer, False)], [0, 1], [1.0, 1.0], tokenizer.pad_token_id
        )
        first = batch.predictors < batch.ids.shape[1]
        assert batch.predictors[first].tolist() == list(range(len(e.prompt) - 1, len(e) - 1))
        assert batch.targets[first].tolist() == e.answer == batch.ids[0, batch.predictors[first] + 1].tolist()


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_examples_are_encoded_together_as_each_alone(tokenizer, pairs):
    """Some are cut."""
    pairs = [*TEXTS, *pairs]
    for kind in (tokenizer, sentencepiece_like()):
        encoder = Encoder(kind, section(12, 6))
        records = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
        alone = []
        for prompt, answer in pairs:
            (ids, cut), (answer_ids, answer_cut) = encoder.prompt(prompt), encoder.answer(answer)
            alone.append(Encoded(ids, answer_ids, cut or answer_cut))
        assert encoder.encode(records) == alone
    assert encoder.encode([]) == []


def test_examples_are_encoded_as_a_dataset_maps_them(tokenizer):
    """`Dataset.map`, text by text, gives what all at once do."""
    records = [{"prompt": prompt, "answer": answer} for prompt, answer in TEXTS]
    for kind in (tokenizer, sentencepiece_like()):
        encoder = Encoder(kind, section(12, 6))
        rows = Dataset.from_list(records).map(
            lambda row, own=encoder: {"ids": own.encode([row])[0].prompt}, new_fingerprint="x"
        )
        assert list(rows["ids"]) == [example.prompt for example in encoder.encode(records)]


def test_masks(tokenizer):
    assert_masks(tokenizer, section())


def sentencepiece_like():
    """LLaMA-2's kind: every text gets a word-start mark in front, unknown bytes fall back, decoding strips
    one space.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁AnswerBthcCx=import:.", "▁B"]
    core = Tokenizer(
        BPE(
            {t: i for i, t in enumerate(dict.fromkeys(tokens))},
            [("▁", "B")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def test_masks_where_every_text_gets_a_word_start():
    tokenizer = sentencepiece_like()
    assert tokenizer.convert_ids_to_tokens(tokenizer("B", add_special_tokens=False)["input_ids"])[
        0
    ].startswith("▁")
    assert_masks(tokenizer, section(300, 80))
    answer, _ = Encoder(tokenizer, section(300, 80)).answer("B")
    assert tokenizer.convert_ids_to_tokens(answer) == ["B", "</s>"], (
        "as it stands after 'Answer:', without the mark"
    )


@pytest.mark.data
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_masks_with_real_tokenizers(name, real_model):
    tokenizer = load_tokenizer(real_model(name))
    assert_masks(tokenizer, section())


def test_a_bos_in_the_text_is_not_doubled(tokenizer):
    """Py150's prompts begin with the text of LLaMA's BOS."""
    ids, _ = Encoder(tokenizer, section()).prompt(f"{tokenizer.bos_token} import os")
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("side", ["left", "middle"])
def test_a_cut_prompt_keeps_bos_and_its_end(tokenizer, side):
    encoder = Encoder(tokenizer, section(20, 8, truncation=side))
    text = " ".join(map(str, range(100)))
    (e,) = encoder.encode([{"prompt": text, "answer": text}])
    whole = encoder._ids(text)
    assert (len(e.prompt), len(e.answer), e.cut) == (20, 8, True)
    assert e.prompt[0] == tokenizer.bos_token_id
    head = 9 if side == "middle" else 0
    assert e.prompt[1:] == whole[:head] + whole[len(whole) - (19 - head) :]


def test_only_an_answer_that_is_whole_ends_in_eos(tokenizer):
    """A cut answer with EOS would teach to stop in mid-sentence."""
    text = " ".join(map(str, range(100)))
    encoder = Encoder(tokenizer, section(20, 8))
    own = encoder._continuation(text, encoder._ids("\n" + text))
    assert encoder.answer(text) == (own[:8], True)
    (seven,) = tokenizer.batch_decode([own[:7]])
    assert encoder.answer(seven) == ([*own[:7], tokenizer.eos_token_id], False)
    (eight,) = tokenizer.batch_decode([own[:8]])
    assert encoder.answer(eight) == (own[:8], True)


@pytest.mark.parametrize("chat_template", [False, True])
def test_answers_to_what_a_template_wrote_end_as_its_turns_do(tokenizer, chat_template):
    """As Gemma's chats, whose turns do not end in EOS: else a chat model would unlearn to end its turn."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<end_of_turn>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    data = section(40, 20)
    encoder = Encoder(tokenizer, data.model_copy(update={"chat_template": chat_template}))
    plain, chat = encoder.encode(
        [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "b", "learnt": []}]
    )
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert chat.answer[-1] == end
    assert plain.answer[-1] == (end if chat_template else tokenizer.eos_token_id)
    assert encoder.answer("b")[0] == plain.answer


def test_what_is_learnt_perfectly_ends_at_any_token_that_ends_an_answer(tokenizer):
    """At the model's end of turn as at EOS, whichever is first."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    ends = frozenset({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")})
    plain, chat = Encoder(tokenizer, section(40, 20)), Encoder(tokenizer, section(40, 20), ends)
    assert plain.perfect("yes<end_of_turn>no") == "yesno"
    assert chat.perfect("yes<end_of_turn>no") == "yes"
    assert chat.perfect(f"yes{tokenizer.eos_token}no<end_of_turn>") == "yes"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=6))
def test_padded_and_packed_batches_hold_the_same_labels(sizes):
    examples = [
        Encoded(list(range(100 * i, 100 * i + n)), list(range(100 * i + 50, 100 * i + 50 + m)), False)
        for i, (n, m) in enumerate(sizes)
    ]
    chosen, weights = range(len(sizes)), [1 / (i + 2) for i in range(len(sizes))]
    padded, packed = (collate(examples, chosen, weights, -1, packed) for packed in (False, True))
    assert packed.ids.tolist() == [[token for e in examples for token in e.prompt + e.answer]]
    assert packed.positions.tolist() == [[i for e in examples for i in range(len(e))]]
    assert (
        packed.segments == [len(e) for e in examples] and padded.segments is None and padded.positions is None
    )
    assert [[t for t in row if t >= 0] for row in padded.ids.tolist()] == [
        e.prompt + e.answer for e in examples
    ]
    expected = [
        ((before, token), weights[i])
        for i, e in enumerate(examples)
        for before, token in pairwise([None, *e.prompt, *e.answer])
        if token in e.answer and before is not None
    ]
    for batch in (padded, packed):
        before = batch.ids.flatten()[batch.predictors].tolist()
        assert list(zip(before, batch.targets.tolist(), strict=True)) == [pair for pair, _ in expected]
        assert batch.weights.tolist() == pytest.approx([weight for _, weight in expected])
        # Where nothing is in front of an answer, its first token is given in place of a prompt.
        assert batch.prompts == [e.prompt or e.answer[:1] for e in examples]
        assert batch.labelled == [len(e.answer) - (not e.prompt) for e in examples]


@given(st.integers(0, 4), st.integers(0, 4), st.sampled_from([(), ((1, 2),), ((1, 3), (3, 4))]))
def test_what_is_learnt_is_counted_as_it_is_labelled(prompt, answer, turns):
    """The count is what losses are averaged by; the first token of all is predicted by none."""
    if turns and turns[-1][1] > prompt:
        turns = ()
    example = Encoded(list(range(prompt)), list(range(10, 10 + answer)), False, turns)
    expected = [place for start, stop in turns for place in range(start, stop)]
    expected += [place for place in range(prompt, prompt + answer) if place > 0]
    assert example.labelled == expected and example.targets == len(expected)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(16, 200),
    st.booleans(),
)
def test_micro_batches_cover_each_example_once_and_keep_ranks_in_step(lengths, world, tokens, packed):
    ranks = micro_batches(lengths, world, tokens, packed)
    assert len(ranks) == world and len({len(steps) for steps in ranks}) == 1
    assert sorted(i for steps in ranks for batch in steps for i in batch) == list(range(len(lengths)))
    for batch in (b for steps in ranks for b in steps if len(b) > 1):
        own = [lengths[i] for i in batch]
        assert (sum(own) if packed else max(own) * len(own)) <= tokens
    assert any(steps[-1] for steps in ranks), "no step is empty on all ranks"


def test_order_is_a_function_of_seed_task_and_epoch():
    assert shuffled(range(50), 1, 2, 3) == shuffled(range(50), 1, 2, 3)
    orders = {tuple(shuffled(range(50), *key)) for key in ((1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0))}
    assert len(orders) == 4 and all(sorted(order) == list(range(50)) for order in orders)
    assert sorted(shuffled(range(5, 9), 0, 0, 0)) == [5, 6, 7, 8]


def test_stream_limits_the_training_split_alone(toy_stream):
    stream = Stream(DataSection(root="-", tasks=["ONE"], max_train_examples=3, epochs=1), toy_stream)
    assert len(stream.records(0, "train")) == 3 and len(stream.records(0, "test")) > 3


def test_settings_are_not_chosen_on_prompts_of_the_test_split(tmp_path):
    def write(split, prompts):
        (tmp_path / "X").mkdir(exist_ok=True)
        rows = [{"prompt": p, "answer": "a"} for p in prompts]
        (tmp_path / "X" / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")

    def prompts(split):
        stream = Stream(DataSection(root="-", tasks=["X"], epochs=1), tmp_path)
        return [row["prompt"] for row in stream.records(0, split)]

    write("eval", ["p", "q", "r"])
    write("test", ["q", "s"])
    assert prompts("eval") == ["p", "r"] and prompts("test") == ["q", "s"]
    write("test", ["p", "q", "r"])
    with pytest.raises(Fault, match="eval.json has no prompt that test.json lacks"):
        prompts("eval")


def test_spaces_in_front_of_punctuation_stay_in_answers():
    """Code has them. A tokenizer that is not a BPE drops them where its config asks for cleaning up."""
    pieces = ["<unk>", "</s>", *(f"\u2581{piece}" for piece in "f(.,")]
    words = [(piece, -1.0) for piece in pieces]
    core = Tokenizer(Unigram(words, unk_id=0))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=True
    )
    assert tokenizer.decode([2, 5, 2, 4]) == "f, f."
    assert Encoder(tokenizer, section()).texts([[2, 5, 2, 4, 1]]) == ["f , f ."]

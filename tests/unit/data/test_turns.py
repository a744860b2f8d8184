"""All turns of the assistant's learnt in one sequence. Oracles: transformers' own mask of a template with
generation tags, each turn as an example of its own, and float64 logits.
"""

import json

import pytest
import torch
from own_benchmark import faults, task
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.config.sections import DataSection
from codyra_llm.data.batches import collate, example_weights
from codyra_llm.data.encoding import Encoder
from codyra_llm.data.rendering import ByTemplate, plain
from codyra_llm.data.sources import read
from codyra_llm.models.attention import packed_attention
from codyra_llm.models.tokenizer import load_tokenizer

CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}"
)
TURNS = (  # in the manner of ChatML, whose turns end with EOS
    "{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    + CALLS
    + "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
SPACED = (  # in the manner of LLaMA 2: a space and trimmed text after the instruction, BOS before each
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} {{ m.content | trim }} "
    "{{ eos_token }}{% endgeneration %}{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% endif %}{% endfor %}"
)
FORGETFUL = (  # writes the reasoning of the last turn alone
    "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MOVING = (  # writes the system's text before the last question
    "{% for m in messages %}{% if loop.last %}{{ messages[0].content }}{% endif %}[{{ m.role }}]"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def said(*texts, system=None):
    """A chat of user and assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


LONG = said("How many?", "Three of them", "And now?", "Größe 判,\nfour", "Why?", "So.", system="Be brief.")
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
TOOL = [
    *said("1 + 1?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two"},
    *said("Sure?", "Yes"),
]
SHORT = said("a", "b")


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


def records(tokenizer, folder, chats, train_on="assistant", split="train"):
    """The chats as they are read."""
    files = folder / "chats.jsonl"
    files.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    one = task(files=dict.fromkeys(("train", "eval", "test"), files.name), format="openai", train_on=train_on)
    return read(folder, "T", one, split, ByTemplate(tokenizer))


def encoder(tokenizer, length=500, truncation="left"):
    """An encoder of prompts of up to `length` tokens."""
    limits = {"max_prompt_tokens": length, "max_answer_tokens": 99, "truncation": truncation}
    return Encoder(tokenizer, DataSection(root="mini", **limits))


def encoded(tokenizer, *args, **given):
    """The chats as whole examples."""
    return encoder(tokenizer).encode(records(tokenizer, *args, **given))


@pytest.mark.parametrize(
    ("template", "chats"),
    [(TURNS, [LONG, TOOL, SHORT]), (SPACED, [LONG[1:5], SHORT])],
    ids=["turns", "spaced"],
)
def test_the_mask_is_transformers_own(template, chats, tokenizer, tmp_path):
    """Of the last turn, which is the answer as it is given elsewhere too, without the space in front."""
    tokenizer.chat_template = template
    for chat, example in zip(chats, encoded(tokenizer, tmp_path, chats), strict=True):
        theirs = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        mask = theirs["assistant_masks"]
        own, theirs = example.prompt, theirs["input_ids"]
        if template is TURNS:  # it writes no BOS, and of an answer what any answer is
            own, theirs = own + example.answer, [tokenizer.bos_token_id, *theirs]
            mask = [0, *mask]
        assert own == theirs[: len(own)]
        assert [int(place in example.labelled) for place in range(len(own))] == mask[: len(own)]
        assert bool(example.turns) == (chat is not SHORT)


def test_a_turn_of_weight_0_is_not_learnt(tokenizer, tmp_path):
    """As OpenAI's format says of answers that are there for the context alone."""
    tokenizer.chat_template = TURNS
    weighted = [
        {**one, "weight": int(place != 2)} if place % 2 == 0 and place else one
        for place, one in enumerate(LONG)
    ]
    assert [one.get("weight") for one in weighted] == [None, None, 0, None, 1, None, 1]
    (whole,), (some,) = (encoded(tokenizer, tmp_path, [chat]) for chat in (LONG, weighted))
    assert (some.prompt, some.answer) == (whole.prompt, whole.answer)
    assert len(whole.turns) == 2 and some.turns == whole.turns[1:]
    for weight, words in ((0, "has the weight 0, so that nothing"), (0.5, "weight 0.5, expected 0 or 1")):
        wrong = [*SHORT[:-1], {**SHORT[-1], "weight": weight}]
        assert words in faults(records, tokenizer, tmp_path, [wrong, LONG])[0]


def test_a_chat_of_one_turn_is_the_same_either_way(tokenizer, tmp_path):
    tokenizer.chat_template = TURNS
    (every,), (last,) = (encoded(tokenizer, tmp_path, [SHORT], which) for which in ("assistant", "last"))
    assert every == last and every.labelled == list(range(len(every.prompt), len(every)))


def test_the_last_turn_is_evaluated(tokenizer, tmp_path):
    tokenizer.chat_template = TURNS
    every = encoded(tokenizer, tmp_path, [LONG, TOOL], split="test")
    assert every == encoded(tokenizer, tmp_path, [LONG, TOOL], "last", split="test")
    assert all(not example.turns for example in every)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("average", ["token", "sample"])
def test_the_loss_is_that_of_each_turn_by_itself(average, packed, tokenizer, tiny_llama, tmp_path):
    """Each turn as an example of its own, its answer predicted by transformers' logits in float64."""
    tokenizer.chat_template = TURNS
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    chats = [LONG, said("x", "y", "z", "one two"), SHORT]
    sums, counts = [], []
    for chat in chats:
        cuts = [chat[: i + 1] for i, message in enumerate(chat) if message["role"] == "assistant"]
        alone = encoded(tokenizer, tmp_path, cuts, "last")
        nll = []
        for example in alone:
            ids = torch.tensor([example.prompt + example.answer])
            logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
            nll.append(functional.cross_entropy(logits, torch.tensor(example.answer), reduction="sum"))
        sums.append(sum(nll))
        counts.append(sum(len(example.answer) for example in alone))
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    expected = sum(sums) / sum(counts) if average == "token" else sum(means) / len(means)

    examples = encoded(tokenizer, tmp_path, chats)
    assert [example.targets for example in examples] == counts
    if packed:
        packed_attention.use(model)
    chosen = list(range(len(examples)))
    weights = example_weights(examples, chosen, average)
    batch = collate(examples, chosen, weights, tokenizer.pad_token_id, packed)
    assert batch.labelled == counts  # by which methods tell whose a row of hidden states is
    torch.testing.assert_close(batch.cross_entropy(model), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chat", [LONG, LONG[1:]], ids=["system", "user"])
@pytest.mark.parametrize("cut", ["left", "middle"])
def test_a_turn_that_is_cut_is_not_learnt(cut, chat, tokenizer, tmp_path):
    """At every length: what is learnt are whole turns, each with something before it, and all of those. Of a
    chat that begins with a user's message the header of that is kept, and what follows the last message."""
    tokenizer.chat_template = TURNS
    rows, seen = records(tokenizer, tmp_path, [chat]), set()
    header, closing = (
        len(tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in ("[user]\n", f"{tokenizer.eos_token}[assistant]\n")
    )
    (whole,) = encoder(tokenizer).encode(rows)
    turns = [whole.prompt[start:stop] for start, stop in whole.turns]
    for length in range(8, len(whole.prompt) + 1):
        (example,) = encoder(tokenizer, length, cut).encode(rows)
        found = [example.prompt[start:stop] for start, stop in example.turns]
        assert all(turn in turns for turn in found) and len(example.prompt) == length
        assert example.answer == whole.answer
        framed = chat is not LONG and header + closing < length - 1
        room = length - 1 - header - closing if framed else length - 1
        head = (header if framed else 0) + (room // 2 if cut == "middle" else 0)
        tail = length - 1 - head
        expected = [
            turn
            for turn, (start, stop) in zip(turns, whole.turns, strict=True)
            if stop <= 1 + head or start > len(whole.prompt) - tail or length == len(whole.prompt)
        ]
        assert found == expected, length
        seen.add(len(found))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("template", "chat", "number"),
    [
        (FORGETFUL, said("a", "<think>x</think>b", "c", "d"), 1),
        (MOVING, said("a", "b", "c", "d", system="s"), 1),
    ],
    ids=["reasoning", "system"],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(template, chat, number, tokenizer, tmp_path):
    tokenizer.chat_template = template
    (message,) = faults(encoded, tokenizer, tmp_path, [chat])
    assert f"record 0: the model's chat template writes the assistant's turn {number}, or what" in message
    assert "set train_on to last" in message
    assert encoded(tokenizer, tmp_path, [chat], "last")[0].answer


def test_a_call_without_an_end_is_refused(tokenizer, tmp_path):
    tokenizer.chat_template = TURNS.replace("{{ eos_token }}", "")
    (message,) = faults(encoded, tokenizer, tmp_path, [TOOL])
    assert "the assistant's turn 1 calls a tool, and the model's chat template marks no end of it" in message
    (example,) = encoded(tokenizer, tmp_path, [LONG])  # texts are learnt without one
    (start, stop), _ = example.turns
    assert tokenizer.decode(example.prompt[start:stop]).strip() == "Three of them"


def test_data_check_needs_no_template(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": LONG}) + "\n" + json.dumps({"messages": TOOL}))
    files = dict.fromkeys(("train", "test"), "a.jsonl")
    found = read(tmp_path, "T", task(files=files, format="openai", train_on="assistant"), "train", plain)
    assert found and all(row["learnt"] == [] for row in found)

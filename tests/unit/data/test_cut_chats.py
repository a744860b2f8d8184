"""A long prompt that a chat template wrote is cut between what the template writes before a user's text and
what it writes after it. Oracle: the pieces, tokenised one by one.
"""

import pytest

from codyra_llm.config.sections import DataSection
from codyra_llm.data.encoding import Encoder
from codyra_llm.models.tokenizer import around_text, load_tokenizer, render_chat

CHATML = (  # with a system part of the template's own, as SmolLM2's
    "{% if messages[0].role != 'system' %}<start>system\nBe kind<turn>\n{% endif %}"
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content | trim }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
BEFORE, AFTER = "<start>system\nBe kind<turn>\n<start>user\n", "<turn>\n<start>assistant\n"
TEXT = " ".join(map(str, range(100, 200)))


@pytest.fixture(params=["llama", "gemma3"])
def tokenizer(request, tiny_llama, tiny_gemma3):
    found = load_tokenizer({"llama": tiny_llama, "gemma3": tiny_gemma3}[request.param])
    found.add_special_tokens({"additional_special_tokens": ["<start>", "<turn>"]})
    found.chat_template = CHATML
    return found


def encoder(tokenizer, length, **more):
    limits = {"max_prompt_tokens": length, "max_answer_tokens": 8}
    return Encoder(tokenizer, DataSection(root="-", **limits, **more))


def pieces(tokenizer, text=TEXT):
    """The ids before, of and after a text, which are those of the whole, since special tokens and line breaks
    part them; without BOS."""
    before, own, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (BEFORE, text, AFTER)
    )
    assert tokenizer(BEFORE + text + AFTER, add_special_tokens=False)["input_ids"] == before + own + after
    return before, own, after


def cut(own, room, truncation):
    """What is left of a text's ids."""
    head = room // 2 if truncation == "middle" else 0
    return own[:head] + own[len(own) - (room - head) :]


@pytest.mark.parametrize("truncation", ["left", "middle"])
@pytest.mark.parametrize("text", [TEXT, f"\n {TEXT}  "], ids=["bare", "trimmed"])
def test_the_text_alone_is_cut(tokenizer, truncation, text):
    before, own, after = pieces(tokenizer)
    bos = [tokenizer.bos_token_id]
    framed = len(bos + before + after)
    whole = framed + len(own)
    for length in (framed + 1, framed + 2, framed + 50, whole - 1, whole):
        encoding = encoder(tokenizer, length, truncation=truncation, chat_template=True)
        ids, was_cut = encoding.prompt(text)
        left = own if length == whole else cut(own, length - framed, truncation)
        assert ids == bos + before + left + after
        assert was_cut == (length < whole)
        (example,) = encoding.encode([{"prompt": text, "answer": "7"}])
        assert example.prompt == ids, "training and generation must see the same prompt"


@pytest.mark.parametrize("truncation", ["left", "middle"])
def test_where_no_text_would_be_left_the_whole_is_cut(tokenizer, truncation):
    before, own, after = pieces(tokenizer)
    for length in (8, 1 + len(before + after)):
        encoding = encoder(tokenizer, length, truncation=truncation, chat_template=True)
        kept = cut(before + own + after, length - 1, truncation)
        assert encoding.prompt(TEXT) == ([tokenizer.bos_token_id, *kept], True)


def test_a_line_break_that_is_one_token_with_the_texts_own_stays(tokenizer):
    """A template that doesn't trim, and a tokenizer that makes one token of two line breaks."""
    tokenizer.chat_template = CHATML.replace(" | trim", "")
    tokenizer.add_tokens(["\n\n"])
    ids, _ = encoder(tokenizer, 60, chat_template=True).prompt(f"\n{TEXT}\n")
    assert tokenizer.decode(ids[1:]).startswith(f"{BEFORE}\n")
    assert tokenizer.decode(ids).endswith(f"\n{AFTER}") and len(ids) == 60


def test_chats_keep_what_the_template_writes_before_a_users_text(tokenizer):
    """Not where they begin with a system text of their own, of which nothing says where it ends."""
    turns = [
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": "8"},
        {"role": "user", "content": TEXT},
    ]
    encoding = encoder(tokenizer, 60)
    bos, start = tokenizer.bos_token_id, tokenizer(BEFORE, add_special_tokens=False)["input_ids"]
    written = render_chat(tokenizer, turns)
    whole = tokenizer(written, add_special_tokens=False)["input_ids"]
    room = 59 - len(start)
    assert encoding.prompt(written)[0] == [bos, *start, *whole[-room:]]
    own = render_chat(tokenizer, [{"role": "system", "content": "Be brief"}, *turns])
    whole = tokenizer(own, add_special_tokens=False)["input_ids"]
    assert encoding.prompt(own)[0] == [bos, *whole[-59:]]


def test_other_prompts_are_cut_as_without_a_template(tokenizer):
    given = encoder(tokenizer, 20).prompt(TEXT)
    tokenizer.chat_template = None
    assert encoder(tokenizer, 20).prompt(TEXT) == given


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, (BEFORE, AFTER)),
        ("{{ bos_token }}[INST] {{ messages[0].content | trim }} [/INST]", ("<bos>[INST] ", " [/INST]")),
        ("{{ raise_exception('no') }}", ("", "")),
        ("{{ messages[0].content | upper }}!", ("", "")),
        (None, ("", "")),
        ({"rag": CHATML, "tool_use": CHATML}, ("", "")),
    ],
)
def test_what_a_template_writes_around_a_text(tiny_llama, template, expected):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = template
    assert around_text(tokenizer) == expected

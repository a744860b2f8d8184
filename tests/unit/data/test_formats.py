"""Records as people have them, by the name of their format. Oracles: prompts written out by hand, and what
the template writes of a whole chat."""

import json

import pytest
from own_benchmark import faults, task

from codyra_llm.data.rendering import ByTemplate
from codyra_llm.data.sources import read
from codyra_llm.models.tokenizer import load_tokenizer

TEMPLATE = (
    "{% if tools %}<{% for t in tools %}{{ t.function.name }}{% endfor %}>{% endif %}{% for m in messages %}["
    "{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}!{{ c.function.name }}{{ "
    "c.function.arguments | tojson }}{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% endif %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
USER, SYSTEM, REPLY = ({"role": role, "content": role} for role in ("user", "system", "assistant"))


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def render(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    return ByTemplate(tokenizer)


def test_alpaca_has_two_prompts(tmp_path):
    """Those of tatsu-lab/stanford_alpaca, written out."""
    records = [
        {"instruction": f"Do {i}.", "input": "x" if i % 2 else "", "output": f"{i}!"} for i in range(10)
    ]
    written(tmp_path / "a.jsonl", [{k: v for k, v in r.items() if v or i % 4} for i, r in enumerate(records)])
    found = {
        row["answer"]: row["prompt"]
        for split in ("train", "eval", "test")
        for row in read(tmp_path, "T", task(files="a.jsonl", format="alpaca"), split)
    }
    assert found["1!"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nDo 1.\n\n"
        "### Input:\nx\n\n### Response:"
    )
    for number in "02":  # without the field, and with an empty one
        assert found[f"{number}!"] == (
            "Below is an instruction that describes a task. Write a response that appropriately completes "
            f"the request.\n\n### Instruction:\nDo {number}.\n\n### Response:"
        )
    own = task(files="a.jsonl", format="alpaca", prompt="{instruction}\n{input}\n>")
    assert {row["prompt"] for row in read(tmp_path, "T", own, "train")} <= {
        f"Do {i}.\nx\n>" if i % 2 else f"Do {i}.\n>" for i in range(10)
    }


def openai(messages, **fields):
    return {"messages": messages, **fields}


TURNS = [  # ShareGPT's, OpenAI's, and what the template writes up to the answer
    (
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "[user]a[assistant]",
    ),
    (
        [
            {"from": "system", "value": "s"},
            {"from": "user", "value": "a"},
            {"from": "assistant", "value": "b"},
        ],
        [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b", "refusal": None},
        ],
        "[system]s[user]a[assistant]",
    ),
    (
        [
            {"from": "human", "value": "1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "b"},
        ],
        [
            {"role": "user", "content": "1?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            {"role": "assistant", "content": "b"},
        ],
        '[user]1?[assistant]!add{"a": 1}[tool]2[assistant]',
    ),
]


@pytest.mark.parametrize("turns, messages, expected", TURNS)
def test_sharegpt_and_openai_say_the_same(tmp_path, render, turns, messages, expected):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    written(tmp_path / "s.jsonl", [{"conversations": turns, "tools": json.dumps([tools[0]["function"]])}])
    written(tmp_path / "o.jsonl", [openai(messages, tools=tools)])
    for file, name in (("s.jsonl", "sharegpt"), ("o.jsonl", "openai")):
        found = task(files={"train": file, "eval": file, "test": file}, format=name)
        example = {"prompt": f"<add>{expected}", "answer": "b", "learnt": []}
        assert read(tmp_path, "T", found, "train", render) == [example]


def test_sharegpt_has_its_system_message_as_a_field_too_and_any_name(tmp_path, render):
    written(tmp_path / "s.jsonl", [{"c": TURNS[0][0], "system": "s"}] * 1)
    found = task(files=dict.fromkeys(("train", "eval", "test"), "s.jsonl"), format="sharegpt", messages="c")
    assert read(tmp_path, "T", found, "train", render)[0]["prompt"] == "[system]s[user]a[assistant]"


@pytest.mark.parametrize(
    "name, record, expected",
    [
        ("openai", {}, "record 0: there is no 'messages', expected a list of messages"),
        (
            "openai",
            openai([USER]),
            "record 0: 'messages' must be a list of messages with the texts 'role' and",
        ),
        (
            "openai",
            openai([USER, REPLY, USER]),
            "the assistant's text, to be learnt, and its last is of role 'user'; cut it after one",
        ),
        ("openai", openai([USER, {**REPLY, "tool_calls": [CALL]}]), "its last calls a tool"),
        (
            "openai",
            openai([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, REPLY]),
            "'messages', message 0: part 0 of 'content' is of type 'image_url', expected text alone",
        ),
        ("openai", openai([{"role": "user", "content": None}, REPLY]), "message 0 has null as 'content'"),
        (
            "openai",
            openai([{"role": "user", "content": "a"}, "b"]),
            "message 1 must have the texts 'role' and 'content'",
        ),
        ("openai", openai(TURNS[0][0]), "It looks like ShareGPT's; give format: sharegpt."),
        (
            "openai",
            openai([USER, {"role": "assistant", "function_call": {"name": "a"}}, REPLY]),
            "message 1 has a 'function_call', the old form",
        ),
        (
            "openai",
            openai(
                [
                    USER,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "a", "arguments": "{"}}],
                    },
                    REPLY,
                ]
            ),
            "message 1: the arguments of 'a' can't be read as JSON",
        ),
        (
            "openai",
            openai([USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}, REPLY]),
            "message 1 calls a tool without a 'name'",
        ),
        ("openai", openai([USER, REPLY], tools="x"), "'tools' can't be read as JSON"),
        ("sharegpt", {"conversations": TURNS[0][1]}, "It looks like OpenAI's; give format: openai."),
        (
            "sharegpt",
            {"conversations": [{"from": "humn", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "message 0 is from 'humn', which is not known. Did you mean 'human'?",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}]},
            "message 0 has a int as 'value'",
        ),
    ],
)
def test_a_chat_is_refused_with_the_part_that_is_wrong(tmp_path, render, name, record, expected):
    written(tmp_path / "a.jsonl", [record])
    (message,) = faults(read, tmp_path, "T", task(files="a.jsonl", format=name), "train", render)
    assert expected in message and str(tmp_path) in message


def test_a_template_that_writes_no_tool_calls_is_refused(tmp_path, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    written(tmp_path / "a.jsonl", [openai(TURNS[2][1])])
    found = task(files="a.jsonl", format="openai")
    (message,) = faults(read, tmp_path, "T", found, "train", ByTemplate(tokenizer))
    assert "the model's chat template refuses 'messages' (it writes no tool_calls); correct it, or" in message


def test_a_template_that_leaves_a_text_out_is_refused(tmp_path, tiny_llama):
    """As Phi 3's first one did with a system's text. A tool's reply may be written as JSON."""
    tokenizer = load_tokenizer(tiny_llama)
    writes = "{% if m.role == 'ROLE' %}[{{ m.content }}]{% endif %}"
    roles = "".join(writes.replace("ROLE", role) for role in ("user", "assistant"))
    json_reply = "{% if m.role == 'tool' %}{{ m.content | tojson }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + roles + json_reply + "{% endfor %}"
    files, reply = dict.fromkeys(("train", "test"), "a.jsonl"), {"role": "tool", "content": '"Größe"\n'}
    written(tmp_path / "a.jsonl", [openai([SYSTEM, USER, REPLY]), openai([USER, REPLY, reply, REPLY])])
    (message,) = faults(
        read, tmp_path, "T", task(files=files, format="openai"), "train", ByTemplate(tokenizer)
    )
    assert (
        "record 0: the model's chat template leaves out the text of message 0, whose role is 'system'"
        in message
    )


def test_every_turn_of_the_assistants_is_learnt_and_the_last_is_scored(tmp_path, tiny_llama):
    """In one sequence, each turn with its end, that of a tool call too."""
    tokenizer = load_tokenizer(tiny_llama)
    end = "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    tokenizer.chat_template = TEMPLATE.replace(
        "{% endfor %}{% endfor %}{% if", f"{{% endfor %}}{end}{{% endfor %}}{{% if"
    )
    render = ByTemplate(tokenizer)
    chat = [
        SYSTEM,
        USER,
        REPLY,
        *TURNS[2][1],
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    chats = [openai([*chat[:-1], {"role": "assistant", "content": f"d{i}"}], id=i) for i in range(2)]
    written(tmp_path / "a.jsonl", chats)
    written(tmp_path / "e.jsonl", chats[:1])
    files = {"train": "a.jsonl", "eval": "e.jsonl", "test": "e.jsonl"}
    found = read(tmp_path, "T", task(files=files, format="openai", train_on="assistant"), "train", render)
    assert [row["answer"] for row in found] == ["d0", "d1"]
    for row in found:
        learnt = [row["prompt"][start:stop] for start, stop in row["learnt"]]
        assert learnt == ["assistant<eos>", '!add{"a": 1}<eos>', "b<eos>"]
    last = read(tmp_path, "T", task(files=files, format="openai", train_on="assistant"), "test", render)
    assert last == [{"prompt": found[0]["prompt"], "answer": "d0", "learnt": []}]


def test_turns_of_one_chat_stay_in_one_split(tmp_path, render):
    written(
        tmp_path / "a.jsonl",
        [
            openai([{"role": "user", "content": f"{i}"}, REPLY, USER, {"role": "assistant", "content": "b"}])
            for i in range(20)
        ],
    )
    found = task(files="a.jsonl", format="openai", train_on="assistant")
    firsts = [
        {row["prompt"].split("]")[1].split("[")[0] for row in read(tmp_path, "T", found, split, render)}
        for split in ("train", "eval", "test")
    ]
    assert [len(first) for first in firsts] == [14, 2, 4] and len(set.union(*firsts)) == 20
    assert len(read(tmp_path, "T", found, "train", render)) == 14

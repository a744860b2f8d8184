"""A stream of one's own: every source gives the same examples, splits don't leak, faults come together, and a
benchmark that isn't TRACE goes the whole way. Oracles: the rows that were written, splits recomputed,
texts written out by hand."""

import hashlib
import json
import random
import re
import shutil

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers import ROOT
from own_benchmark import PROTOCOL, ROWS, faults, folder, task, written

from codyra_llm.config.benchmark import Benchmark, Protocol, load_benchmark
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.task import Task
from codyra_llm.data.rendering import ByTemplate
from codyra_llm.data.sources import divided, read
from codyra_llm.experiment.setup import prepare
from codyra_llm.metrics.text import METRICS
from codyra_llm.models.tokenizer import load_tokenizer, render_chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ "
    "raise_exception('late') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if "
    "add_generation_prompt %}[assistant]{% endif %}"
)


def every(root, found):
    return {split: read(root, "T", found, split) for split in ("train", "eval", "test")}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_every_format_gives_the_rows_that_were_written(tmp_path, suffix):
    parts = {"train": ROWS[:12], "eval": ROWS[12:15], "test": ROWS[15:]}
    for split, rows in parts.items():
        written(tmp_path / f"{split}.{suffix}", rows)
        written(tmp_path / "named" / f"{split}.{suffix}", rows, ("question", "label"))
    assert every(tmp_path, task(files={split: f"{split}.{suffix}" for split in parts})) == parts
    named = {
        "files": {split: f"named/{split}.{suffix}" for split in parts},
        "columns": {"prompt": "question", "answer": "label"},
    }
    assert every(tmp_path, task(**named)) == parts


def test_one_file_of_any_format_gives_the_same_splits(tmp_path):
    for suffix in ("json", "jsonl", "csv"):
        written(tmp_path / f"all.{suffix}")
    written(tmp_path / "set" / "train.jsonl")
    one, *others = (every(tmp_path, task(files=f"all.{suffix}")) for suffix in ("json", "jsonl", "csv"))
    assert all(other == one for other in [*others, every(tmp_path, task(dataset="set"))])
    assert [len(one[split]) for split in ("train", "eval", "test")] == [14, 2, 4]
    assert sorted(str(row) for rows in one.values() for row in rows) == sorted(map(str, ROWS))
    keys = {
        row["prompt"]: hashlib.sha256(" ".join(row["prompt"].split()).casefold().encode()).hexdigest()
        for row in ROWS
    }
    assert {row["prompt"] for row in one["test"]} == set(sorted(keys, key=keys.get)[:4])


def test_the_layout_of_trace_is_read_where_nothing_is_declared(tmp_path):
    for split in ("train", "eval", "test"):
        written(tmp_path / "T" / f"{split}.json")
    assert every(tmp_path, task()) == dict.fromkeys(("train", "eval", "test"), ROWS)


def test_splits_do_not_leak_and_do_not_depend_on_the_order():
    prompts = [f"Say {i % 30}" for i in range(50)] + [f"  say\n{i} " for i in range(30)]
    of = dict(zip(prompts, divided(prompts, ["test", "eval"]), strict=True))
    for i in range(30):
        assert of[f"Say {i}"] == of[f"  say\n{i} "]
    assert [sum(of[f"Say {i}"] == split for i in range(30)) for split in ("test", "eval", "train")] == [
        6,
        3,
        21,
    ]
    composed, apart = "Größe é", "Gro\u0308ße e\u0301"  # as most systems write it, and as macOS names files
    prompts += [f"{composed} {i}" for i in range(30)] + [f"{apart} {i}" for i in range(30)]
    of = dict(zip(prompts, divided(prompts, ["test", "eval"]), strict=True))
    assert all(of[f"{composed} {i}"] == of[f"{apart} {i}"] for i in range(30))
    mixed = random.Random(0).sample(prompts, len(prompts))
    assert dict(zip(mixed, divided(mixed, ["test", "eval"]), strict=True)) == of
    assert set(divided(prompts, [])) == {"train"} and divided(prompts, ["eval"]).count("test") == 0


def test_a_split_that_is_given_is_left_alone(tmp_path):
    written(tmp_path / "a.csv", ROWS[:10])
    written(tmp_path / "b.csv", ROWS[10:])
    found = every(tmp_path, task(files={"train": "a.csv", "test": "b.csv"}))
    assert found["test"] == ROWS[10:] and len(found["eval"]) == 1 and len(found["train"]) == 9
    assert found["eval"][0] not in found["train"] and found["eval"][0] in ROWS[:10]


def test_numbers_of_classes_become_names_and_whole_numbers_text(tmp_path):
    (tmp_path / "set").mkdir()
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["no", "yes"]), "year": Value("int64")}
    )
    rows = Dataset.from_dict({"text": list("abc"), "label": [1, 0, 1], "year": [3, 4, 5]}, features=features)
    for split in ("train", "validation", "test"):
        rows.to_parquet(tmp_path / "set" / f"{split}.parquet")
    found = every(tmp_path, task(dataset="set", columns={"prompt": "text", "answer": "label"}))
    assert found["eval"] == [
        {"prompt": p, "answer": a} for p, a in zip("abc", ("yes", "no", "yes"), strict=True)
    ]
    years = task(
        dataset={"path": "set", "splits": {"train": "validation", "test": "train"}},
        columns={"prompt": "text", "answer": "year"},
    )
    assert [row["answer"] for row in every(tmp_path, years)["test"]] == ["3", "4", "5"]
    (message,) = faults(
        read, tmp_path, "T", task(dataset={"path": "set", "splits": {"test": "tset"}}), "test"
    )
    assert "'tset' is not a split of set. Did you mean 'test'?" in message


def test_a_data_set_that_can_not_be_had_is_one_sentence(tmp_path):
    (message,) = faults(read, tmp_path, "T", task(dataset="nobody/nothing-at-all"), "train")
    assert (
        message.startswith("tasks.T.dataset: 'nobody/nothing-at-all' can't be read (")
        and "HF_HUB_OFFLINE" in message
    )


def test_a_data_set_of_a_script_is_one_sentence(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("import datasets\n")
    (message,) = faults(read, tmp_path, "T", task(dataset="set"), "train")
    assert message.startswith("tasks.T.dataset: 'set' can't be read (Dataset scripts are no longer supported")


def chats(path, count=10):
    rows = [
        {
            "chat": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": f"Say {i}"},
                {"role": "assistant", "content": "AB"[i % 2]},
            ]
        }
        for i in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_chats_are_written_by_the_template_and_split_without_it(tmp_path, tiny_llama):
    chats(tmp_path / "c.jsonl")
    found, tokenizer = task(files="c.jsonl", messages="chat"), load_tokenizer(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    told = read(tmp_path, "T", found, "test", ByTemplate(tokenizer))
    assert len(told) == 2 and {row["prompt"] for row in told} < {
        f"<bos>[system]Be kind.[user]Say {i}[assistant]" for i in range(10)
    }
    assert all(row["answer"] == "AB"[int(row["prompt"].split("Say ")[1][0]) % 2] for row in told)
    plain = read(tmp_path, "T", found, "test")
    assert [row["prompt"].split("Say ")[1][0] for row in plain] == [
        row["prompt"].split("Say ")[1][0] for row in told
    ]
    rows = [
        {
            "chat": [
                {"role": "user", "content": "a"},
                {"role": "system", "content": "b"},
                {"role": "assistant", "content": "c"},
            ]
        },
        {"chat": [{"role": "user", "content": "a"}]},
        {"chat": "a"},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = faults(read, tmp_path, "T", found, "train", ByTemplate(tokenizer))
    assert len(messages) == 3 and "record 0: the model's chat template refuses 'chat' (late)" in messages[0]
    assert all(f"record {i}: 'chat' must be a list of messages" in messages[i] for i in (1, 2))


def test_what_is_beside_role_and_content_is_no_part_of_a_prompt(tmp_path):
    rows = [
        {
            "chat": [
                {"id": i, "role": "user", "content": f"Say {i % 10}" + " \n" * (i % 3)},
                {"role": "assistant", "content": "a"},
            ]
        }
        for i in range(40)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = every(tmp_path, task(files="c.jsonl", messages="chat"))
    prompts = {split: {row["prompt"].strip() for row in rows} for split, rows in found.items()}
    assert {split: len(own) for split, own in prompts.items()} == {"train": 7, "eval": 1, "test": 2}
    assert len(set.union(*prompts.values())) == 10


@pytest.mark.parametrize(
    "start",
    [
        "",
        "\n",
        " ",
        "\n  {% if 1 %}\n{% endif %}",
        "  {% if 1 %}\n{% endif %}",
        "{{- 1 }} \n",
        "{%- if 1 %} {% endif %}",
    ],
)
def test_a_template_without_a_date_writes_what_it_writes_alone(tiny_llama, start):
    tokenizer, said = load_tokenizer(tiny_llama), [{"role": "user", "content": "a"}]
    tokenizer.chat_template = start + TEMPLATE
    plain = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, said) == plain and plain.endswith("<bos>[user]a[assistant]")


@pytest.mark.parametrize(
    "template, told",
    [
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif "
            "%}Today: {{ date_string }}.",
            "Today: 26 Jul 2024.",
        ),
        ("Today: {{ strftime_now('%Y') }}.", None),
        ("{% set date_string = strftime_now('%Y') %}{{ date_string }}", None),
    ],
)
def test_prompts_do_not_change_from_day_to_day(tmp_path, tiny_llama, template, told):
    """The first is Llama 3.2's way; what writes today's date all the same is refused, for chats and
    `data.chat_template`.
    """
    shutil.copytree(tiny_llama, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(
        template + "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    chats(tmp_path / "b" / "one.jsonl")
    name = folder(
        tmp_path / "b",
        tasks={
            "ONE": {"metrics": ["rouge_l"], "files": "one.jsonl", "messages": "chat"},
            "TWO": {"metrics": ["rouge_l"], "files": "one.csv"},
        },
    )
    for number, settings in enumerate([{"tasks": ["ONE"]}, {"tasks": ["TWO"], "chat_template": True}]):
        asked = parse_recipe(
            {
                "model": {"path": str(tmp_path / "m")},
                "data": {"benchmark": name, **settings},
                "method": "none",
                "output": str(tmp_path / "o"),
            }
        )
        if told is None:
            assert all(
                "it writes today's date" in message or "more faults" in message
                for message in faults(prepare, asked)
            )
        else:
            setup = prepare(asked)
            ids = setup.encoder.prompt(setup.stream.records(0, "test")[0]["prompt"])[0]
            assert setup.tokenizer.decode(ids, skip_special_tokens=True).startswith(
                told + ["Be kind.", "Say"][number]
            )


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.csv", "prompt,answer\na,b,c\n", "record 0 has 3 values, the first line names 2"),
        ("a.csv", "prompt,prompt\na,b\n", "the column 'prompt' is there twice"),
        ("a.csv", 'prompt,answer\n"a,b\n', "is not CSV"),
        ("a.csv", "", "is empty, expected records of the train data of task 'T'"),
        ("a.csv", "prompt,answer\n", "holds no record"),
        (
            "a.csv",
            "promt,answer\na,b\n",
            "record 0 has no 'prompt', expected a string; add it. Did you mean 'promt'?",
        ),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt"\n', "a.jsonl, line 2: invalid JSON"),
        ("a.jsonl", '{"prompt": "a", "answer": 1.10}\n', "record 0: 'answer' is a float"),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}\n' * 9, "too few different prompts"),
        ("a.txt", "a", "must end in .json, .jsonl, .csv"),
        ("b.csv", "", "a.csv can't be read (No such file or directory)"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    (message,) = faults(read, tmp_path, "T", task(files=name if name != "b.csv" else "a.csv"), "train")
    assert expected in message and str(tmp_path) in message


def test_the_page_names_every_metric_and_key():
    page = (ROOT / "docs" / "own_data.md").read_text("utf-8")
    names = re.findall(r"`(\w+)`", page[page.index("- `metrics`") : page.index("All are reported")])
    assert set(names) == {"metrics", *METRICS}
    assert all(
        f"`{key}" in page
        for schema in (Task, Benchmark, Protocol)
        for key in schema.model_fields
        if key != "tasks"
    )


def test_all_faults_of_a_benchmark_come_at_once(tmp_path):
    name = folder(
        tmp_path,
        tasks={
            "ONE": {"metrics": ["exact_mach"], "epoch": 2},
            "TWO": {"metrics": ["sari"], "files": {"trian": "a.csv"}},
            "THREE": {"metrics": ["rouge_l"], "headline": "rouge", "messages": "chat"},
            "FOUR": {"epochs": True},
        },
        protocols={"short": {**PROTOCOL, "schedule": "cosin"}},
    )
    text = "\n".join(faults(load_benchmark, name))
    for expected in (
        "tasks.ONE.metrics: 'exact_mach' is not a metric. Did you mean 'exact_match'?",
        "unknown key 'tasks.ONE.epoch' (value 2). Did you mean 'epochs'?",
        "unknown key 'tasks.TWO.files.trian' (value 'a.csv'). Did you mean 'train'?",
        "tasks.THREE: headline: 'rouge' is none of the task's metrics (rouge_l). Did you mean 'rouge_l'?",
        "tasks.THREE: 'messages' goes with 'files' or 'dataset'",
        "'tasks.FOUR.metrics' is missing",
        "tasks.FOUR.epochs: true is not a number",
        "protocols.short.schedule: 'cosin' is not valid",
    ):
        assert expected in text
    name = folder(tmp_path, orders={"1": ["ONE", "TOW"], "2": []})
    assert [
        "orders.1: 'TOW' is not a task" in m or "orders.2" in m for m in faults(load_benchmark, name)
    ] == [True, True]


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            {"protocol": "shrt"},
            "data.protocol: 'shrt' is not a protocol of {}. Did you mean 'short'? Known: short, long",
        ),
        ({"tasks": ["ONEE"]}, "data.tasks: 'ONEE' is not a task of {}. Did you mean 'ONE'? Known: ONE"),
        ({"tasks": 2}, "data.tasks: there is no order 2; choose from [1]"),
        (
            {"benchmark": "trase"},
            "data.benchmark: 'trase' is neither one of trace, olora, superni nor a folder that holds a "
            "benchmark.yaml. Did you mean 'trace'?",
        ),
        ({"benchmark": "trace"}, "data: 'root' is missing"),
    ],
)
def test_a_recipe_names_what_is_there(tmp_path, change, expected):
    name = folder(tmp_path)
    raw = {"model": {"path": "m"}, "data": {"benchmark": name, **change}, "method": "none", "output": "o"}
    assert any(expected.format(name) in message for message in faults(lambda: parse_recipe(raw).resolved()))


def test_a_folder_with_braces_in_its_name(tmp_path):
    name = folder(tmp_path / "{a}{}")
    raw = {
        "model": {"path": "m"},
        "data": {"benchmark": name, "tasks": ["ONEE"]},
        "method": "none",
        "output": "o",
    }
    (message,) = faults(parse_recipe(raw).resolved)
    assert message.startswith(f"data.tasks: 'ONEE' is not a task of {name}. Did you mean 'ONE'?")


def test_the_benchmark_fills_what_a_recipe_leaves_open(tmp_path):
    name = folder(tmp_path)
    raw = {"model": {"path": "m"}, "data": {"benchmark": name}, "method": "none", "output": "o"}
    found = parse_recipe(raw).resolved()
    assert (found.data.protocol, found.data.root, found.tasks, found.epochs) == ("short", name, ["ONE"], [2])
    assert (found.data.max_prompt_tokens, found.optim.lr, found.optim.batch_size) == (64, 0.01, 32)
    assert found.eval.max_new_tokens == {"ONE": 2} and found.resolved() == found
    assert parse_recipe(found.model_dump(mode="json")) == found
    shutil.rmtree(
        tmp_path
    )  # what is resolved is read without its benchmark: reports need the run folder alone
    assert parse_recipe(found.model_dump(mode="json")) == found


def test_prepare_refuses_a_chat_without_a_template_or_with_two(tmp_path, tiny_llama):
    name = folder(
        tmp_path / "b", tasks={"ONE": {"metrics": ["rouge_l"], "files": "one.jsonl", "messages": "chat"}}
    )
    chats(tmp_path / "b" / "one.jsonl")
    raw = {
        "model": {"path": str(tiny_llama)},
        "data": {"benchmark": name},
        "method": "none",
        "output": str(tmp_path / "o"),
    }
    assert "has no chat template to write the messages of ONE with" in faults(prepare, parse_recipe(raw))[0]
    shutil.copytree(tiny_llama, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(TEMPLATE)
    raw["model"]["path"] = str(tmp_path / "m")
    setup = prepare(parse_recipe(raw))
    (first, *_), tokenizer = setup.stream.records(0, "test"), setup.tokenizer
    assert first["prompt"].startswith("<bos>[system]Be kind.[user]Say")
    assert setup.encoder.prompt(first["prompt"])[0].count(tokenizer.bos_token_id) == 1
    raw["data"]["chat_template"] = True
    assert "the chats of ONE are written by the template already" in faults(prepare, parse_recipe(raw))[0]

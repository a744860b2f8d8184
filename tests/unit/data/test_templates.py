"""Prompts that a template makes of columns. Oracle: prompts written out by hand."""

import json
import shutil

import pytest
from own_benchmark import faults, folder, task

from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.config.template import parse
from codyra_llm.data.check import check
from codyra_llm.data.sources import read, remarks

ALPACA = "{instruction}\n{input}\nAnswer:\n"


@pytest.mark.parametrize(
    "text, values, expected",
    [
        (ALPACA, {"instruction": "Add.", "input": "1 2"}, "Add.\n1 2\nAnswer:\n"),
        (ALPACA, {"instruction": "Add.", "input": ""}, "Add.\nAnswer:\n"),
        (ALPACA, {"instruction": "Add.", "input": " \n"}, "Add.\nAnswer:\n"),
        (ALPACA, {"instruction": "Add."}, "Add.\nAnswer:\n"),
        ("a\n\n{x}\n\nb", {}, "a\n\n\nb"),  # lines without columns stay
        ("{x}", {"x": "1\n\n2 "}, "1\n\n2 "),  # a text is not touched
        ("{x} and {y}", {"y": "2"}, " and 2"),  # one column has text, so the line stays
        ("{x}[[ ({y})]]?", {"x": "1", "y": "2"}, "1 (2)?"),
        ("{x}[[ ({y})]]?", {"x": "1"}, "1?"),
        ("{x}[[ ({y})]]?\nb", {"y": "2"}, "b"),  # columns in brackets don't count for their line
        ("[[Hint: {y}]]\nb", {}, "b"),  # nothing is left of the line
        ("[[Hint: {y}]]\nb", {"y": "2"}, "Hint: 2\nb"),
        ("[[{x}]][[{y}]]", {"y": "2"}, "2"),
        ("[INST] [{x}] [[0, 1]] [/INST]", {"x": "1"}, "[INST] [1] [[0, 1]] [/INST]"),
        ('{{"a": {x}}}', {"x": "1"}, '{"a": 1}'),
        ("{Problem Text}", {"Problem Text": "{x}"}, "{x}"),  # what is put in is not a template
    ],
)
def test_what_has_no_text_leaves_no_trace(text, values, expected):
    assert parse(text).fill(lambda name: values.get(name, "")) == expected


def test_the_columns_of_a_template_are_named_once():
    assert parse("{b}\n[[{a} {b}]]{{c}}").columns == ("b", "a")


@pytest.mark.parametrize("text", ["{x", "x}", "{}", "{{x}", "{x}}"])
def test_a_brace_without_a_partner_is_refused(text):
    with pytest.raises(ValueError, match="has no partner; write {name} for a column"):
        parse(text)


def rows(path, records, name="a.jsonl"):
    path.mkdir(exist_ok=True)
    (path / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def every(root, found):
    return [row for split in ("train", "eval", "test") for row in read(root, "T", found, split)]


def test_columns_constants_and_labels_make_a_prompt(tmp_path):
    records = [
        {
            "text": f"{i}",
            "n": i,
            "choices": ["a", "b", 3],
            "note": None,
            "deep": {"er": [f"<{i}>"]},
            "label": i % 2,
        }
        for i in range(10)
    ]
    rows(tmp_path, records)
    found = task(
        files="a.jsonl",
        prompt="{task} {labels}?\n{note}\n{text} {n} {choices} {deep.er.0}",
        constants={"task": "Sort:", "text": "never, since records have it"},
        labels=["no", "yes"],
        columns={"answer": "label"},
    )
    made = every(tmp_path, found)
    expected = [
        {"prompt": f"Sort: no, yes?\n{i} {i} a, b, 3 <{i}>", "answer": ["no", "yes"][i % 2]}
        for i in range(10)
    ]
    assert sorted(map(str, made)) == sorted(map(str, expected))


@pytest.mark.parametrize("name, content", [("l.json", '["no", "yes"]'), ("l.txt", "no\n\nyes\n")])
def test_labels_lie_in_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{i},{i % 2}\n" for i in range(10)))
    found = task(files="a.csv", prompt="{text} {labels}", labels=name, columns={"answer": "label"})
    assert {row["answer"] for row in every(tmp_path, found)} == {"no", "yes"}
    assert all(row["prompt"].endswith("no, yes") for row in every(tmp_path, found))


def test_records_lie_in_a_field_of_an_object_and_get_its_other_fields(tmp_path):
    """Super-NaturalInstructions' layout."""
    instances = [{"id": str(i), "input": f"<{i}>", "output": [str(i)]} for i in range(10)]
    given = {"Definition": ["Say it."], "Instances": instances, "Positive Examples": [], "id": "never"}
    (tmp_path / "a.json").write_text(json.dumps(given))
    found = task(
        files="a.json",
        records="Instances",
        prompt="{Definition} {id}\n{input}",
        columns={"answer": "output"},
    )
    expected = [{"prompt": f"Say it. {i}\n<{i}>", "answer": str(i)} for i in range(10)]
    assert sorted(map(str, every(tmp_path, found))) == sorted(map(str, expected))
    (message,) = faults(read, tmp_path, "T", task(files="a.json"), "train")
    assert "holds an object" in message and "records: " in message and "Instances" in message
    (message,) = faults(read, tmp_path, "T", task(files="a.json", records="Instance"), "train")
    assert "has no field 'Instance', which 'records' names. Did you mean 'Instances'?" in message


def test_splits_are_those_of_the_prompts_that_are_made(tmp_path):
    rows(tmp_path, [{"a": f"{i % 7}", "b": "x", "answer": str(i)} for i in range(70)])
    found = task(files="a.jsonl", prompt="{a} {b}")
    prompts = [
        {row["prompt"] for row in read(tmp_path, "T", found, split)} for split in ("train", "eval", "test")
    ]
    assert [len(own) for own in prompts] == [5, 1, 1] and len(set.union(*prompts)) == 7


@pytest.mark.parametrize(
    "given, record, expected",
    [
        (
            {"prompt": "{txt}"},
            {"text": "a", "answer": "b"},
            "no record has 'txt', which the prompt names in benchmark.yaml. Did you mean 'text'?",
        ),
        (
            {"prompt": "{text}"},
            {"text": 1.5, "answer": "b"},
            "record 0: 'text' is a float, expected a string",
        ),
        (
            {"prompt": "{text}"},
            {"text": ["a", {}], "answer": "b"},
            "record 0: 'text' is an object with no field",
        ),
        ({"prompt": "{text}"}, {"text": "a\0", "answer": "b"}, "record 0: 'prompt' holds a NUL character"),
        ({"prompt": "{text}"}, {"text": "a"}, "record 0 has no 'answer', expected a string"),
        (
            {"prompt": "{text}[[{more}]] {x}", "constants": {"x": "y"}},
            {"text": " ", "more": None, "answer": "b"},
            "record 0 has no text in 'text', 'more', of which the prompt is made; fill in one, or remove",
        ),
        (
            {"prompt": "{text}"},
            {"text": "a", "answer": ["b", "c"]},
            "record 0: 'answer' is a list of 2, expected a string; give one of them, or name it in "
            "benchmark.yaml, such as columns: {answer: answer.0}.",
        ),
        ({"prompt": "{text}"}, {"text": "a", "answer": {"x": "b"}}, "such as columns: {answer: answer.x}."),
        (
            {"prompt": "{text}"},
            {"text": "a", "answer": None},
            "record 0: 'answer' is null, expected a string; fill it in",
        ),
        (
            {"prompt": "{text}", "labels": ["n", "y"]},
            {"text": "a", "answer": -1},
            "record 0: 'answer' is -1, the mark of a label that is kept secret; give a split",
        ),
        (
            {"prompt": "{text}", "labels": ["n", "y"]},
            {"text": "a", "answer": 2},
            "record 0: 'answer' is '2', which is none of the labels, n, y",
        ),
        (
            {"prompt": "{text}", "labels": ["n", "y"]},
            {"text": "a", "answer": "maybe"},
            "'answer' is 'maybe', which is none of the labels",
        ),
        (
            {"prompt": "{text}", "labels": "l.json"},
            {"text": "a", "answer": "b"},
            "l.json can't be read (No such file or directory); give the labels of task 'T'",
        ),
    ],
)
def test_each_fault_of_a_record_is_one_sentence(tmp_path, given, record, expected):
    rows(tmp_path, [record])
    (message,) = faults(read, tmp_path, "T", task(files="a.jsonl", **given), "train")
    assert expected in message and str(tmp_path) in message


def test_labels_that_are_numbers_are_not_counted(tmp_path):
    """Of ratings from 1 to 5, 0 is a mistake, not the number of the first: 1 would be the second."""
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,3\nc,5\n")
    found = task(files="a.csv", prompt="{text}", labels=[1, 2, 3, 4, 5], columns={"answer": "label"})
    answers = [read(tmp_path, "T", found, split)[0]["answer"] for split in ("train", "eval", "test")]
    assert sorted(answers) == ["1", "3", "5"]
    (tmp_path / "a.csv").write_text("text,label\na,0\nb,3\nc,5\n")
    assert (
        "'label' is '0', which is none of the labels, 1, 2" in faults(read, tmp_path, "T", found, "train")[0]
    )


def test_labels_outside_of_train_are_counted(tmp_path):
    """As MNLI's test data has some without a label, "-"."""
    rows(tmp_path / "b", [{"text": f"{i}", "answer": "ny"[i % 2]} for i in range(9)])
    rows(tmp_path / "b", [{"text": f"t{i}", "answer": "ny-"[i % 3]} for i in range(9)], "t.jsonl")
    name = folder(
        tmp_path / "b",
        tasks={
            "ONE": {
                "metrics": ["exact_match"],
                "files": {"train": "a.jsonl", "test": "t.jsonl"},
                "prompt": "{text} {labels}",
                "labels": ["n", "y"],
            }
        },
    )
    report = check(tmp_path / "b")
    assert name == str(tmp_path / "b") and not report["faults"]
    assert report["warnings"] == ["b/ONE/test: 3 of 9 records have an answer that is none of the labels."]


def test_a_label_that_train_does_not_have_is_told(tmp_path):
    rows(tmp_path / "b", [{"text": f"{i}", "answer": "n"} for i in range(9)])
    rows(tmp_path / "b", [{"text": f"t{i}", "answer": "nyy"[i % 3]} for i in range(9)], "t.jsonl")
    files = {"train": "a.jsonl", "eval": "a.jsonl", "test": "t.jsonl"}
    task = {"metrics": ["exact_match"], "files": files, "prompt": "{text} {labels}", "labels": ["n", "y"]}
    folder(tmp_path / "b", tasks={"ONE": task})
    assert check(tmp_path / "b")["warnings"] == [
        "b/ONE: 6 of 9 records of test have the answer 'y', which no record of train has.",
        "b/ONE: train and eval share 9 prompts (9 and 9 distinct).",
    ]


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"prompt": "{a"}, "tasks.ONE.prompt: the '{' in '{a' has no partner"),
        ({"prompt": "a"}, "tasks.ONE.prompt: 'a' names no column; write {name} where a column's text goes"),
        (
            {"prompt": "{a}", "columns": {"prompt": "b"}},
            "'columns.prompt' and 'prompt' both say what the prompt is",
        ),
        ({"format": "alpaca", "columns": {"prompt": "b"}}, "'columns.prompt' and 'format' both say"),
        ({"format": "alpaca", "messages": "b"}, "'messages' and 'format: alpaca' both say"),
        (
            {"format": "openai", "prompt": "{b}"},
            "'prompt' and 'format: openai' both say what prompt and answer are",
        ),
        ({"messages": "m", "columns": {"answer": "b"}}, "'columns' and 'messages' both say"),
        ({"constants": {"a": "b"}}, "'constants' are for a 'prompt' with {columns}"),
        ({"train_on": "assistant"}, "'train_on: assistant' is about chats"),
        ({"labels": [True]}, "tasks.ONE.labels.names: True is not the text of a label; put it in quotes"),
        ({"format": "alpacca"}, "tasks.ONE.format: 'alpacca' is not valid"),
        ({"delimiter": ";;"}, "tasks.ONE.delimiter: ';;' is not valid"),
        (
            {"files": None, "dataset": "d", "records": "r"},
            "'records' is about files, and the data is a 'dataset'",
        ),
        (
            {"files": None, "prompt": "{a}", "labels": ["b"]},
            "'prompt' and 'labels' go with 'files' or 'dataset'",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, given, expected):
    tasks = {"ONE": {"metrics": ["rouge_l"], "files": "one.csv", **given}}
    (message,) = faults(load_benchmark, folder(tmp_path, tasks=tasks))
    assert expected in message


def test_training_records_without_an_answer_are_left_out_where_that_is_asked(tmp_path):
    answers = ["b", "", None, [""], "b", "b"]
    rows(tmp_path, [{"prompt": f"{i}", "answer": answer} for i, answer in enumerate(answers)])
    files = dict.fromkeys(("train", "eval", "test"), "a.jsonl")
    assert len(faults(read, tmp_path, "T", task(files="a.jsonl"), "train")) == 3
    found = read(tmp_path, "T", task(files={"train": "a.jsonl"}, skip_empty=True), "train")
    assert {row["prompt"] for row in found} < {"0", "4", "5"}
    asked = task(files=files, skip_empty=True)
    assert [row["prompt"] for row in read(tmp_path, "T", asked, "train")] == ["0", "4", "5"]
    (note,) = remarks(tmp_path, "T", asked)
    assert note == f"tasks.T: {tmp_path / 'a.jsonl'}: 3 of 6 records have no answer, and are left out"
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "set" / "train.jsonl")
    (note,) = remarks(tmp_path, "T", task(dataset="set", skip_empty=True))
    assert note == "tasks.T: set (train): 3 of 6 records have no answer, and are left out"
    assert len(faults(read, tmp_path, "T", asked, "test")) == 1  # null is not an answer that can be scored

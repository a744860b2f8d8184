"""Files as people have them. Oracle: the rows that were written."""

import gzip
import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers import call
from own_benchmark import faults, folder, task

from codyra_llm.data.check import check
from codyra_llm.data.readers import Reading, found, kind, rows, stem
from codyra_llm.data.sources import read, remarks

ROWS = [{"prompt": f"a{i}", "answer": "xy"[i % 2]} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def table(delimiter, quote=""):
    return "".join(
        delimiter.join(f"{quote}{value}{quote}" for value in values) + "\n"
        for values in (ROWS[0], *(row.values() for row in ROWS))
    )


@pytest.mark.parametrize(
    "name, content, remark",
    [
        ("a.json", json.dumps(ROWS), ""),
        ("a.json", LINES, "has one record in each line (JSON Lines)"),
        ("a.json", "\n" + LINES.replace("\n", "\r\n\r\n"), "has one record in each line (JSON Lines)"),
        ("a.jsonl", LINES, ""),
        ("a.jsonl", json.dumps(ROWS, indent=1), "holds one JSON list"),
        ("a.JSONL", LINES, ""),
        ("a.csv", table(","), ""),
        ("a.csv", table(";"), "has semicolons between its columns"),
        ("a.csv", table("\t"), "has tabs between its columns"),
        ("a.csv", "\ufeff" + table("|"), "has bars between its columns"),
        ("a.csv", "\ufeff" + table(";") + ";\n\n;\r\n", "has semicolons between its columns"),
        ("a.csv", "\ufeffsep=;\r\n" + table(";", '"'), "has semicolons between its columns"),
        ("a.csv", "SEP=*\n" + table("*"), "has '*' between its columns"),
        ("a.csv", "sep=,\n" + table(","), ""),
        ("a.csv", table(", ", '"'), "has spaces in front of its quotes"),
        ("a.csv", table("; ", '"'), "has spaces in front of its quotes"),
        ("a.tsv", table("\t"), ""),
        ("a.tsv", table("\t", '"'), ""),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), ""),
        ("a.json.gz", gzip.compress(LINES.encode(), mtime=0), "has one record in each line (JSON Lines)"),
        ("a.csv.gz", gzip.compress(table(";").encode(), mtime=0), "has semicolons between its columns"),
    ],
)
def test_a_file_is_read_as_what_it_is(tmp_path, name, content, remark):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    got = found(path, "records")
    assert got.rows == ROWS and rows(path, "records") == ROWS
    assert (remark in got.remark and got.remark.startswith(str(path))) if remark else got.remark == ""
    assert stem(path) == "a" and kind(path)


def test_the_columns_that_are_used_say_which_delimiter_it_is(tmp_path):
    (tmp_path / "a.csv").write_text("text, or none;label\na, b;c\n")
    used = Reading(used=frozenset(["label"]))
    assert rows(tmp_path / "a.csv", "records", used) == [{"text, or none": "a, b", "label": "c"}]
    (tmp_path / "b.csv").write_text("text*label\na;b*c\n")
    assert rows(tmp_path / "b.csv", "records", Reading("*")) == [{"text": "a;b", "label": "c"}]


def test_spaces_are_part_of_a_text_where_no_quotes_follow(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,answer\n"a, ""b""", x\n" ""c""",y\n"d\n, ""e""",z\n')
    got = found(tmp_path / "a.csv", "records")
    assert got.remark == "" and [tuple(row.values()) for row in got.rows] == [
        ('a, "b"', " x"),
        (' "c"', "y"),
        ('d\n, "e"', "z"),
    ]


def test_every_bad_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES + '{"prompt": \n\n{}\nx\n')
    messages = faults(rows, tmp_path / "a.jsonl", "records")
    assert [message.partition(": ")[0] for message in messages] == [
        f"{tmp_path / 'a.jsonl'}, line {line}" for line in (5, 8)
    ]
    (tmp_path / "b.jsonl").write_text("{\n" * 9)
    messages = faults(rows, tmp_path / "b.jsonl", "records")
    assert len(messages) == 6 and "4 more faults in 9 records" in messages[-1]


def test_tsv_with_quotes_that_are_text(tmp_path):
    (tmp_path / "a.tsv").write_text('prompt\tanswer\n"Hello" he said\tx\n5" long\ty\n')
    got = found(tmp_path / "a.tsv", "records")
    assert got.rows == [{"prompt": '"Hello" he said', "answer": "x"}, {"prompt": '5" long', "answer": "y"}]
    assert "has quotes that are part of the text" in got.remark


def test_parquet_has_whole_numbers_and_names_of_classes(tmp_path):
    features = Features({"prompt": Value("int64"), "answer": ClassLabel(names=["x", "y"])})
    columns = {"prompt": list(range(10)), "answer": [i % 2 for i in range(10)]}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    made = [
        row
        for split in ("train", "eval", "test")
        for row in read(tmp_path, "T", task(files="a.parquet"), split)
    ]
    assert sorted((row["prompt"], row["answer"]) for row in made) == [
        (str(i), "xy"[i % 2]) for i in range(10)
    ]
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    (message,) = faults(read, tmp_path, "T", task(files="b.parquet"), "train")
    assert "b.parquet can't be read as Parquet (" in message


@pytest.mark.parametrize("source", ["files", "dataset"])
def test_objects_in_parquet_have_the_fields_that_were_written(tmp_path, source):
    """Parquet gives all objects of a column the same fields, so that a call of one tool would have the
    arguments of the others, as null."""
    chats = []
    for number in range(6):
        arguments = {"city": "Bonn"} if number % 2 else {"unit": {"of": [number]}, "days": 3}
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        chats.append(
            [
                {"role": "user", "content": f"q{number}"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "a"},
            ]
        )
    rows = [
        {"messages": chat, "note": None, "tools": [{"name": "f", "parameters": {"type": "object"}}]}
        for chat in chats
    ]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"files": "data/train.parquet"} if source == "files" else {"dataset": "data"}
    for split in ("train", "eval", "test"):
        parquet = read(tmp_path, "T", task(**given, format="openai"), split)
        assert parquet == read(tmp_path, "T", task(files="a.jsonl", format="openai"), split)
        assert all("null" not in row["prompt"] and "arguments" in row["prompt"] for row in parquet)


def test_labels_that_are_kept_secret_have_a_sentence_of_their_own(tmp_path):
    features = Features({"prompt": Value("string"), "answer": ClassLabel(names=["x", "y"])})
    Dataset.from_dict({"prompt": ["a"], "answer": [-1]}, features=features).to_parquet(tmp_path / "a.parquet")
    (message,) = faults(
        read, tmp_path, "T", task(files=dict.fromkeys(("train", "test"), "a.parquet")), "test"
    )
    assert "record 0: 'answer' is -1, the mark of a label that is kept secret; give a split whose" in message


def test_fields_that_are_not_used_are_not_judged(tmp_path):
    other = {"id": int("9" * 30), "x": 1.5, "y": None, "z": ["\ud800"], "deep": {"er": []}}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({**row, **other}) + "\n" for row in ROWS))
    (tmp_path / "a.csv").write_text(
        "prompt,x,answer,x,\n" + "".join(f"a{i},1,{'xy'[i % 2]},2,3\n" for i in range(4))
    )
    for name in ("a.jsonl", "a.csv"):
        found = task(files=name)
        made = [row for split in ("train", "eval", "test") for row in read(tmp_path, "T", found, split)]
        assert sorted(map(str, made)) == sorted(map(str, ROWS))
    (message,) = faults(read, tmp_path, "T", task(files="a.csv", columns={"prompt": "x"}), "train")
    assert "the column 'x' is there twice; rename one" in message


def test_long_numbers_are_their_digits(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"prompt": {i}{"0" * 40}, "answer": {i}}}\n' for i in range(1, 5))
    )
    made = [
        row
        for split in ("train", "eval", "test")
        for row in read(tmp_path, "T", task(files="a.jsonl"), split)
    ]
    assert sorted(row["prompt"] for row in made) == [f"{i}{'0' * 40}" for i in range(1, 5)]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", b"", "must end in .json, .jsonl, .csv, .tsv, .parquet (.gz may follow)"),
        ("a.parquet.gz", b"", "must end in .json"),
        ("a.jsonl.gz", b"{}", "can't be unpacked (Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "can't be unpacked ("),
        ("a.json", b'{"a": [1]}', "holds an object, expected a list of records; say which of its lists has"),
        ("a.json", b'{"a": 1}', "holds a dict, expected a list of records"),
        (
            "a.tsv",
            b"a\tb\n1\n",
            "record 0 has 1 values, the first line names 2; put texts with tabs into quotes",
        ),
    ],
)
def test_what_can_not_be_read_is_one_sentence(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    (message,) = faults(rows, tmp_path / name, "records")
    assert expected in message and str(tmp_path) in message


def test_each_fault_of_a_file_is_told_once_and_what_is_read_otherwise_is_said(tmp_path, capsys):
    name = folder(tmp_path, tasks={"ONE": {"metrics": ["exact_match"], "files": "a.csv"}})
    (tmp_path / "a.csv").write_text("prompt;answer\n" + "a;\n" * 9)
    report = check(tmp_path)
    assert len(report["faults"]) == 6 and report["faults"][0].endswith("fill it in or remove the record.")
    (note,) = report["notes"]
    assert note.startswith("tasks.ONE: ")
    assert "has semicolons between its columns, and is read that way" in note
    assert remarks(tmp_path, "ONE", task(files="a.csv")) == [note]
    code, out, _ = call(capsys, "data", "check", name)
    assert code == 1 and "note: tasks.ONE: " in out and out.count("record 0: 'answer' is empty") == 1

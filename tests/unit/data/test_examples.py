"""Reading and checking TRACE data, on hand-made folders and, where present, on the real benchmark."""

import json
import os
from pathlib import Path

import pytest

from codyra_llm.core.errors import Fault
from codyra_llm.data.check import check_root, print_check
from codyra_llm.data.records import read_split

GOOD = [{"prompt": "Frage: Größe?", "answer": "A"}, {"prompt": "态度：", "answer": "B"}]


@pytest.fixture
def root(tmp_path):
    """A variant folder with one clean task."""
    variant = tmp_path / "LLM-CL-Benchmark_500"
    for split in ("train", "eval", "test"):
        write(
            variant, "FOMC", split, [{**record, "prompt": f"{split} {record['prompt']}"} for record in GOOD]
        )
    return variant


def write(root, task, split, content):
    path = root / task / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def faults(root, task="FOMC", split="train"):
    with pytest.raises(Fault) as caught:
        read_split(root, task, split)
    return caught.value.messages


def test_reads_records_and_drops_extra_fields(root):
    write(root, "FOMC", "train", [{**GOOD[0], "id": 7}, GOOD[1]])
    assert read_split(root, "FOMC", "train") == GOOD


def test_accepts_a_byte_order_mark(root):
    write(root, "FOMC", "train", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_split(root, "FOMC", "train") == GOOD


def test_missing_task_names_the_nearest(root):
    assert "Did you mean 'FOMC'?" in faults(root, task="FOMK")[0]


def test_missing_split_and_missing_root(root):
    (root / "FOMC" / "eval.json").unlink()
    assert "eval.json doesn't exist" in faults(root, split="eval")[0]
    assert "is not a folder" in faults(root / "nowhere")[0]


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'[\n {"prompt": "a" "answer": "b"}]', "line 2, column 17"),
        (b'[{"prompt": "\xff"}]', "byte 13, in line 1, is not UTF-8"),
        ({"prompt": "a", "answer": "b"}, "holds a dict"),
        ([], "holds an empty list"),
        (
            [GOOD[0], {"promt": "a", "answer": "b"}],
            "record 1 has no 'prompt', expected a string; add it. Did you mean 'p",
        ),
        ([{"prompt": "a", "answer": 3.5}], "record 0: 'answer' is a float, expected a string"),
        ([{"prompt": None, "answer": "b"}], "record 0: 'prompt' is null, expected a string; fill it in"),
        ([["a", "b"]], "record 0 is a list"),
        ([{"prompt": "a", "answer": ""}], "record 0: 'answer' is empty"),
        (b'[{"prompt": "\\ud83d", "answer": "b"}]', "half of a surrogate pair"),
    ],
)
def test_each_fault_is_one_sentence_with_file_and_place(root, content, expected):
    path = write(root, "FOMC", "train", content)
    (message,) = faults(root)
    assert expected in message and str(path) in message and "\n" not in message


def test_all_faults_are_collected_and_counted(root):
    write(root, "FOMC", "train", [{"prompt": 1.5, "answer": True}] * 4)
    messages = faults(root)
    assert len(messages) == 6 and "record 2" in messages[4] and "3 more faults in 4 records" in messages[5]


def test_empty_answers_are_allowed_outside_training(root):
    write(root, "FOMC", "test", [{"prompt": "a", "answer": ""}])
    assert read_split(root, "FOMC", "test") == [{"prompt": "a", "answer": ""}]


def test_check_counts_by_hand(root, capsys):
    record = {"prompt": "abc", "answer": "x"}
    write(root, "FOMC", "train", [record, record, {"prompt": "abcde", "answer": "xyz"}])
    write(root, "FOMC", "test", [{"prompt": "abc", "answer": " "}, {"prompt": "new \ufffd", "answer": "y"}])
    report = check_root(root)
    task = json.loads(json.dumps(report))["variants"][root.name]["FOMC"]
    assert task["splits"]["train"] == {
        "records": 3,
        "duplicates": 1,
        "empty_answers": 0,
        "empty_prompts": 0,
        "padded_answers": 0,
        "replacement_characters": 0,
        "prompt_mean": 3.7,
        "prompt_max": 5,
        "answer_mean": 1.7,
        "answer_max": 3,
    }
    assert task["splits"]["test"]["empty_answers"] == task["splits"]["test"]["replacement_characters"] == 1
    assert task["overlap"] == {"train/test": 1}
    assert report["faults"] == [] and len(report["warnings"]) == 4
    print_check(report)
    assert "0 faults, 4 warnings" in capsys.readouterr().out


def test_json_lines_are_read_and_said(root):
    path = write(root, "FOMC", "train", b"\n".join(json.dumps(record).encode() for record in GOOD))
    assert read_split(root, "FOMC", "train") == GOOD
    assert check_root(root)["notes"] == [
        f"tasks.FOMC: {path} has one record in each line (JSON Lines), and is read that way"
    ]


def test_whole_numbers_are_text_and_other_fields_do_not_matter(root):
    write(root, "FOMC", "train", b'[{"prompt": 12, "answer": -1, "id": %s}]' % (b"7" * 5000))
    assert read_split(root, "FOMC", "train") == [{"prompt": "12", "answer": "-1"}]
    (warning,) = [line for line in check_root(root)["warnings"] if "-1" in line]
    assert "FOMC/train: 1 of 1 records have the answer -1, the mark of labels" in warning


def test_check_goes_on_past_a_broken_file(root):
    write(root, "FOMC", "eval", b"[")
    write(root, "Lima", "train", GOOD)
    report = check_root(root)
    assert len(report["faults"]) == 3  # one broken file, two missing splits of Lima
    assert set(report["variants"][root.name]["FOMC"]["splits"]) == {"train", "test"}


def test_check_finds_variants_below_a_parent(root):
    assert set(check_root(root.parent)["variants"]) == {root.name}
    other = root.with_name("LLM-CL-Benchmark_1000")
    write(other, "Py150", "train", GOOD)
    assert set(check_root(root.parent)["variants"]) == {root.name, other.name}
    with pytest.raises(Fault, match="holds no task folder"):
        check_root(root / "FOMC")


@pytest.mark.data
@pytest.mark.skipif(
    "CODYRA_DATA" not in os.environ, reason="CODYRA_DATA names no folder with LLM-CL-Benchmark_500"
)
def test_real_trace_has_its_known_overlaps():
    report = check_root(Path(os.environ["CODYRA_DATA"]) / "LLM-CL-Benchmark_500")
    tasks = report["variants"]["LLM-CL-Benchmark_500"]
    assert report["faults"] == []
    assert tasks["FOMC"]["overlap"]["eval/test"] == 16
    assert tasks["NumGLUE-ds"]["overlap"] == {"train/eval": 6, "train/test": 6}
    assert tasks["NumGLUE-cm"]["splits"]["train"]["duplicates"] == 244
    assert tasks["Lima"]["splits"]["test"]["empty_answers"] == 300

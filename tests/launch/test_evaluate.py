"""`codyra-llm evaluate`: a checkpoint's scores are those of its run, exactly; any other checkpoint; what is
refused.
"""

import json

import pytest
from helpers import learnt

from codyra_llm.checkpoints.evaluate import evaluate
from codyra_llm.checkpoints.source import Wanted
from codyra_llm.store.rows import ScoreRow


@pytest.fixture(scope="module")
def merging(tiny_llama, toy_stream, tmp_path_factory):
    return learnt(
        tiny_llama,
        toy_stream,
        tmp_path_factory.mktemp("runs") / "seqlora",
        {"name": "seqlora", "rank": 4},
        epochs=12,
    )


@pytest.mark.distributed
def test_two_processes_equal_one(merging, tiny_llama, toy_stream, tmp_path, forked):
    """Tasks, open-ended prompts and the harness's requests are dealt to the ranks: the same rows as one
    process writes.
    """
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(
        json.dumps(
            [
                {
                    "instruction": f"Please answer, question: is {'very ' * i}{i} even?\n\nAnswer format: "
                    "true/false",
                    "answer": "true",
                }
                for i in range(5)
            ]
        )
    )
    (tmp_path / "helpful.jsonl").write_text(
        "".join(json.dumps({"prompt": "Say " + "so " * i}) + "\n" for i in range(5))
    )
    checkpoint, general, base = str(merging.path / "checkpoint"), str(tmp_path), str(tiny_llama)
    own = [f"open_ended.prompts={tmp_path / 'helpful.jsonl'}", "open_ended.max_new_tokens=4"]
    one = evaluate(checkpoint, Wanted(general=general, base=base, out=tmp_path / "one", overrides=own))
    words = ["evaluate", checkpoint, "--general", general, "--base", base, "--out", tmp_path / "two"]
    done = forked.command(*words, *own)
    assert done.returncode == 0, done.stderr
    rows = ScoreRow.read(tmp_path / "two" / "scores.jsonl")
    assert len(rows) == 4 and rows == one.scores and len(one.pairs("helpful")) == 5
    for file in [*(one.path / "predictions").rglob("*.jsonl"), one.path / "answers" / "helpful.jsonl"]:
        assert (tmp_path / "two" / file.relative_to(one.path)).read_text() == file.read_text()

"""A stream of one's own: every source gives the same examples, splits don't leak, faults come together, and a
benchmark that isn't TRACE goes the whole way. Oracles: the rows that were written, splits recomputed,
texts written out by hand."""

import csv
import json

import pytest
import yaml

from codyra_llm.config.task import Task
from codyra_llm.core.errors import Fault

ROWS = [{"prompt": f'Say, "{i}",\nä 判:', "answer": "AB"[i % 2]} for i in range(20)]


PROTOCOL = {"max_prompt_tokens": 64, "max_answer_tokens": 8, "max_new_tokens": 2, "lr": 0.01}


def written(path, rows=ROWS, names=("prompt", "answer")):
    """A file of the rows, under other names, in the format that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(names, row.values(), strict=True)) for row in rows]
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            out = csv.DictWriter(file, names)
            out.writeheader()
            out.writerows(rows)
        else:
            file.write(
                json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n\n" for r in rows)
            )


def task(**values):
    return Task.model_validate({"metrics": ["exact_match"], **values})


def faults(action, *args):
    with pytest.raises(Fault) as caught:
        action(*args)
    assert all("\n" not in message for message in caught.value.messages)
    return caught.value.messages


def folder(path, **values):
    """A benchmark folder with one task in one file."""
    raw = {
        "tasks": {"ONE": {"metrics": ["exact_match", "rouge_l"], "files": "one.csv", "epochs": 2}},
        "protocols": {"short": PROTOCOL, "long": {**PROTOCOL, "max_prompt_tokens": 99}},
    } | values
    written(path / "one.csv")
    (path / "benchmark.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return str(path)

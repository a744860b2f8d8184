"""The command line as a user meets it: in-process, exit codes and output."""

import json

import pytest
from helpers import call
from typer.main import get_command

from codyra_llm.cli import app


def commands(group, prefix=()):
    for name, command in group.commands.items():
        yield from commands(command, (*prefix, name)) if hasattr(command, "commands") else [(*prefix, name)]


@pytest.mark.parametrize("command", list(commands(get_command(app))), ids=" ".join)
def test_help_of_every_command(command, capsys):
    code, out, _ = call(capsys, *command, "--help")
    assert code == 0 and len(out) > 200


def test_score(capsys, tmp_path):
    rows = [{"prompt": "p", "prediction": q, "answer": "B"} for q in ("B", " B", "B.", "")]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    code, out, _ = call(capsys, "score", "FOMC", tmp_path / "p.json")
    found = json.loads(out)
    assert code == 0 and found["exact_match"]["mean"] == 25 and found["exact_match_treelora"]["mean"] == 75
    assert found["exact_match"]["n"] == 4
    (tmp_path / "q.json").write_text(json.dumps([{"prompt": "p", "answer": 1}]))
    code, _, err = call(capsys, "score", "FOMC", tmp_path / "q.json")
    assert code == 2 and err.count("error:") == 2 and "'prediction'" in err and "'answer'" in err

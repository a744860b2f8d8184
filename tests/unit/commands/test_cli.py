"""The command line as a user meets it: in-process, exit codes and output."""

import errno
import json
from pathlib import Path

import pytest
import typer
from helpers import call
from typer.main import get_command

import codyra_llm
from codyra_llm.cli import app, main
from codyra_llm.runtime import cores


def commands(group, prefix=()):
    for name, command in group.commands.items():
        yield from commands(command, (*prefix, name)) if hasattr(command, "commands") else [(*prefix, name)]


@pytest.mark.parametrize("command", list(commands(get_command(app))), ids=" ".join)
def test_help_of_every_command(command, capsys, monkeypatch):
    monkeypatch.setattr(cores, "share", lambda: pytest.fail("help looks at how busy the cores are"))
    code, out, err = call(capsys, *command, "--help")
    assert code == 0 and len(out) > 200 and not err


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


def met(monkeypatch, error: Exception) -> None:
    """From here on `status` meets this error."""

    def raising(folder):
        raise error

    monkeypatch.setattr("codyra_llm.report.status.look", raising)


def test_traceback_shows_where_a_fault_was_met(tmp_path, capsys):
    sentence = f"error: {tmp_path} is not a run folder"
    for option in ([], ["--traceback"]):
        with pytest.raises(SystemExit) as ended:
            main(["status", str(tmp_path), *option])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.splitlines()[-1].startswith(sentence)
        assert ("Traceback" in err and "report/status.py" in err) == bool(option)


def test_a_path_of_the_user_is_a_sentence(monkeypatch, capsys):
    met(monkeypatch, PermissionError(errno.EACCES, "Permission denied", "/data/run/scores.jsonl"))
    with pytest.raises(SystemExit) as ended:
        main(["status", "run"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: /data/run/scores.jsonl: Permission denied;")
    with pytest.raises(SystemExit):
        main(["status", "run", "--traceback"])
    assert "PermissionError: [Errno 13]" in capsys.readouterr().err  # what was met itself


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", f"{Path(codyra_llm.__file__).parent}/cards/x.md"),
        FileNotFoundError(errno.ENOENT, "No such file", str(Path(typer.__file__).with_name("x"))),
        OSError("without a file"),
        KeyError("kind"),
    ],
)
def test_a_mistake_of_ours_is_not_told_as_the_users(error, monkeypatch, capsys):
    met(monkeypatch, error)
    with pytest.raises(type(error)) as met_by:
        main(["status", "run"])
    assert "This is a mistake of codyra_llm" in met_by.value.__notes__[0]
    assert capsys.readouterr().err == ""

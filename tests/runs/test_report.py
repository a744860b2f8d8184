"""The report: what the page holds, that foreign text stays text, that it loads nothing, and what several runs
say together.
"""

import json

from helpers import main_ends
from made_runs import Page

from codyra_llm.config.recipe import parse_recipe
from codyra_llm.experiment import run


def test_a_real_run_writes_its_page_and_the_command_writes_it_anew(tiny_llama, toy_stream, tmp_path, capsys):
    raw = {
        "model": {"path": str(tiny_llama)},
        "data": {"root": str(toy_stream), "tasks": ["ONE", "TWO"], "epochs": 1},
        "method": {"name": "codyra", "rank": 2},
        "optim": {"batch_size": 8},
        "eval": {"max_new_tokens": 3, "zero_shot": True},
        "checkpoint": False,
        "output": str(tmp_path / "run"),
    }
    folder = run.run(parse_recipe(raw))
    first = (folder.path / "report.html").read_text(encoding="utf-8")
    assert all(f"{row.score:.1f}" in Page(first).texts for row in folder.scores)
    summary = (folder.path / "summary.json").read_bytes()
    for name in ("report.html", "report.md"):
        (folder.path / name).unlink()
    (folder.path / "summary.json").write_text(json.dumps({"tasks": ["ONE", "TWO"]}))
    main_ends(["report", str(folder.path)])
    assert (folder.path / "report.html").read_text(encoding="utf-8") == first
    assert (folder.path / "report.md").is_file() and (folder.path / "summary.json").read_bytes() == summary
    assert "report:" in capsys.readouterr().out

"""docs/tour.md: its files are written and its commands run in their order, on fewer examples."""

import re
import shlex
import shutil

import pytest
from commands import ROOT, check
from helpers import call

from codyra_llm.runtime import signals

PAGE = ROOT / "docs" / "tour.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="not a checkout")
LESS = ["data.max_train_examples=16", "eval.max_examples=4"]
FEWER = {
    "run": LESS,
    "plan": LESS,
    "sweep": ["data.max_train_examples=8", "data.epochs=1", "eval.max_examples=2"],
}


def session(title: str) -> list[tuple[str, str]]:
    """(language, text) of the blocks of the section that begins so."""
    (section,) = [part for part in PAGE.read_text().split("\n## ") if part.startswith(title)]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def commands(blocks: list[tuple[str, str]]) -> list[str]:
    text = "".join(body for language, body in blocks if language == "console")
    return [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """Function that runs a command of the page and returns what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signals, "listen", lambda: None)  # pytest keeps its signals

    def run(command: str) -> str:
        program, *words = shlex.split(command)
        assert program == "codyra-llm"
        code, out, err = call(capsys, *words, *FEWER.get(words[0], []))
        assert code == 0, err
        return out

    return run


def test_own_csv_to_an_answering_model(said, tmp_path):
    blocks = session("A CSV")
    given = commands(blocks)
    assert len(given) <= 10
    table, file = (next(body for kind, body in blocks if kind == language) for language in ("csv", "yml"))
    head, *rows = table.splitlines()
    rows = [row.replace("the ", f"the {number} ") for number in range(20) for row in rows]
    (tmp_path / "reviews.csv").write_text("\n".join([head, *rows]))
    told = {}
    for command in given:
        if command.startswith("pip "):
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(ROOT)
                check(shlex.split(command))
        elif command == "cp ~/reviews.csv mine":
            shutil.copy(tmp_path / "reviews.csv", tmp_path / "mine")
            (tmp_path / "mine" / "benchmark.yaml").write_text(file)
        else:
            told[" ".join(command.split()[1:3])] = said(command)
    assert "has semicolons between its columns" in told["data check"]
    shown = r"<bos>the \d+ (chair is dull\. A: bad, B: good\. Answer:A|phone is .* Answer:B)<eos>"
    assert re.search(shown, told["plan mine/recipe.yaml"])
    assert "merged model: runs/mine/checkpoint" in told["run mine/recipe.yaml"]
    assert told["generate runs/mine/checkpoint"].count("\n") == 1


def test_twelve_runs_to_a_table_and_a_figure(said, tmp_path, launches):
    blocks = session("Three methods")
    given = commands(blocks)
    assert len(given) <= 6
    (tmp_path / "compare.yaml").write_text(next(body for kind, body in blocks if kind == "yml"))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    told = [said(command) for command in given]
    assert "12 of 12 runs are left" in told[0] and len(launches) == 12
    assert "Means over 2 seeds and 2 orders" in (tmp_path / "runs/compare/sweep.md").read_text()
    table = (tmp_path / "table.tex").read_text()
    for arm in ("seqlora", "ewc", "replay"):
        assert re.search(rf"^{arm} & .*\\pm ", table, re.MULTILINE)
    assert r"\toprule" in table and (tmp_path / "tradeoff.pdf").read_bytes().startswith(b"%PDF")

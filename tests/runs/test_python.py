"""The Python that users are offered: its names, and the code of docs/python.md on a tiny model."""

import logging
import re
import subprocess
import sys
from threading import Thread

import pytest
import yaml
from commands import ROOT, forget_plugins
from helpers import logits, tiny_recipe
from modules import modules
from transformers import PreTrainedModel

import codyra_llm
from codyra_llm.core.errors import Fault

OFFERED = {
    "__version__",
    "Fault",
    "LogRow",
    "METHODS",
    "Method",
    "Observer",
    "Recipe",
    "Run",
    "ScoreRow",
    "SeqLora",
    "SeqLoraConfig",
    "Stage",
    "evaluate_checkpoint",
    "load_recipe",
    "plan",
    "register",
    "run",
    "run_sweep",
    "write_report",
}


def test_the_names_offered():
    assert set(codyra_llm.__all__) == OFFERED and set(dir(codyra_llm)) >= OFFERED
    for name in OFFERED:
        assert getattr(codyra_llm, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        codyra_llm.rum  # noqa: B018


def test_no_name_is_a_module_s_too():
    """`import codyra_llm.X` would put the module in the place of the name."""
    assert not {f"codyra_llm.{name}" for name in OFFERED} & modules().keys()


def test_naming_one_imports_what_it_needs_alone():
    code = "import codyra_llm, sys; codyra_llm.load_recipe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "False\n", done.stderr


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a checkout")
def test_the_page(tiny_llama, toy_stream, tmp_path, monkeypatch, capsys, caplog):
    """Its blocks, one after the other, with a tiny recipe in place of quickstart."""
    caplog.set_level(logging.INFO, "codyra_llm")
    monkeypatch.chdir(tmp_path)
    small = tiny_recipe(tiny_llama, toy_stream, "given by each block", method="seqlora")
    raw = small.model_dump(mode="json", exclude_unset=True)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw))
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.M | re.S)
    text = "\n".join(blocks)
    assert text.count('"quickstart"') == 3
    names: dict = {"__name__": "page"}
    try:
        exec(text.replace('"quickstart"', '"tiny.yaml"'), names)
    finally:
        forget_plugins()
    run, losses = names["run"], names["losses"]
    assert isinstance(names["model"], PreTrainedModel) and run.recipe.method.name == "ewc"
    assert {task: len(rows) for task, rows in losses.by_task.items()} == {"ONE": 6, "TWO": 6}
    assert names["rows"][0].score == run.scores[0].score  # out: the model after the first task
    monkeypatch.chdir(tmp_path.parent)  # a run opened by a relative path stays where it is
    assert run.stage().after == "TWO"
    assert (tmp_path / "compared.html").is_file() and set(names["wrong"]) <= {
        example["prompt"] for example in names["answers"]
    }
    assert names["small"].folder.log_rows[-1].terms.keys() == {"loss", "size"}
    said = " ".join(capsys.readouterr().out.split())  # paths of any length break lines anywhere
    assert "method ewc trains" in said and said.count("after ONE: ONE ") == 1  # the plan's, the observer's
    assert [line for line in caplog.messages if line.startswith("ONE: learnt in ")]
    whole = run.load()[0]
    assert logits(whole).equal(logits(run.load(after="TWO")[0]))
    assert not logits(whole).equal(logits(run.load(after="ONE")[0]))
    with pytest.raises(Fault, match="'THREE' is not a finished task"):
        run.load(after="THREE")


def test_home_is_written_out(finished, tmp_path, monkeypatch):
    """Python expands no ~: a folder of that name would be made in the working folder."""
    kept, _ = finished("seqlora")
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "run").symlink_to(kept.path)
    run = codyra_llm.Run("~/run")
    run.export("~/merged")
    codyra_llm.write_report(["~/run"], "~/page.html")
    rows = codyra_llm.evaluate_checkpoint("~/run@ONE", "~/scores", tasks="ONE")
    assert rows == [row for row in run.scores if (row.after, row.task) == ("ONE", "ONE")]
    assert {file.name for file in home.iterdir()} == {"run", "merged", "page.html", "scores"}
    assert not list(here.iterdir())


def test_two_threads_do_not_load_at_once(tiny_llama, toy_stream, tmp_path):
    """The second is refused before it loads anything; a run in another thread, or within another, is not."""
    recipes = [tiny_recipe(tiny_llama, toy_stream, tmp_path / name, data__epochs=1) for name in "abc"]
    told, inner = [], []

    def refused():
        with pytest.raises(Fault) as caught:
            codyra_llm.run(recipes[1])
        told.append(str(caught.value))

    class Second(codyra_llm.Observer):
        def run_begins(self, tasks):
            thread = Thread(target=refused)
            thread.start()
            thread.join()
            inner.append(codyra_llm.run(recipes[2]).summary["op"])

    done = []
    thread = Thread(target=lambda: done.append(codyra_llm.run(recipes[0], observers=[Second()])))
    thread.start()
    thread.join()
    assert "another thread of this process is at work" in told[0] and not (tmp_path / "b").exists()
    assert inner == [done[0].summary["op"]]
    assert codyra_llm.run(recipes[1]).summary["op"] == done[0].summary["op"]

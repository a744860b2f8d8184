"""Methods and metrics from outside the package: files that are named, packages with entry points, what a run
remembers of them, and that no other code runs."""

import sys

import pytest
import yaml
from commands import forget_plugins
from helpers import call
from own_benchmark import PROTOCOL, folder

from codyra_llm.config import plugins
from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.config.recipe import load_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256
from codyra_llm.metrics.own import metric
from codyra_llm.metrics.text import METRICS, versioned

METHOD = """
from typing import Literal
from codyra_llm.config.methods.sequential import SeqLoraConfig
from codyra_llm.config.registry import METHODS
from codyra_llm.methods.sequential.seqlora import SeqLora

class MineConfig(SeqLoraConfig):
    name: Literal["mine"] = "mine"

class Mine(SeqLora):
    name, summary, Config = "mine", "SUMMARY", MineConfig
"""
METRIC = """
from codyra_llm.metrics.own import metric

@metric("length_gap", low=0, high=10, higher_is_better=False, version=3)
def length_gap(prompt, prediction, answer):
    return min(abs(len(prediction) - len(answer)), 10)
"""


@pytest.fixture(autouse=True)
def as_before():
    yield
    forget_plugins()
    for name in [name for name in sys.modules if name.startswith("codyra_llm_plugin_")]:
        del sys.modules[name]


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def refused(action, *arguments):
    with pytest.raises(Fault) as caught:
        action(*arguments)
    return str(caught.value)


def test_a_file_is_loaded_once_and_anew_when_it_has_changed(tmp_path):
    file = written(tmp_path / "mine.py", METHOD + "METHODS['mine'] = Mine\n")
    assert "method.name: 'mine' is not a method" in refused(load_recipe, "quickstart", ["method=mine"])
    plugins.load([file])
    first = METHODS["mine"]
    assert load_recipe("quickstart", ["method=mine", "method.rank=3"]).method.rank == 3
    plugins.load([file, file])
    assert METHODS["mine"] is first
    origin = {"file": str(file), "sha256": file_sha256(file)}
    assert plugins.used("mine", ["exact_match"]) == {"method mine": origin}
    assert plugins.files() == [str(file)]
    written(file, METHOD.replace("SUMMARY", "another") + "METHODS['mine'] = Mine\n")
    plugins.load([file])
    assert METHODS["mine"].summary == "another"
    now = plugins.used("mine", [])
    (told,) = plugins.changed({"method mine": origin}, now, "runs/x")
    assert f"another version of method mine (sha256 {origin['sha256'][:12]}" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n\nnonsense\n", "NameError: name 'nonsense' is not defined, line 3"),
        ("x = (", "SyntaxError"),
        ("x = 1\n", "registers no method and no metric"),
        (METHOD + "METHODS['seqlora'] = Mine\n", "method 'seqlora' is one of codyra_llm's own"),
        (METHOD + "METHODS['yours'] = Mine\n", "whose `name` is 'mine'"),
        (METHOD + "METHODS['mine'] = Mine(MineConfig(), 0)\n", "which is not a class; give the class"),
        (
            METHOD + "Mine.Config = SeqLoraConfig\nMETHODS['mine'] = Mine\n",
            'with the field `name: Literal["mine"] = "mine"`; that of SeqLoraConfig is \'seqlora\'',
        ),
        (
            METHOD.replace('= "mine"\n', '= "mine"\n    weight: float\n', 1) + "METHODS['mine'] = Mine\n",
            "weight of MineConfig must have a default",
        ),
        (METRIC.replace('"length_gap"', '"sari"'), "metric 'sari' is one of codyra_llm's own"),
        (METRIC.replace('"length_gap"', '"answer"'), "is not a valid name"),
        (METRIC.replace("low=0", "low=10"), "low 10 must be below high 10"),
        (METRIC.replace("high=10", "high=float('inf')"), "low 0 must be below high inf, and both finite"),
    ],
)
def test_what_can_not_be_loaded_leaves_nothing(tmp_path, text, told):
    file = written(tmp_path / "mine.py", text)
    message = refused(plugins.load, [file])
    assert told in message and str(file) in message
    assert not plugins._registered()
    assert METHODS["seqlora"].__module__.startswith("codyra_llm.methods")


def test_a_file_that_is_not_there(tmp_path, capsys):
    code, _, err = call(capsys, "plan", "quickstart", "--plugin", tmp_path / "no.py")
    assert code == 2 and f"--plugin: there is no file {tmp_path / 'no.py'}" in err


def test_bounds_and_direction_of_a_metric():
    """Scores are linear from the worst bound, 0, to the best, 100."""
    metric("up", low=-1, high=3)(lambda prompt, prediction, answer: float(prediction))
    metric("down", low=-1, high=3, higher_is_better=False)(lambda p, prediction, a: float(prediction))
    for value, up in ((-1, 0), (0, 25), (1, 50), (3, 100)):
        assert METRICS["up"].score("", str(value), "") == up
        assert METRICS["down"].score("", str(value), "") == 100 - up
    assert METRICS["up"].compute(predictions=["-1", "3"], references=["", ""], sources=["", ""]) == {"up": 50}
    for value in ("-1.01", "3.01", "nan", "inf"):
        with pytest.raises(ValueError, match="expected a number from -1 to 3"):
            METRICS["up"].score("", value, "")


def installed(tmp_path, monkeypatch, package, points, modules):
    """A package as pip leaves it."""
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / f"{package}-1.2.dist-info"
    info.mkdir()
    written(info / "METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    written(info / "entry_points.txt", points)
    for name, text in modules.items():
        written(tmp_path / f"{name}.py", text)


def test_an_installed_package(tmp_path, monkeypatch):
    installed(
        tmp_path,
        monkeypatch,
        "mypackage",
        "[codyra_llm.methods]\nmine = mymethod:Mine\n[codyra_llm.metrics]\nlength_gap = mymetric:length_gap\n"
        "half = mymetric:half\nbroken = mymetric:nothing\n",
        {
            "mymethod": METHOD,
            "mymetric": METRIC + "\ndef half(prompt, prediction, answer):\n    return 50.0\n",
        },
    )
    assert "mymethod" not in sys.modules  # until its name is asked for
    assert load_recipe("quickstart", ["method=mine"]).method.name == "mine"
    assert plugins.has_metric("length_gap") and versioned("length_gap") == "length_gap@3"
    assert plugins.has_metric("half") and METRICS["half"].score("", "", "") == 50
    assert not plugins.has_metric("third")
    assert plugins.used("mine", ["half"]) == {
        "method mine": {"package": "mypackage", "version": "1.2"},
        "metric half": {"package": "mypackage", "version": "1.2"},
    }
    assert plugins.files() == []  # another process finds them by itself
    told = refused(plugins.load_installed)
    assert "metric 'broken' of package mypackage can't be loaded (AttributeError" in told
    assert {"mine"} <= set(METHODS)


def test_two_packages_with_one_name(tmp_path, monkeypatch):
    for package in ("one", "two"):
        (tmp_path / package).mkdir()
        points = "[codyra_llm.methods]\nmine = mymethod:Mine\nseqlora = mymethod:Mine\n"
        installed(tmp_path / package, monkeypatch, package, points, {})
    told = refused(plugins.load_installed)
    assert "method 'mine' comes from several packages, one, two" in told
    assert "method 'seqlora' of package one, two has the name of a shipped one" in told


def test_missing_says_what_to_do(tmp_path):
    recorded = {
        "method mine": {"file": "/a/mine.py", "sha256": "0123456789abcdef"},
        "metric half": {"package": "mypackage", "version": "1.2"},
        "metric other": {"module": "__main__"},
    }
    one, two, three = plugins.missing(recorded, "runs/x")
    assert one == (
        "runs/x was made with method mine, which is not known here; give --plugin /a/mine.py "
        "(sha256 0123456789ab)"
    )
    assert two.endswith("install mypackage 1.2") and three.endswith(
        "register it first, as module __main__ did"
    )


def test_code_of_a_benchmark_runs_only_where_it_is_named(tmp_path):
    """The file would leave a mark."""
    mark, code = tmp_path / "mark", tmp_path / "mine" / "my_metrics.py"
    code.parent.mkdir()
    tasks = {"ONE": {"metrics": ["length_gap", "exact_match"], "files": "one.csv"}}
    own = folder(code.parent, metrics="my_metrics.py", tasks=tasks, protocols={"short": PROTOCOL})
    written(code, METRIC + f"\nopen({str(mark)!r}, 'w').close()\n")
    told = refused(load_benchmark, own)
    assert f"runs only where you name it; look at it, and add --plugin {code} to the command" in told
    assert not mark.exists()
    plugins.load([code])
    assert mark.exists()
    found = load_benchmark(own).score("ONE", ["p", "p"], ["ab", "abcdefghijkl"], ["abc", "x"])
    assert found == {"length_gap": [pytest.approx(90), 0], "exact_match": [0, 0]}


def test_a_metric_that_fails_names_the_example(tmp_path):
    text = METRIC.replace("return min", "1 / len(prediction)\n    return min")
    plugins.load([written(tmp_path / "gap.py", text)])
    own = tmp_path / "mine"
    own.mkdir()
    raw = {"tasks": {"ONE": {"metrics": ["length_gap"], "files": "one.csv"}}, "protocols": {"s": PROTOCOL}}
    written(own / "benchmark.yaml", yaml.safe_dump(raw))
    told = refused(load_benchmark(str(own)).score, "ONE", ["p", "q"], ["a", ""], ["x", "y"])
    assert "metric 'length_gap' failed on example 1 of ONE (ZeroDivisionError" in told

"""The last lines of a run on mini-TRACE."""

from io import StringIO

import pytest
import yaml
from rich.console import Console

from codyra_llm.config.recipe import load_recipe
from codyra_llm.report.in_short import REFERENCE, in_short

FOUND = {
    "matrix": [[80.0, None], [70.0, 60.0]],
    "op": 65.0,
    "bwt": -10.0,
    "bwt_treelora": 5.0,
    "forgetting": 10.0,
    "general": {"a": {"before": 90.0, "after": 88.0}, "b": {"before": 100.0, "after": 99.0}},
    "delta_r": {"value": -1.5, "members": ["a", "b"]},
}


def shown(table) -> list[str]:
    console = Console(width=80, record=True, file=StringIO())
    console.print(table)
    return console.export_text().splitlines()


def test_a_run_stands_above_the_reference_with_the_command_that_makes_it():
    lines = shown(in_short(load_recipe("quickstart", []).resolved(), FOUND))
    own = next(line for line in lines if "codyra_drift" in line)
    assert own.split()[-4:] == ["70.0", "65.0", "10.0", "-1.5"]
    reference = next(line for line in lines if "sequential LoRA" in line)
    assert len(reference.split()) >= 6 and all(len(line) <= 80 for line in lines)
    command = " ".join(lines).partition("codyra-llm run quickstart ")[2].split()
    assert load_recipe("quickstart", command).method.name == "seqlora"


@pytest.mark.parametrize(
    "settings",
    [
        ["method=seqlora"],
        ["model.path=mini-1"],
        ["data.max_train_examples=20"],
        ["eval.max_examples=20"],
        ["data.tasks=[FOMC,Py150]"],
        ["eval.split=eval"],
        ["general.data=null"],
    ],
)
def test_what_is_not_comparable_has_no_such_lines(settings):
    assert in_short(load_recipe("quickstart", settings).resolved(), FOUND) is None


@pytest.mark.parametrize("measure", ["forgetting", "op", "delta_r"])
def test_a_measure_that_is_missing_leaves_the_lines_out(measure):
    assert in_short(load_recipe("quickstart", []).resolved(), FOUND | {measure: None}) is None


def test_the_reference_differs_in_method_and_rate_alone():
    command = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))["command"].split()
    own, other = (load_recipe("quickstart", settings) for settings in ([], command))
    assert other.method.name == "seqlora" and other.method.rank == own.method.rank
    alike = own.model_copy(update={"method": None, "optim": None, "output": ""})
    assert alike == other.model_copy(update={"method": None, "optim": None, "output": ""})
    assert other.optim == own.optim.model_copy(update={"lr": other.optim.lr})

"""Recipes made in Python: what is wrong is said as it is of a file, and copies are made and passed on."""

import copy
import inspect
import pickle
from pathlib import Path

import pytest

import codyra_llm as cl
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.sections import OptimSection

GIVEN = {"model": {"path": "m"}, "data": {"root": "d"}, "method": {"name": "ewc", "weight": 2}, "output": "o"}


def said(make, *given, **settings):
    with pytest.raises(cl.Fault) as caught:
        make(*given, **settings)
    return caught.value.messages


def test_a_method_as_a_section_a_name_or_its_settings():
    recipe = cl.Recipe(**GIVEN)
    assert recipe == parse_recipe(GIVEN) == cl.load_recipe(GIVEN) == cl.Recipe.model_validate(GIVEN)
    assert recipe == cl.Recipe.model_validate_json(recipe.model_dump_json())
    assert type(recipe.method) is cl.METHODS.settings("ewc") and recipe.method.weight == 2
    assert cl.Recipe(**{**GIVEN, "method": "ewc"}).method == cl.METHODS.settings("ewc")()
    assert cl.Recipe(**{**GIVEN, "method": cl.SeqLoraConfig(rank=3)}).method.rank == 3


def test_all_mistakes_in_sentences():
    wrong = {**GIVEN, "method": {"name": "ewc", "rnk": 3}, "optim": {"lr": "fast"}, "sed": 1}
    expected = [
        "unknown key 'method.rnk' (value 3). Did you mean 'rank'?",
        "optim.lr: 'fast' is not valid; input should be a valid number",
        "unknown key 'sed' (value 1). Did you mean 'seed'?",
    ]
    for found in (
        said(cl.Recipe, **wrong),
        said(cl.Recipe.model_validate, wrong),
        said(cl.load_recipe, wrong),
    ):
        assert len(found) == 3
        assert all(sentence in line for sentence, line in zip(expected, found, strict=True))
    (found,) = said(cl.Recipe, **{**GIVEN, "method": {"name": "ewcc"}})
    assert found.startswith("method.name: 'ewcc' is not a method. Did you mean 'ewc'?")
    (found,) = said(cl.Recipe, **{**GIVEN, "method": None})
    assert found.startswith("method.name: None is not a method.")
    (found,) = said(cl.SeqLoraConfig, rank=0)
    assert found.startswith("rank: 0 is not valid; input should be greater than or equal to 1")
    (found,) = said(OptimSection, keep_best=True)
    assert found == "'keep_best' needs 'validate_every'; give the steps between validations"
    (found,) = said(cl.Recipe.model_validate, 3)
    assert found.startswith("3 is not a mapping; give one, with the keys model, data, method")
    (found,) = said(cl.Recipe.model_validate_json, "{")
    assert found.startswith("the text: invalid JSON at line 1")


def test_paths_and_a_single_override_as_python_writes_them():
    """A text is a sequence too, of letters, so that no type checker tells."""
    given = {**GIVEN, "model": {"path": Path("m")}, "data": {"root": Path("d")}, "output": Path("o")}
    assert cl.Recipe(**given) == cl.Recipe(**GIVEN)
    assert cl.load_recipe(GIVEN, "seed=2") == cl.load_recipe(GIVEN, ["seed=2"])
    (found,) = said(cl.evaluate_checkpoint, "nowhere", "out", overrides="oops")
    assert found.startswith("'oops' is not an override")


def test_changed_copies():
    recipe = cl.Recipe(**GIVEN)
    changed = cl.load_recipe(recipe, ["optim.lr=1e-3", "seed=2"])
    assert (changed.optim.lr, changed.seed, changed.method) == (1e-3, 2, recipe.method)
    assert cl.load_recipe(recipe, ["method=seqlora"]).method == cl.SeqLoraConfig()
    assert recipe.seed == 1234 and cl.load_recipe(GIVEN, ["method.weight=3"]).method.weight == 3
    assert GIVEN["method"] == {"name": "ewc", "weight": 2}
    (found,) = said(cl.load_recipe, recipe, ["optim.lr=0"])
    assert found.startswith("recipe: optim.lr: 0 is not valid")
    for same in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe), cl.load_recipe(recipe)):
        assert same == recipe and type(same.method) is type(recipe.method)


def test_what_was_left_at_its_default_stays_so_in_a_copy():
    """A key without effect is one in the copy too: null as a default is not null as it was written."""
    recipe = cl.Recipe(**GIVEN, general={"limit": 3})
    assert cl.load_recipe(recipe).general.model_fields_set == {"limit"}
    assert cl.load_recipe(recipe, ["general.data=null"]).general.model_fields_set == {"limit", "data"}
    settings = cl.Recipe(**{**GIVEN, "method": cl.SeqLoraConfig(rank=3)})
    assert cl.load_recipe(settings).method == settings.method


def test_a_copy_by_pydantic_is_checked_before_it_is_used():
    recipe = cl.Recipe(**GIVEN)
    good = recipe.model_copy(update={"optim": {"lr": 1}, "method": "seqlora"})
    assert cl.load_recipe(good).optim == OptimSection(lr=1)
    assert cl.load_recipe(good).method == cl.SeqLoraConfig()
    (found,) = said(cl.run, recipe.model_copy(update={"optim": {"lrr": 1}}))
    assert found.startswith("recipe: unknown key 'optim.lrr' (value 1). Did you mean 'lr'?")
    (found,) = said(cl.plan, "quickstrat")
    assert found.startswith("there is no recipe 'quickstrat'. Did you mean 'quickstart.yaml'?")


def test_a_report_on_nothing():
    (found,) = said(cl.write_report, [], "x.html")
    assert found.startswith("no run was given to report on")
    (found,) = said(cl.write_report, "nowhere", "x.html")
    assert found.startswith("nowhere is not a run folder")


def test_what_help_shows():
    assert {"model", "method", "seed"} <= inspect.signature(cl.Recipe).parameters.keys()

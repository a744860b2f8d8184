"""Recipes: every shipped one loads, every mistake is reported, all at once."""

import re
from pathlib import Path

import pytest
import yaml

from codyra_llm.config.differences import differences
from codyra_llm.config.overrides import PROGRAM_KEYS, find_recipe, override
from codyra_llm.config.recipe import load_recipe, parse_recipe
from codyra_llm.core.errors import Fault

SHIPPED = sorted(Path(find_recipe("quickstart")).parent.glob("*.yaml"))
MINIMAL = {"model": {"path": "m"}, "data": {"root": "d"}, "method": {"name": "codyra"}, "output": "o"}


def faults(raw, overrides=()):
    with pytest.raises(Fault) as caught:
        parse_recipe(override(raw, list(overrides)))
    return caught.value.messages


def test_the_list_of_shipped_recipes_is_whole():
    assert {p.stem for p in SHIPPED} == {
        "quickstart",
        "trace_llama",
        "trace_llama32_1b",
        "trace_gemma",
        "trace_gemma3_270m",
        "trace_smollm2",
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipe_is_yaml_and_python(path):
    recipe = load_recipe(path).resolved()
    assert recipe.resolved() == recipe and len(recipe.tasks) == 8
    assert recipe.output == f"runs/{path.stem}"
    source = path.read_text()
    compile(source, str(path), "exec")
    assert set(PROGRAM_KEYS) <= yaml.safe_load(source).keys()
    assert re.match(r'_: r"""\n', source) and 'main(["run", *sys.argv])' in source.splitlines()[-1]


def test_all_mistakes_at_once_with_the_nearest_name():
    found = faults(
        {
            **MINIMAL,
            "optim": {"lrr": 1, "schedule": "cosin", "batch_size": 0},
            "evl": {},
            "method": {"name": "codyra", "rnk": 4, "threshold": {"budget": -1}},
        }
    )
    text = "\n".join(found)
    assert len(found) == 6
    assert "unknown key 'optim.lrr' (value 1). Did you mean 'lr'?" in text
    assert "optim.schedule: 'cosin'" in text and "Did you mean 'cosine'?" in text
    assert "optim.batch_size: 0" in text and "greater than or equal to 1" in text
    assert "unknown key 'evl'" in text and "Did you mean 'eval'?" in text
    assert "unknown key 'method.rnk' (value 4). Did you mean 'rank'?" in text
    assert "method.threshold.budget: -1" in text


@pytest.mark.parametrize(
    "change, message",
    [
        (["method=codira"], "method.name: 'codira' is not a method. Did you mean 'codyra'?"),
        (["method.threshold.kappa_max=0.1"], "'kappa_max' has no effect with schedule 'budget'"),
        (["method.keep=0.5"], "'keep' goes with selection 'random'"),
        (["method.selection=random"], "give the share of ranks to keep"),
        (["method.targets=[q_proj,x_proj]"], "unknown projections ['x_proj']"),
        (["optim.keep_best=true"], "'keep_best' needs 'validate_every'"),
        (["data.tasks=[FOMC,FOMC]"], "each once"),
        (["data.tasks=9"], "there is no order 9"),
        (["data.tasks=[FOMC,base]"], "'base' is the name of the stage before all tasks"),
        ([f"data.tasks=[{','.join(f't{i}' for i in range(101))}]"], "there are 101"),
        (["data.epochs={FOMK: 2}"], "'FOMK' is not a task of this recipe. Did you mean 'FOMC'?"),
        (["data.epochs=0"], "data.epochs: 0 is not valid; input should be greater than or equal to 1"),
        (["model=null"], "'model.path' is missing; add it"),
        (["optim.lr=abc"], "optim.lr: 'abc' is not valid"),
    ],
)
def test_impossible_settings(change, message):
    assert message in "\n".join(
        faults({k: dict(v) if isinstance(v, dict) else v for k, v in MINIMAL.items()}, change)
    )


def test_overrides():
    recipe = load_recipe("quickstart", ["optim.lr=1e-3", "--seed=3", "method=seqlora", "method.rank=4"])
    assert (recipe.optim.lr, recipe.seed, recipe.method.name, recipe.method.rank) == (1e-3, 3, "seqlora", 4)
    with pytest.raises(Fault, match="'oops' is not an override"):
        load_recipe("quickstart", ["oops"])
    with pytest.raises(Fault, match="'lr' is a value, not a section"):
        load_recipe("quickstart", ["optim.lr.x=1"])
    with pytest.raises(Fault) as caught:
        load_recipe("quickstart", ["optim.lr.x=1", ".lr=3", "seed=2", "seed.y=1"])
    assert [line.partition(":")[0] for line in caught.value.messages] == [
        "optim.lr.x",
        "'.lr' is not the key of a setting; write its sections joined by dots, e.g. optim.lr",
        "seed.y",
    ]


def test_a_section_that_is_given_as_a_whole_leaves_its_other_keys():
    """Without this the quickstart's batch size and loss average would silently become the protocol's."""
    own = load_recipe("quickstart")
    one = load_recipe("quickstart", ["optim={lr: 1e-3}"])
    assert (
        one == load_recipe("quickstart", ["optim.lr=1e-3"]) and one.optim.batch_size == own.optim.batch_size
    )
    two = load_recipe("quickstart", ["data={epochs: {FOMC: 2}, tasks: [FOMC]}", "method={name: ewc}"])
    assert two.data.epochs == {"FOMC": 2} and two.data.root == "mini"
    assert two.method == load_recipe("quickstart", ["method=ewc"]).method
    assert load_recipe("quickstart", ["optim=null"]).optim.batch_size is None
    assert load_recipe("quickstart", ["optim={}"]) == own


@pytest.mark.parametrize("nothing", ["", "  "])
def test_an_unset_variable_of_the_shell_is_no_value(nothing):
    """`optim.lr=$LR` would fall back to the protocol's learning rate in silence."""
    with pytest.raises(Fault, match="'optim.lr': there is nothing after '='; give a value, or null for none"):
        load_recipe("quickstart", [f"optim.lr={nothing}"])
    assert load_recipe("quickstart", ["optim.lr=null"]).optim.lr is None


def test_a_method_that_is_its_name_alone_can_be_overridden():
    short = {**MINIMAL, "method": "seqlora"}
    assert parse_recipe(override(short, ["method.rank=4"])).method.rank == 4


@pytest.mark.parametrize("section", ["optim", "eval", "general", "open_ended", "save"])
def test_a_section_whose_keys_are_commented_out_has_its_defaults(section):
    raw = {**MINIMAL, section: None}
    assert parse_recipe(raw) == parse_recipe(MINIMAL)
    changed = override({**MINIMAL, section: None}, ["optim.lr=1e-3", "open_ended.judge.retries=2"])
    assert parse_recipe(changed) == parse_recipe(
        {**MINIMAL, "optim": {"lr": 1e-3}, "open_ended": {"judge": {"retries": 2}}}
    )


def test_a_required_section_of_nothing_lacks_its_keys():
    assert faults({**MINIMAL, "model": None}) == ["recipe: 'model.path' is missing; add it"]


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            "data.tasks=FOMC",
            [
                "recipe: data.tasks: 'FOMC' is not valid; input should be a valid list, or a valid integer, "
                "unable to parse string as an integer; a list is written in brackets, [A, B]"
            ],
        ),
        (
            "optim.betas=0.9",
            [
                "recipe: optim.betas: 0.9 is not valid; input should be a valid list; a list is written in "
                "brackets, [A, B]"
            ],
        ),
        ("optim.betas=[0.9]", ["recipe: optim.betas: [0.9] has too few items; write all of them"]),
        (
            "data.epochs=1001",
            ["recipe: data.epochs: 1001 is not valid; input should be less than or equal to 1000"],
        ),
        (
            "data.epochs={FOMC: 2.5, Py150: x}",
            [
                "recipe: data.epochs.FOMC: 2.5 is not valid; input should be a valid integer, got a number "
                "with a fractional part",
                "recipe: data.epochs.Py150: 'x' is not valid; input should be a valid integer, unable to "
                "parse string as an integer",
            ],
        ),
    ],
)
def test_a_setting_of_several_kinds_has_one_fault_at_its_own_key(change, messages):
    raw = {key: dict(value) if isinstance(value, dict) else value for key, value in MINIMAL.items()}
    assert faults(raw, [change]) == messages


@pytest.mark.parametrize(("name", "fits"), [("x" * 200, True), ("x" * 201, False), ("任" * 67, False)])
def test_a_task_s_name_is_short_enough_for_its_files(name, fits):
    """An update's file would be refused by the file system after the training."""
    raw = {**MINIMAL, "data": {"root": "d", "tasks": [name]}}
    if fits:
        assert parse_recipe(raw).tasks == [name]
    else:
        assert "201 bytes and becomes a file name; shorten it to at most 200" in "\n".join(faults(raw))


def test_protocols_fill_what_is_not_given():
    trace = parse_recipe(MINIMAL).resolved()
    assert (trace.optim.batch_size, trace.optim.loss_average, trace.data.max_prompt_tokens) == (
        128,
        "sample",
        1024,
    )
    raw = {**MINIMAL, "data": {"root": "d", "protocol": "treelora", "tasks": 2, "epochs": {"FOMC": 9}}}
    tree = parse_recipe(raw).resolved()
    assert (tree.optim.batch_size, tree.optim.loss_average, tree.optim.betas) == (32, "sample", (0.9, 0.95))
    assert tree.tasks[:3] == ["NumGLUE-cm", "NumGLUE-ds", "FOMC"]
    assert tree.epochs == [5, 5, 9, 7, 5, 5, 7, 3]
    assert tree.eval.max_new_tokens["C-STANCE"] == 512


def test_broken_files(tmp_path):
    for name, content, message in (
        ("a.yaml", b"a: [", "not valid YAML"),
        ("b.yaml", b"\xff\xfe", "not UTF-8"),
        ("c.yaml", b"- 1", "expected a mapping"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Fault, match=message):
            load_recipe(tmp_path / name)
    with pytest.raises(Fault, match="no recipe 'quickstat.yaml'. Did you mean 'quickstart.yaml'"):
        load_recipe("quickstat.yaml")


def test_recipes_are_frozen():
    with pytest.raises(Fault, match="seed: 2 can't be assigned, since settings are checked together"):
        parse_recipe(MINIMAL).seed = 2


@pytest.mark.parametrize("name", ["THREE", "three.v2"])
def test_a_task_added_at_the_end_is_no_difference(name):
    def recipe(tasks, **epochs):
        given = {**dict.fromkeys(tasks, 1), **epochs}
        return parse_recipe({**MINIMAL, "data": {"root": "d", "tasks": tasks, "epochs": given}})

    old, new = recipe(["ONE", "TWO"]), recipe(["ONE", "TWO", name])
    assert differences(old, new) == []
    assert differences(new, recipe(new.tasks, **{name: 2})) == [f"data.epochs.{name} was 1, now 2"]

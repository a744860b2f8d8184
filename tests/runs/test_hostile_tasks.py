"""Folders of general ability that others made to hang, to crash or to run code: each is refused within
seconds, before any model is loaded, in a sentence that names the key and what to do. Oracle: the words.
"""

import pytest
import torch
from hostile import DROP, LOOPS, Place, Table, adder, refused, told

from codyra_llm.checkpoints.source import Source, Wanted, recipe_of
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.sections import GeneralSection
from codyra_llm.core.errors import Fault
from codyra_llm.evaluate import suite
from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer

CASES: Table = {}
pytestmark = pytest.mark.usefixtures("impatient")
case = adder(CASES)
FILES = "dataset_kwargs.data_files"
for name, files, said in (
    ("no files", {}, f"{FILES} is {{}}, expected the file of each split; give it"),
    ("null for files", None, f"{FILES} is None, expected the file of each split; give it"),
    ("a list of files", ["own.json"], f"{FILES} is .'own.json'., expected the file of each split; give it"),
    ("a number for a file", {"test": 5}, f"{FILES}.test is 5, expected a file below .*; put it there"),
    ("a list for a file", {"test": ["own.json"]}, f"{FILES}.test is .*; put it there"),
    ("a file outside", {"test": "../x.json"}, f"{FILES}.test is '../x.json', expected a file below"),
    ("an absolute file", {"test": "/etc/passwd"}, f"{FILES}.test is '/etc/passwd', expected a file below"),
    (
        "a file elsewhere",
        {"test": "https://x.org/a.json"},
        "reads .*x.org/a.json, which is not there; add it",
    ),
    ("a wide name", {"test": "{dataset_name:999999999999}.json"}, "which is not there; add it"),
):
    case(f"a task with {name}", lambda p, files=files: p.files(files), said)
TRUST = "look at what it runs, and set general.trust_code to true"
FIRST = "correct its task file or its data, or leave it out"
for name, keys, *said in (
    (
        "data of a hub",
        {"dataset_path": "gsm8k"},
        "dataset_path is 'gsm8k', expected one of json",
        "correct it",
    ),
    ("pickled data", {"dataset_path": "pandas"}, "dataset_path is 'pandas', expected one of json"),
    (
        "data that downloads",
        {"dataset_kwargs": {"data_files": {"test": "own.json"}, "num_proc": 10**6}},
        "dataset_kwargs: 'num_proc' is not known here",
        "Leave it out",
    ),
    ("no kwargs", {"dataset_kwargs": [1]}, f"{FILES} is None", "give it"),
    (
        "an unknown key",
        {"doc_to_txt": "x"},
        "'doc_to_txt' is not a key of a task. Did you mean 'doc_to_text'",
    ),
    ("a prompt of promptsource", {"use_prompt": "promptsource:x"}, "use_prompt is .*which would run", TRUST),
    ("a data set made by code", {"custom_dataset": "x.y"}, "custom_dataset is 'x.y', which would run", TRUST),
    ("unsafe code", {"unsafe_code": True}, "unsafe_code is True, which would run code", TRUST),
    (
        "a metric of a hub",
        {"metric_list": [{"metric": "own/metric"}]},
        "metric_list: 'own/metric' is no",
        TRUST,
    ),
    (
        "a metric that is fetched",
        {"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]},
        "metric_list: 'exact_match' is not a metric of the harness, and others are code",
        TRUST,
    ),
    ("a metric that is a number", {"metric_list": [{"metric": 5}]}, "metric_list: 5 is not a metric"),
    (
        "metrics in a mapping",
        {"metric_list": {"metric": "acc"}},
        "metric_list is .*expected a list",
        "correct",
    ),
    (
        "files outside that it includes",
        {"include": "../../../x.yaml"},
        "include is '../../../x.yaml'",
        "correct",
    ),
    (
        "all files that there are",
        {"include": "**/*.yaml"},
        r"include is '\*\*/\*.yaml', expected files",
        "correct",
    ),
    (
        "an absolute file that it includes",
        {"include": "/etc/x.yaml"},
        "include is '/etc/x.yaml'",
        "correct it",
    ),
    ("nothing that it includes", {"include": "nope/*.yaml"}, "the harness has 0 such files", "correct it"),
    (
        "a list that it includes",
        {"include": ["piqa/piqa.yaml"]},
        "include is .'piqa/piqa.yaml'.",
        "correct it",
    ),
    ("a billion shots", {"num_fewshot": 10**9}, "num_fewshot is 1000000000, expected 0 to 1,000; correct it"),
    ("a billion repeats", {"repeats": 10**9}, "repeats is 1000000000, expected 1 to 100; correct it"),
    (
        "answers without end",
        {"generation_kwargs": {"max_gen_toks": 10**9, "until": ["."]}},
        "'own' answers with up to 1000000000 tokens, and the model takes 256 in all; leave it out",
    ),
    (
        "answers that are drawn",
        {"generation_kwargs": {"do_sample": True, "temperature": 1.0, "until": ["."]}},
        "'own' samples its answers, and only greedy tasks are measured; leave it out",
    ),
    ("generation in a list", {"generation_kwargs": [1]}, "generation_kwargs is .1., expected a mapping"),
    ("a template that loops", {"doc_to_text": LOOPS}, "'own' has the template", "more than 0.5 s", FIRST),
    ("a target that loops", {"doc_to_target": LOOPS}, "'own' has the template", "more than 0.5 s", FIRST),
    ("a template of a product", {"doc_to_text": "{{ 'a' * 10**10 }}"}, "more than 512 MB", FIRST),
    ("a template of what is private", {"doc_to_text": "{{ ''.__class__.__mro__ }}"}, "is unsafe", FIRST),
    ("a template of no field", {"doc_to_text": "{{ txt }}"}, "'txt' is undefined", FIRST),
    ("a template of no syntax", {"doc_to_text": "{% for %}"}, "Expected an expression", FIRST),
    ("a description that loops", {"description": LOOPS}, "'own' has the template", "more than 0.5 s", FIRST),
    (
        "a pattern in a template",
        {"doc_to_text": "{{ ('a' * 50) | regex_replace('(a+)+$x', '') }}"},
        "more than 0.5 s",
        FIRST,
    ),
    ("no template", {"doc_to_text": DROP}, "'own' can't be asked or scored", FIRST),
    ("no split", {"test_split": DROP}, "'own' can't be asked or scored", FIRST),
    ("a split that is not there", {"test_split": "tset"}, "'own' can't be asked or scored .*tset", FIRST),
    ("no kind", {"output_type": "guess"}, "'own' can't be asked or scored .*guess", FIRST),
    (
        "a pattern without end",
        {
            "filter_list": [
                {
                    "name": "x",
                    "filter": [{"function": "regex", "regex_pattern": "(a+)+$x"}, {"function": "take_first"}],
                }
            ]
        },
        "'own' has a pattern that fails",
        "more than 0.5 s",
        FIRST,
    ),
    (
        "a pattern that is none",
        {"filter_list": [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "("}]}]},
        "'own' has a pattern that fails",
        FIRST,
    ),
    (
        "a group that is not there",
        {
            "filter_list": [
                {
                    "name": "x",
                    "filter": [{"function": "regex", "regex_pattern": "(a)", "group_select": 10**6}],
                }
            ]
        },
        "'own' has a pattern",
        FIRST,
    ),
    (
        "a filter that is not there",
        {"filter_list": [{"name": "x", "filter": [{"function": "nope"}]}]},
        "'own' can't be asked or scored .*nope",
        FIRST,
    ),
    ("filters in text", {"filter_list": "x"}, "filter_list is 'x', expected a list of mappings; correct it"),
    (
        "a metric's pattern without end",
        {
            "metric_list": [
                {
                    "metric": "exact_match",
                    "aggregation": "mean",
                    "higher_is_better": True,
                    "regexes_to_ignore": ["(a+)+$x"],
                }
            ]
        },
        "has a pattern that fails",
        "0.5 s",
        FIRST,
    ),
    (
        "a mean that is none",
        {"metric_list": [{"metric": "exact_match", "aggregation": "nope", "higher_is_better": True}]},
        "'own' can't be asked or scored",
        FIRST,
    ),
):
    case(f"a task with {name}", lambda p, keys=keys: p.suite(**keys), *said)
for name, keys, *said in (
    ("choices that are not a list", {"doc_to_choice": "{{ text }}"}, "'own' can't be asked or scored", FIRST),
    ("choices that loop", {"doc_to_choice": LOOPS}, "'own' has the template", "more than 0.5 s", FIRST),
    ("nested choices", {"doc_to_choice": "{{ '[' * 99999 }}"}, "'own' can't be asked or scored", FIRST),
    ("a choice that is not there", {"doc_to_target": 9}, "'own' can't be asked or scored .*index", FIRST),
):
    case(f"a task with {name}", lambda p, keys=keys: p.choices(**keys), *said)
for name, rows, *said in (
    ("rows that are numbers", [1, 2], "'own'", "correct"),
    ("no rows", [], "'own'", "correct"),
    ("nested rows", '[{"text": ' + "[" * 99_999 + "]" * 99_999 + "}]", "'own'", "correct"),
    ("no JSON", "{", "'own'", "correct"),
):
    case(f"a task with {name}", lambda p, rows=rows: p.suite(rows=rows), "general.tasks", *said)
for name, text, *said in (
    (
        "a function",
        "task: own\ndoc_to_text: !function x.y\n",
        "own.yaml runs a function .!function, line 2",
        TRUST,
    ),
    ("an object", "task: !!python/object/apply:os.getcwd []\n", "own.yaml is not valid YAML", "correct it"),
    (
        "aliases",
        "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)),
        "holds more than 20000 values",
    ),
    ("a list", "- 1\n", "is not a task of lm-evaluation-harness .*write one, or take the file out"),
    ("a megabyte", "# " + "x" * (1 << 20), "expected at most 262,144; give a smaller one"),
):
    case(f"a task file of {name}", lambda p, text=text: p.suite(text), *said)


@pytest.fixture
def place(tiny_llama, toy_stream, tmp_path):
    return Place(tmp_path, tiny_llama, toy_stream)


@pytest.mark.parametrize("name", CASES)
def test_refused_in_a_sentence(name, place, capsys):
    refused(CASES[name], place, capsys)


def test_good_ones_are_planned(place, capsys):
    assert told(capsys, place.suite())[0] == told(capsys, place.choices())[0] == 0


LATER = "{{ text }}{% if text == 'Say 2' %}{{ 1 / 0 }}{% endif %}"
BRACKET = "{% if text == 'Say 2' %}[{% else %}['a', 'b']{% endif %}"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"doc_to_text": LATER}, "'own' has the template .*division by zero"),
        ({"doc_to_choice": BRACKET}, "'own' can't be asked or scored .SyntaxError"),
    ],
)
def test_a_later_example_is_told_too(keys, said, place, capsys):
    """The first one is faultless, so that the plan is; the third is not."""
    from codyra_llm.evaluate.harness import InMemoryLM, measure
    from codyra_llm.runtime.launch import accelerator

    assert told(capsys, place.choices(**keys))[0] == 0
    section = GeneralSection(data=str(place.general), tasks=["own"])
    model = loading.load(place.model, torch.float32).eval()
    lm = InMemoryLM(accelerator(), model, load_tokenizer(place.model))
    with pytest.raises(Fault, match=said):
        measure(lm, suite.find(section)["own"], section, False)


def test_code_runs_where_it_is_trusted(place, capsys):
    """And not before: importing it would leave a file."""
    made = place.folder / "made"
    code = f"open({str(made)!r}, 'w').close()\n\n\ndef ask(doc):\n    return doc['text'] + '?'\n"
    arguments = place.suite()
    (place.general / "own_code.py").write_text(code)
    task = place.general / "own.yaml"
    task.write_text(task.read_text().replace("'{{text}}'", "!function own_code.ask"))
    assert told(capsys, arguments)[0] == 2 and not made.exists()
    assert told(capsys, [*arguments, "general.trust_code=true"])[0] == 0 and made.exists()
    section = GeneralSection(data=str(place.general), tasks=["own"], trust_code=True)
    task = suite.find(section)["own"].tasks["own"]
    assert task.doc_to_text(task.eval_docs[0]) == "Say 0?"


def test_a_recipe_that_a_checkpoint_carries_trusts_nobody(place):
    raw = {
        "model": {"path": str(place.model)},
        "data": {"root": str(place.data), "tasks": ["ONE"]},
        "method": {"name": "seqlora", "rank": 2},
        "general": {"data": str(place.general), "trust_code": True},
        "output": "x",
    }
    source = Source(parse_recipe(raw).model_dump(mode="json"), model=str(place.model))
    assert not recipe_of(str(place.model), source, Wanted()).general.trust_code
    given = Wanted(overrides=["general.trust_code=true"])
    source = Source(parse_recipe(raw).model_dump(mode="json"), model=str(place.model))
    assert recipe_of(str(place.model), source, given).general.trust_code

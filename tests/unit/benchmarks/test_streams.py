"""The streams of papers that are shipped without their data: names, orders, prompts. Oracles: the lists and
prompts of their authors' code, written out; data in their layout, made here."""

import json

import pytest
from archives import packed
from helpers import ROOT
from own_benchmark import faults

from codyra_llm.config.benchmark import benchmark_folder, load_benchmark
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.sections import FILE, SHIPPED
from codyra_llm.data.check import check, check_root
from codyra_llm.data.fetch import get
from codyra_llm.data.sources import read
from codyra_llm.experiment.setup import prepare

CATEGORIES = {
    "TC": ["dbpedia", "yahoo", "agnews"],
    "SC": ["amazon", "yelp", "IMDB", "SST-2"],
    "NLI": ["MNLI", "CB", "RTE"],
    **{name: [name] for name in ("WiC", "COPA", "QQP", "BoolQA", "MultiRC")},
}
SST = "task363_sst2_polarity_classification"
QUOREF = "task002_quoref_answer_generation"


def olora(root):
    for category, names in CATEGORIES.items():
        for name in names:
            folder = root / category / name
            folder.mkdir(parents=True)
            (folder / "labels.json").write_text('["Good", "Bad"]')
            for split in ("train", "dev", "test"):
                kind = "train" if split == "train" else "test"
                rows = [
                    {"label": ["Good", "Bad"][i % 2], "sentence": f"{kind} {name} {i}"} for i in range(20)
                ]
                (folder / f"{split}.json").write_text(json.dumps(rows))
    return root


def superni(root):
    for name in load_benchmark("superni").tasks:
        (root / name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            kind = "train" if split == "train" else "test"
            given = [{"id": f"{i}", "input": f"{kind} {i}", "output": [f"{i}"]} for i in range(20)]
            if name == SST:  # texts, as in SAPT's files
                given = [{**row, "output": row["output"][0]} for row in given]
            if name == QUOREF:
                given = [{**row, "output": [*row["output"], "other"]} for row in given]
            whole = {"Definition": ["Do."], "Positive Examples": [{}], "Instances": given}
            (root / name / f"{split}.json").write_text(json.dumps(whole))
    return root


def test_a_name_is_that_of_each_folder_that_is_shipped():
    folders = {path.parent.name for path in (ROOT / "benchmarks").glob(f"*/{FILE}")}
    assert folders == {*SHIPPED, "starter"}
    packages = (ROOT / "pyproject.toml").read_text("utf-8")
    for name in SHIPPED:
        assert benchmark_folder(name).name == name and load_benchmark(name).tasks
        assert f'"codyra_llm.benchmarks.{name}",' in packages
        assert f'"codyra_llm.benchmarks.{name}" = ["*.yaml"' in packages


def test_olora_has_the_orders_of_its_paper():
    """Table of task sequences of 2310.14152; 7 to 10 are the orders (i) to (iv) of 1906.01076."""
    known = load_benchmark("olora")
    assert set(known.tasks) == {name for names in CATEGORIES.values() for name in names}
    words = {
        1: "dbpedia amazon yahoo agnews",
        2: "dbpedia amazon agnews yahoo",
        3: "yahoo amazon agnews dbpedia",
        4: "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
        5: "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
        6: "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
        7: "yelp agnews dbpedia amazon yahoo",
        8: "dbpedia yahoo agnews amazon yelp",
        9: "yelp yahoo amazon dbpedia agnews",
        10: "agnews yelp amazon yahoo dbpedia",
    }
    assert {number: " ".join(names).lower() for number, names in known.orders.items()} == words


def test_superni_has_two_orders_of_its_fifteen_tasks():
    known = load_benchmark("superni")
    numbers = {
        number: [int(name[4:].split("_")[0]) for name in names] for number, names in known.orders.items()
    }
    assert numbers == {
        1: [1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875],
        2: [748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875],
    }
    assert len(known.tasks) == 15


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "amazon",
            "Task:SC\nDataset:amazon\nWhat is the sentiment of the following paragraph? "
            "Choose one from the option.\nOption: Good, Bad \ntest amazon 0\nAnswer:",
        ),
        (
            "agnews",
            "Task:TC\nDataset:agnews\nWhat is the topic of the following paragraph? "
            "Choose one from the option.\nOption: Good, Bad \ntest agnews 0\nAnswer:",
        ),
        (
            "RTE",
            'Task:NLI\nDataset:RTE\nWhat is the logical relationship between the "sentence 1" and '
            'the "sentence 2"? Choose one from the option.\nOption: Good, Bad \ntest RTE 0\nAnswer:',
        ),
        (
            "WiC",
            "Task:WiC\nDataset:WiC\nGiven a word and two sentences, whether the word is used with "
            "the same sense in both sentence? Choose one from the option.\nOption: Good, Bad \n"
            "test WiC 0\nAnswer:",
        ),
        ("COPA", "Task:COPA\nDataset:COPA\ntest COPA 0\nAnswer:"),
    ],
)
def test_olora_prompts(tmp_path, name, expected):
    found = load_benchmark("olora").tasks[name]
    assert read(olora(tmp_path), name, found, "test")[0] == {"prompt": expected, "answer": "Good"}


def test_superni_prompts(tmp_path):
    superni(tmp_path)
    for name in (SST, QUOREF):  # an output that is a text, and the first of several
        rows = read(tmp_path, name, load_benchmark("superni").tasks[name], "test")
        prompt = "Definition: Do.\n\nNow complete the following example -\nInput: test 0\nOutput: "
        assert rows[0] == {"prompt": prompt, "answer": "0"}


@pytest.mark.parametrize("name, make", [("olora", olora), ("superni", superni)])
def test_data_in_its_layout_is_checked_and_eval_is_cut_from_train(tmp_path, name, make):
    report = check(make(tmp_path), name)
    assert not report["faults"] + report["warnings"] + report["notes"]
    (tasks,) = report["variants"].values()
    for task in tasks.values():
        assert [task["splits"][split]["records"] for split in ("train", "eval", "test")] == [18, 2, 20]
        assert task["overlap"] == {}


def test_a_recipe_names_it(tmp_path, tiny_llama):
    raw = {"model": {"path": str(tiny_llama)}, "method": "none", "output": str(tmp_path / "o")}
    asked = parse_recipe(
        {**raw, "data": {"benchmark": "olora", "root": str(olora(tmp_path / "d")), "tasks": 3}}
    )
    setup = prepare(asked)
    assert (
        setup.recipe.tasks == ["yahoo", "amazon", "agnews", "dbpedia"]
        and setup.recipe.data.protocol == "llama"
    )
    assert setup.stream.records(0, "test")[0]["prompt"].startswith("Task:TC\nDataset:yahoo\n")
    (message,) = faults(parse_recipe, {**raw, "data": {"benchmark": "superni"}})
    assert "'root' is missing; add it: the folder that holds the data of superni" in message


TRACE_TASKS = [
    "C-STANCE",
    "FOMC",
    "MeetingBank",
    "Py150",
    "ScienceQA",
    "NumGLUE-cm",
    "NumGLUE-ds",
    "20Minuten",
]
OLORA_TASKS = sum(CATEGORIES.values(), [])


def treelora(folder):
    """The files of TreeLoRA's archive: TRACE's layout; eval equal to test and labels in O-LoRA's tasks; no
    answers in the test of Lima."""
    content = {}
    for name in [*TRACE_TASKS, *OLORA_TASKS, "Lima"]:
        for split in ("train", "eval", "test"):
            kind = "test" if split == "eval" and name not in TRACE_TASKS else split
            answers = ["" if name == "Lima" and kind == "test" else label for label in ("True", "False")]
            rows = [{"prompt": f"{name} {kind} {i}\nAnswer:", "answer": a} for i, a in enumerate(answers)]
            content[f"{folder}/{name}/{split}.json"] = json.dumps(rows).encode()
        if name in OLORA_TASKS:
            content[f"{folder}/{name}/labels.json"] = b'["True", "False"]'
    return content


def test_the_24_folders_of_treelora_are_tasks_of_trace(tmp_path, tiny_llama):
    """Oracle: its `collect_results.py`, accuracy for each of the fifteen, and none for Lima."""
    archive = packed(tmp_path / "LLM-CL-Benchmark_500.tar.xz", treelora("LLM-CL-Benchmark_500"))
    (root,) = get("trace", tmp_path / "data", source=str(archive))
    report = check_root(root)
    (found,) = report["variants"].values()
    assert len(found) == 24 and report["faults"] == []
    names = [*TRACE_TASKS, *OLORA_TASKS]

    def asked(**data):
        raw = {"model": {"path": str(tiny_llama)}, "method": "none", "output": str(tmp_path / "o")}
        given = {"root": str(root), "tasks": names, "max_prompt_tokens": 32, "max_answer_tokens": 4}
        return parse_recipe({**raw, "data": given | data})

    for protocol, metric in (("trace", "exact_match"), ("treelora", "exact_match_treelora")):
        setup = prepare(asked(protocol=protocol))
        assert {name: setup.metrics[name][0] for name in OLORA_TASKS} == dict.fromkeys(OLORA_TASKS, metric)
        assert setup.metrics["20Minuten"][0] == "sari"
        assert setup.stream.epochs == [5, 3, 7, 5, 3, 5, 5, 7] + [1] * 15
    message = faults(prepare, asked(tasks=[*names, "Lima"]))
    assert message == [
        "data.tasks: none of the 2 test records of Lima has an answer, so it can't be scored; leave it out "
        "(method replay takes such a set by method.general=Lima)"
    ]

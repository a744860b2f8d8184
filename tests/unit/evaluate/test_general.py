"""General ability by lm-evaluation-harness: the YAML tasks, what a model is asked, scores, ΔR, and what is
refused.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.sections import GeneralSection
from codyra_llm.core.errors import Fault
from codyra_llm.evaluate import suite
from codyra_llm.evaluate.statistics import delta_r
from codyra_llm.experiment.setup import prepare
from codyra_llm.methods.base import Condition
from codyra_llm.report.summary import before_and_after
from codyra_llm.store.rows import ScoreRow, Stage

GOALS = [
    ("open a jar", "turn the lid", "sing to it", 0),
    ("dry a shirt in the sun", "put it under water", "hang it up", 1),
    ("find a pen", "look", "close your eyes and wait for a while", 0),
]
WRAPPED = (
    "Please choose the correct solution to the question: {}\n\nSolution1: {}\n\nSolution2: {}\n\n"
    "Answer format: solution1/solution2"
)
STAGE = Stage(0, "base")


def test_a_chat_template_is_told_the_same_date_as_in_training(live, tiny_llama):
    _, tokenizer, lm = live(tiny_llama)
    tokenizer.chat_template = "{{ date_string }}: {% for m in messages %}{{ m.content }}{% endfor %}"
    assert lm.apply_chat_template([{"role": "user", "content": "a"}]) == "26 Jul 2024: a"


@pytest.fixture
def root(tmp_path):
    """A folder with PIQA of three questions, and MMLU of one subject of two questions among empty ones."""
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "test.json").write_text(
        json.dumps(
            [{"instruction": WRAPPED.format(*goal[:3]), "answer": f"solution{goal[3] + 1}"} for goal in GOALS]
        )
    )
    return tmp_path


def log_likelihood(model, tokenizer, prompt, continuation):
    """One token after the other, each by a forward pass of its own."""
    before = tokenizer(prompt)["input_ids"]
    ids, total = tokenizer(prompt + continuation)["input_ids"], 0.0
    for end in range(len(before), len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:end]])).logits[0, -1]
        total += math.log(logits.double().softmax(0)[ids[end]].item())
    return total


def test_multiple_choice_by_hand(tiny_llama, live, root):
    """PIQA out of its wrapping: the choice with the higher log-likelihood, summed by hand; mean and standard
    error.
    """
    from codyra_llm.evaluate.harness import measure

    model, tokenizer, lm = live(tiny_llama)
    section = GeneralSection(data=str(root))
    found = suite.find(section)
    assert list(found) == ["piqa"]  # the rest has no files here
    right, picked = [], []
    for goal, *choices, answer in GOALS:
        sums = [
            log_likelihood(model, tokenizer, f"Question: {goal}\nAnswer:", f" {choice}") for choice in choices
        ]
        picked.append(choices[sums.index(max(sums))])
        right.append(float(sums.index(max(sums)) == answer))
    measured = measure(lm, found["piqa"], section, False)
    score = measured.row(STAGE).metrics["acc,none"]
    mean = sum(right) / 3
    error = math.sqrt(sum((r - mean) ** 2 for r in right) / 2 / 3)
    assert score["mean"] == measured.row(STAGE).score == pytest.approx(100 * mean) and score["n"] == 3
    assert score["stderr"] == pytest.approx(100 * error) and score["low"] <= score["mean"] <= score["high"]
    assert [p["prediction"] for p in measured.predictions] == picked
    assert [p["answer"] for p in measured.predictions] == [goal[1 + goal[3]] for goal in GOALS]
    assert [p["acc,none"] for p in measured.predictions] == [100 * r for r in right]
    assert measured.predictions[0]["prompt"] == "Question: open a jar\nAnswer:"


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize("chat", [False, True])
def test_the_harness_files_say_by_which_template_prompts_were_written(tiny_llama, live, root, tmp_path, chat):
    from codyra_llm.evaluate.harness import measure, write

    _, tokenizer, lm = live(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    section = GeneralSection(data=str(root))
    measured = measure(lm, suite.find(section)["piqa"], section, chat)
    assert measured.predictions[0]["prompt"].startswith("<user>" if chat else "Question")
    write(tmp_path / "out", "00-base", lm, section, measured)
    (file,) = (tmp_path / "out" / "00-base").glob("results_*.json")
    found = json.loads(file.read_text())
    assert found["chat_template"] == (TEMPLATE if chat else None)
    assert found["fewshot_as_multiturn"] is False


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma2", "tiny_gemma3"])
def test_the_model_is_asked_as_the_harness_asks_it(model, live, request):
    """Log-likelihoods and answers equal those of the harness's own HFLM, whatever the batches."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    own_model, tokenizer, lm = live(request.getfixturevalue(model), tokens=60)
    plain = HFLM(pretrained=own_model, tokenizer=tokenizer, backend="causal", batch_size=1)

    def requests(kind, arguments):
        return [
            Instance(request_type=kind, doc={}, arguments=a, idx=i, metadata=("t", i, 1))
            for i, a in enumerate(arguments)
        ]

    context = "Question: how does one find a pen?\nAnswer:"
    pairs = [(context, f" {letter}") for letter in "ABCD"] + [
        ("", "a pen"),
        ("Say A: ", "A"),
        (context * 3, " look under the table"),
        ("x" * 700, " y"),
    ]
    for (ours, greedy_too), (theirs, likewise) in zip(
        lm.loglikelihood(requests("loglikelihood", pairs)),
        plain.loglikelihood(requests("loglikelihood", pairs)),
        strict=True,
    ):
        assert ours == pytest.approx(theirs, rel=1e-4) and greedy_too == likewise
    first = plain.generate_until(requests("generate_until", [("Say A:", {"until": [], "max_gen_toks": 8})]))[
        0
    ]
    asked = [
        (text, {"until": [first[2:4]], "max_gen_toks": new, "do_sample": False})
        for text, new in (("Say A:", 8), (context, 5), (context * 3, 8), ("Say", 8))
    ]
    answers = lm.generate_until(requests("generate_until", asked))
    assert answers == plain.generate_until(requests("generate_until", asked)) and answers[0] == first[:2]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma3"])
def test_examples_before_many_questions_are_read_once(model, live, request):
    """The same log-likelihoods as alone, of questions after either of two sets of examples, with choices of
    several tokens; counted in tokens read. Not where a sliding window would end within the prompt."""
    from lm_eval.api.instance import Instance

    own_model, tokenizer, lm = live(request.getfixturevalue(model))
    shots = [
        "A tin is opened with a key, and a jar by its lid. " * 2,
        "Wet shirts dry where the sun shines. " * 3,
    ]
    asked = [
        (f"{shots[i % 2]}{'How ' * (i // 2)}so?", f" {choice}")
        for i in range(12)
        for choice in ("a", "by sun")
    ]
    read = []
    own_model.model.embed_tokens.register_forward_hook(lambda _, given, out: read.append(given[0].numel()))
    found = lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, i, ("t", i, 1)) for i, pair in enumerate(asked)]
    )
    taken = sum(read)
    right = [log_likelihood(own_model, tokenizer, *pair) for pair in asked]
    assert [total for total, _ in found] == pytest.approx(right, rel=1e-4)
    whole = sum(len(tokenizer(prompt + choice)["input_ids"]) - 1 for prompt, choice in asked)
    assert taken < 0.6 * whole if model == "tiny_llama" else taken >= whole


def test_prefixes_of_a_method_leave_room_within_the_models_positions(live, tiny_llama):
    """56 of the 256 positions: what is asked is cut on the left, as the harness cuts what is too long."""
    from lm_eval.api.instance import Instance

    prefix, seen = torch.zeros(1, 56, 32), []
    model, _, lm = live(tiny_llama, conditions=lambda prompts: Condition(prefix), front=56)

    def note(module, given, named):
        seen.append(named["position_ids"].max().item() + 1)

    model.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    settings = {"until": [], "max_gen_toks": 8, "do_sample": False}
    lm.loglikelihood([Instance("loglikelihood", {}, ("x" * 700, " y"), 0, ("t", 0, 1))])
    lm.generate_until([Instance("generate_until", {}, ("x" * 700, settings), 0, ("t", 0, 1))])
    assert seen[0] == 256 and max(seen) == 256 and len(seen) > 2


def test_what_is_drawn():
    """`limit` examples of all parts together, the same for the same seed, others for another; all where there
    are fewer.
    """
    sizes = {"a": 5, "b": 100}
    draws = [suite.drawn("mmlu", sizes, 10, seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    for draw in draws:
        assert sum(map(len, draw.values())) == 10
        assert all(own == sorted(set(own)) and own[-1] < sizes[part] for part, own in draw.items())
    assert (
        suite.drawn("mmlu", sizes, 200, 1)
        == suite.drawn("mmlu", sizes, None, 1)
        == {"a": list(range(5)), "b": list(range(100))}
    )


def test_a_group_is_one_score(tiny_llama, live, tmp_path):
    """Two parts of BBH on tiny files: three shots before the question, the group's score is the mean over all
    examples.
    """
    from codyra_llm.evaluate.harness import measure, write

    (tmp_path / "bbh").mkdir()
    names = [config["dataset_name"] for config in suite.parts(suite.HUB["bbh"], None).values()]
    assert len(names) == 27
    for name in names:
        (tmp_path / "bbh" / f"{name}.json").write_text(
            json.dumps({"canary": "c", "examples": [{"input": f"{name}?", "target": "x"}] * 2})
        )
    section = GeneralSection(data=str(tmp_path), tasks=["bbh"], limit=2)
    model, tokenizer, lm = live(tiny_llama)
    with pytest.raises(Fault, match="answers with up to 1024 tokens, and the model takes 256"):
        measure(lm, suite.find(section)["bbh"], section, False)
    ability = suite.find(section)["bbh"]
    for config in ability.configs.values():
        config["generation_kwargs"] = {"until": ["Q"], "max_gen_toks": 4, "do_sample": False}
    measured = measure(lm, ability, section, False)
    assert measured.row(STAGE).score == 0 and measured.row(STAGE).shots == 3
    assert measured.row(STAGE).metrics["exact_match,whole-answer"] == {
        "mean": 0,
        "stderr": 0,
        "low": 0,
        "high": 0,
        "n": 2,
    }
    assert all(
        p["prompt"].count("Let's think step by step.") == 4 and p["prompt"].endswith("step by step.\n")
        for p in measured.predictions
    )
    write(tmp_path / "out", "01-ONE", lm, section, measured)
    (file,) = (tmp_path / "out" / "01-ONE").glob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["bbh"]["exact_match,whole-answer"] == 0
    assert found["config"] and found["task_hashes"]
    assert len(list((tmp_path / "out" / "01-ONE").glob("samples_bbh_*.jsonl"))) == len(
        found["group_subtasks"]["bbh"]
    )


ANSWERS = [  # response, BBH's answer, what BBH's filter takes out of it
    ("So the answer is (A).", "(A)", "(A)"),
    ("So the answer is (A)", "(A)", "(A)"),
    ("True is not False. So the answer is True", "True", "True"),
    ("So the answer is True.\nIs it", "True", "True"),
    ("So the answer is True\nIs it", "True", "True"),
    ("the answer is ] ).", "] )", "] )"),
    ("the answer is 14", "14", "14"),
    ("the answer is (B)", "(A)", "(B)"),
    ("I don't know.", "(A)", "[invalid]"),
    ("", "(A)", "[invalid]"),
]
NUMBERS = [  # response, GSM8K's answer, whether it is right
    ("6 * 6 = 36. The answer is 36.", "36", True),
    ("6 * 6 = 36. The answer is 36", "36", True),
    ("The answer is 3", "3", True),
    ("The answer is 3.", "3", True),
    ("The answer is $1,200", "1,200", True),
    ("The answer is 36", "3", False),
    ("The answer is 3", "36", False),
    ("", "36", False),
    (" ", "3", False),
]


@pytest.fixture
def answered(tiny_llama, live, monkeypatch):
    """Function from a section, a task's name and made responses to its measurement, its one part asked."""
    from codyra_llm.evaluate.harness import InMemoryLM, measure

    def measured(section, name, responses):
        _, _, lm = live(tiny_llama)
        monkeypatch.setattr(InMemoryLM, "generate_until", lambda self, requests, *_: list(responses))
        return measure(lm, suite.find(section)[name], section, False)

    return measured


def test_an_answer_without_a_full_stop_keeps_its_last_character(answered, tmp_path, monkeypatch):
    """GSM8K and BBH by the harness, on made responses; empty responses are counted, not empty predictions."""
    (tmp_path / "gsm8k").mkdir()
    rows = [json.dumps({"question": "How many?", "answer": f"so #### {n}"}) for _, n, _ in NUMBERS]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(rows))
    section = GeneralSection(data=str(tmp_path), tasks=["gsm8k_cot"])
    measured = answered(section, "gsm8k_cot", [response for response, *_ in NUMBERS])
    row = measured.row(STAGE)
    assert row.headline == "exact_match,flexible-extract" and row.empty == 2
    assert [p[row.headline] for p in measured.predictions] == [100.0 * right for *_, right in NUMBERS]
    # The harness's first filter: two with a full stop, and 36 that it takes for 3.
    assert row.metrics["exact_match,strict-match"]["mean"] == pytest.approx(300 / 9)

    whole = suite.parts
    monkeypatch.setattr(suite, "parts", lambda *given: dict([next(iter(whole(*given).items()))]))
    (tmp_path / "bbh").mkdir()
    (config,) = suite.parts(suite.HUB["bbh"], None).values()
    examples = [{"input": "Which?", "target": target} for _, target, _ in ANSWERS]
    file = tmp_path / "bbh" / f"{config['dataset_name']}.json"
    file.write_text(json.dumps({"examples": examples}))
    section = GeneralSection(data=str(tmp_path), tasks=["bbh"])
    measured = answered(section, "bbh", [response for response, *_ in ANSWERS])
    row = measured.row(STAGE)
    assert row.headline == "exact_match,whole-answer" and row.empty == 1
    assert [p["prediction"] for p in measured.predictions] == [taken for *_, taken in ANSWERS]
    assert row.score == pytest.approx(70)
    assert row.metrics["exact_match,get-answer"]["mean"] == pytest.approx(30)  # the harness's own


def test_the_hubs_bbh_is_filtered_as_a_folders():
    hub = suite.parts(suite.HUB["bbh"], None)
    (task,) = suite.parts(suite.HUB["gsm8k_cot"], None).values()
    own = suite.parts(Path(suite.shipped.__path__[0]) / "bbh.yaml", None)
    for name, config in hub.items():
        assert config["filter_list"] == own[name]["filter_list"] == suite.BBH_FILTERS
    assert "flexible-extract" in [given["name"] for given in task["filter_list"]]


def test_delta_r_by_hand():
    general = {
        "mmlu": {"before": 40.0, "after": 37.0},
        "piqa": {"before": 70.0, "after": 71.0},
        "gsm8k_cot": {"before": 9.0},
        "ifeval": {"before": 30.0, "after": 0.0},
    }
    assert delta_r(general) == {"value": -1.0, "members": ["mmlu", "piqa"]}
    assert delta_r({}) is None and delta_r({"ifeval": general["ifeval"]}) is None


def test_scores_by_different_filters_have_no_difference():
    """A run that was begun under a task's former headline, and ended under another."""

    def row(task, step, headline, score):
        return ScoreRow("x", step, task, "general", headline, score)

    rows = [
        row("piqa", 0, "acc,none", 60.0),
        row("bbh", 0, "exact_match,get-answer", 10.0),
        row("bbh", 2, "exact_match,whole-answer", 30.0),
        row("piqa", 1, "acc,none", 50.0),
        row("piqa", 2, "acc,none", 58.0),
    ]
    general = before_and_after(rows, lambda row: row.step > 0)
    assert general == {"piqa": {"before": 60.0, "after": 58.0}, "bbh": {"before": None, "after": 30.0}}
    assert delta_r(general) == {"value": -2.0, "members": ["piqa"]}


def test_what_is_refused(root, monkeypatch):
    def told(**section):
        with pytest.raises(Fault) as caught:
            suite.find(GeneralSection(**section))
        return "\n".join(caught.value.messages)

    assert "there is no folder '/nowhere'" in told(data="/nowhere")
    both = told(data=str(root), tasks=["piqaa", "mmlu", "gsm8k_cot"])
    assert "'piqaa' is not a task" in both and "Did you mean 'piqa'?" in both
    assert (
        "'mmlu' reads" in both
        and "nor are 113 more" in both
        and "gsm8k/test.jsonl, which is not there" in both
    )
    assert "'mmul' is not a task of general.data 'hub'. Did you mean 'mmlu'?" in told(
        data="hub", tasks=["mmul"]
    )
    (root / "piqa" / "test.json").unlink()
    assert "holds the files of no task" in told(data=str(root))
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    assert "is not installed; install codyra-llm[general]" in told(data="hub")


def test_a_task_that_bears_the_name_of_an_ability(tiny_llama, toy_stream, root, tmp_path):
    """Both would write predictions/<stage>/<name>.jsonl, and one would be taken for the other's score."""
    shutil.copytree(toy_stream / "ONE", tmp_path / "stream" / "piqa")
    raw = {
        "model": {"path": str(tiny_llama)},
        "data": {"root": str(tmp_path / "stream"), "tasks": ["piqa"], "epochs": 1},
        "method": {"name": "seqlora", "rank": 2},
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(Fault, match="data.tasks: 'piqa' is a task of general ability too"):
        prepare(parse_recipe({**raw, "general": {"data": str(root), "tasks": ["piqa"]}}))
    prepare(parse_recipe(raw))


def test_the_recipe_refuses_what_mini_does_not_have(tiny_llama, toy_stream):
    raw = {
        "model": {"path": str(tiny_llama)},
        "data": {"root": str(toy_stream), "tasks": ["ONE"]},
        "method": "none",
        "output": "x",
    }
    with pytest.raises(Fault, match="'tasks' and 'limit' are for hub and folders"):
        parse_recipe(override(raw, ["general.data=mini", "general.limit=3"]))
    with pytest.raises(Fault, match="general.when: 'never' is not valid"):
        parse_recipe(override(raw, ["general.data=hub", "general.when=never"]))


def test_the_hubs_suite_is_traces():
    """The harness's own configurations and shots: MMLU 5, GSM8K 8, BBH 3, the rest none; nothing is read from
    a folder.
    """
    sizes, shots = {}, {}
    for name in set(suite.HUB) - {"ifeval"}:  # whose import looks for nltk's data
        ability = suite.Ability(name, suite.parts(suite.HUB[name], None))
        sizes[name], shots[name] = (
            len(ability.configs),
            {c.get("num_fewshot") or 0 for c in ability.configs.values()},
        )
        assert not ability.files and ability.is_group == (len(ability.configs) > 1)
    assert sizes == {"mmlu": 57, "gsm8k_cot": 1, "bbh": 27, "boolq": 1, "piqa": 1, "tydiqa_goldp": 9}
    assert shots == {
        "mmlu": {5},
        "gsm8k_cot": {8},
        "bbh": {3},
        "boolq": {0},
        "piqa": {0},
        "tydiqa_goldp": {0},
    }


def test_data_that_cannot_be_read_is_one_sentence(tiny_llama, live, root):
    from codyra_llm.evaluate.harness import measure

    (root / "piqa" / "test.json").write_text("{not json")
    section = GeneralSection(data=str(root))
    with pytest.raises(Fault, match="the data of 'piqa' can't be read .*; correct the files"):
        measure(live(tiny_llama)[2], suite.find(section)["piqa"], section, False)

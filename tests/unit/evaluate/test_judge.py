"""Open-ended prompts: answers side by side, a judge's known preferences counted, and its key nowhere."""

import json
import math
from types import SimpleNamespace

import pytest
from fake_judge import KEY, judge_recipe, likes_good
from fake_judge import judge as judging

from codyra_llm.checkpoints import evaluate as evaluation
from codyra_llm.checkpoints.evaluate import evaluate
from codyra_llm.checkpoints.source import Wanted
from codyra_llm.config.sections import OpenEndedSection
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import read_jsonl, write_jsonl
from codyra_llm.evaluate.judging.client import require
from codyra_llm.evaluate.judging.protocol import preferred
from codyra_llm.evaluate.questions import find_questions
from codyra_llm.experiment import open_ended
from codyra_llm.experiment.experiment import Experiment
from codyra_llm.experiment.preflight import refuse_launch
from codyra_llm.report import judged
from codyra_llm.runtime import launch, signals
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.verdicts import OUTCOMES, Verdicts

PAIRS = (
    [("bad", "GOOD")] * 6 + [("GOOD", "bad")] + [("bad", "worse")] * 2 + [("same", "same")]
)  # (base, final)


def settle(setup, out):
    open_ended.settle(Experiment(setup, out, SimpleNamespace(is_main_process=True), out))


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """Function from a recipe to what `settle` takes: ten answered prompts of one file, and one that base
    alone answered.
    """
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def setup(made, pairs=PAIRS, name="helpful"):
        out = RunFolder(tmp_path / "run")
        rows = [
            {
                "prompt": f"prompt {i}",
                "base": f"{base} {min(i, 8)}",
                "final": f"{final} {min(i, 8)}",
                "after": "T",
            }
            for i, (base, final) in enumerate(pairs)
        ]
        out.write_answers(name, [*rows, {"prompt": "open", "base": "x"}])
        return SimpleNamespace(recipe=made, prompts={name: []}), out

    return setup


def wilson(k, n, z=1.959963984540054):
    middle, half = k / n + z * z / 2 / n, z * math.sqrt(k / n * (1 - k / n) / n + z * z / 4 / n / n)
    return [100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]


def test_known_preferences_give_the_known_counts_and_intervals(answered):
    with judging(likes_good) as server:
        setup, out = answered(judge_recipe(server.url))
        settle(setup, out)
        assert len(server.asked) == 18  # nine pairs of unequal answers in both orders
        assert {request["authorization"] for request in server.asked} == {f"Bearer {KEY}"}
        assert {(r["model"], r["path"], r["temperature"]) for r in server.asked} == {
            ("the-judge", "/v1/chat/completions", 0)
        }
        found = judged.summarise(setup.recipe, out)["files"]["helpful"]
        assert (found["answered"], found["judged"], found["criterion"]) == (10, 10, "helpfulness")
        for outcome, count in (("win", 6), ("tie", 3), ("lose", 1)):
            assert found[outcome]["n"] == count and found[outcome]["share"] == 10 * count
            assert [found[outcome]["low"], found[outcome]["high"]] == pytest.approx(wilson(count, 10))
        settle(setup, out)
        assert len(server.asked) == 18  # nothing is judged twice
    verdicts = [row["verdict"] for row in read_jsonl(out.path / "judged" / "helpful.jsonl")]
    assert [verdicts.count(kind) for kind in ("final", "base", "tie")] == [12, 2, 4]


def test_a_judge_that_likes_a_place_gives_ties(answered):
    for letter in "AB":
        with judging(lambda first, second, letter=letter: f"[[{letter}]]") as server:
            setup, out = answered(judge_recipe(server.url, model=f"likes-{letter}"))
            settle(setup, out)
            found = judged.summarise(setup.recipe, out)["files"]["helpful"]
            assert [found[outcome]["n"] for outcome in OUTCOMES] == [0, 10, 0] and len(server.asked) == 18


def test_a_tie_in_one_order_and_replies_without_verdict(answered):
    """One order says final, the other neither: a tie. A reply without a verdict leaves its pair out, and is
    reported.
    """
    said = {"GOOD": "[[C]]", "bad": "[[B]]"}  # by the first answer
    with judging(lambda first, second: said.get(first.split()[0], "I will not say")) as server:
        setup, out = answered(judge_recipe(server.url), [("bad", "GOOD"), ("mute", "silent")], "harmless_x")
        settle(setup, out)
    assert all("safer" in request["messages"][0]["content"] for request in server.asked)
    summary = judged.summarise(setup.recipe, out)
    found = summary["files"]["harmless_x"]
    assert (found["answered"], found["judged"], found["tie"]["n"], found["criterion"]) == (2, 1, 1, "safety")
    assert "no verdict in the reply: 1." in judged.grid(summary).note
    assert preferred("no [[D]]", ("base", "final")) is None
    with judging(lambda first, second: "[[A]]") as server:  # a tie, of a judge that has found its voice
        setup = SimpleNamespace(recipe=judge_recipe(server.url), prompts=setup.prompts)
        settle(setup, out)
        assert len(server.asked) == 2
    assert judged.summarise(setup.recipe, out)["files"]["harmless_x"]["tie"]["n"] == 2


def test_verdicts_of_an_earlier_version_count_and_are_not_asked_for_again(answered):
    """Their rows name no pair."""
    with judging(likes_good) as server:
        setup, out = answered(judge_recipe(server.url))
        settle(setup, out)
        before, file = judged.summarise(setup.recipe, out), out.path / "judged" / "helpful.jsonl"
        rows = [{key: row[key] for key in row if key != "pair"} for row in read_jsonl(file)]
        write_jsonl(file, rows)
        settle(setup, out)
        assert len(server.asked) == 18 and judged.summarise(setup.recipe, out) == before
        assert len(read_jsonl(file)) == 18


def test_pairs_with_swapped_answers_are_both_judged(answered):
    """Each order of the one is the other order of the other: two questions for four verdicts."""
    with judging(likes_good) as server:
        setup, out = answered(judge_recipe(server.url))
        rows = [{"base": "bad", "final": "GOOD"}, {"base": "GOOD", "final": "bad"}]
        out.write_answers("helpful", [{"prompt": "p", "after": "T", **row} for row in rows])
        settle(setup, out)
        assert len(server.asked) == 2
    found = judged.summarise(setup.recipe, out)["files"]["helpful"]
    assert [found[outcome]["n"] for outcome in OUTCOMES] == [1, 0, 1]


def test_files_of_one_criterion_are_added_up(answered):
    with judging(likes_good) as server:
        setup, out = answered(judge_recipe(server.url))
        answered(judge_recipe(server.url), PAIRS[:7], "more")
        setup.prompts["more"] = []
        settle(setup, out)
    files = judged.summarise(setup.recipe, out)["files"]
    assert list(files) == ["helpful", "more", "all: helpfulness"]
    assert [files["all: helpfulness"][outcome]["n"] for outcome in OUTCOMES] == [12, 3, 2]
    cells = dict(judged.grid(judged.summarise(setup.recipe, out)).rows)["more"]
    assert [cell.text for cell in cells] == ["helpfulness", "7", "7", "85.7", "0.0", "14.3"]


def test_what_was_judged_is_kept_when_the_endpoint_fails(answered):
    def breaks(number):
        return (500, "{}") if number > 5 else None

    with judging(likes_good, breaks) as server:
        setup, out = answered(judge_recipe(server.url, retries=0, parallel=1))
        with pytest.raises(Fault, match="failed \\(status 500\\); what was judged is kept") as caught:
            settle(setup, out)
        assert len(server.asked) == 6 and len(caught.value.messages) == 1
    file = out.path / "judged" / "helpful.jsonl"
    assert len(read_jsonl(file)) == 5
    with open(file, "a") as torn:
        torn.write('{"judge": "the-ju')  # a crash within a line
    with judging(likes_good) as server:
        setup = SimpleNamespace(recipe=judge_recipe(server.url), prompts=setup.prompts)
        settle(setup, out)
        assert len(server.asked) == 13 and len(read_jsonl(file)) == 18
    assert judged.summarise(setup.recipe, out)["files"]["helpful"]["win"]["n"] == 6


def test_a_busy_endpoint_is_asked_again(answered):
    with judging(likes_good, lambda n: {1: (429, "{}"), 2: (503, "{}")}.get(n)) as server:
        setup, out = answered(judge_recipe(server.url, parallel=1), PAIRS[:1])
        settle(setup, out)
        assert len(server.asked) == 4
    assert judged.summarise(setup.recipe, out)["files"]["helpful"]["win"]["n"] == 1


@pytest.mark.parametrize(
    "failure, message",
    [
        ((401, json.dumps({"error": {"message": f"wrong key {KEY}"}})), "status 401, the key is not taken"),
        ((404, "{}"), "status 404, is 'the-judge' known there?"),
        ((429, "{}"), "status 429, too many requests, after 1 retries"),
        ((200, "<html>", "text/html"), "gave no chat completion"),
        ((200, "{torn"), "reply can't be read|gave no chat completion"),
        ((200, '{"choices": []}'), "gave no chat completion"),
        ((200, "[]"), "gave no chat completion|can't be read"),
    ],
)
def test_an_endpoint_that_fails_is_one_sentence_without_the_key(answered, failure, message):
    with judging(likes_good, lambda number: failure) as server:
        setup, out = answered(judge_recipe(server.url, retries=1))
        with pytest.raises(Fault, match=message) as caught:
            settle(setup, out)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)


def test_an_endpoint_that_is_silent_or_gone(answered):
    with judging(likes_good, delay=1.0) as server:
        setup, out = answered(judge_recipe(server.url, retries=0, timeout=0.1, parallel=1), PAIRS[:1])
        with pytest.raises(Fault, match="no answer within 0.1 s"):
            settle(setup, out)
    with pytest.raises(Fault, match="no connection, after 0 retries"):
        settle(setup, out)


def test_the_other_processes_never_wait_for_more_than_a_slice(answered, monkeypatch):
    """18 questions, two at a time: 16 and 2, each within a meeting of its own, and one that counts them."""
    met = []
    with judging(likes_good) as server:
        setup, out = answered(judge_recipe(server.url, parallel=2))
        plain = launch.collectively
        monkeypatch.setattr(
            launch, "collectively", lambda *given: (plain(*given), met.append(len(server.asked)))[0]
        )
        settle(setup, out)
        assert met == [0, 16, 18]


def test_a_proxy_that_is_none_is_said_before_training(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "nonsense://host")
    with pytest.raises(Fault, match="can't be asked .*; correct the environment's proxy"):
        require(judge_recipe("http://judge.example/v1").open_ended.judge)


def test_without_prompts_and_on_other_nodes_no_key_is_asked_for(
    tiny_llama, toy_stream, tmp_path, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    own = [
        "open_ended.judge.base_url=http://127.0.0.1:9/v1",
        "open_ended.judge.model=m",
        "data.max_prompt_tokens=12",
        "eval.max_new_tokens=3",
    ]
    monkeypatch.setattr(evaluation, "_measure", lambda *given: None)
    evaluate(
        str(tiny_llama),
        Wanted(
            data=str(toy_stream),
            tasks=["ONE"],
            base=str(tiny_llama),
            general="mini",
            out=tmp_path / "out",
            overrides=own,
        ),
    )
    method = SimpleNamespace(name="seqlora", max_zero_stage=3, carries_optimizer=False)
    monkeypatch.setattr(launch, "zero_stage", lambda acc: 0)
    given = SimpleNamespace(recipe=judge_recipe("http://127.0.0.1:9/v1"), prompts={"p": []}, method=method)
    refuse_launch(given, SimpleNamespace(is_main_process=False))
    with pytest.raises(Fault, match="holds no key"):
        refuse_launch(given, SimpleNamespace(is_main_process=True))


def test_judging_stops_when_asked_and_keeps_what_it_has(answered, monkeypatch):
    with judging(likes_good) as server:
        setup, out = answered(judge_recipe(server.url, parallel=1))
        monkeypatch.setattr(signals, "_asked", [])
        add = Verdicts.add
        monkeypatch.setattr(Verdicts, "add", lambda *row: (add(*row), signals.ask("SIGTERM")))
        with pytest.raises(signals.Stopped):
            settle(setup, out)
    assert 1 <= len(read_jsonl(out.path / "judged" / "helpful.jsonl")) < 18


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"api_key": KEY}, "'api_key' does not belong in a recipe"),
        ({"key_variable": KEY}, "give the name, not the key"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "without a user, a password"),
        ({"base_url": "host"}, "not an address"),
        ({"base_url": "http://host:abc/v1"}, "not an address"),
        ({"base_url": "http://[::1/v1"}, "not an address"),
        ({"base_url": "http://xn--\u00e9.\u2488/v1"}, "not an address"),
        ({"base_url": "http://999.1.1.1/v1"}, "not an address"),
        ({"base_url": "http://host/v1", "model": None}, "'base_url' needs 'model'"),
    ],
)
def test_a_key_does_not_come_into_a_recipe(settings, message):
    with pytest.raises(Fault, match=message) as caught:
        judge_recipe(**{"url": settings.pop("base_url", None), **settings})
    assert KEY not in str(caught.value)


def test_prompt_files(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "one", "answer": ""}, {"prompt": "two"}]')
    (tmp_path / "b.jsonl").write_text('{"prompt": "über\\n"}\n\n{"prompt": "x\u2028y"}\n', encoding="utf-8")
    (tmp_path / "c.csv").write_text('id,prompt\n1,"a, b\nc"\n2,d\n')
    (tmp_path / "notes.txt").write_text("none")
    section = OpenEndedSection(prompts=str(tmp_path))
    assert find_questions(section) == {
        "a": ["one", "two"],
        "b": ["über\n", "x\u2028y"],
        "c": ["a, b\nc", "d"],
    }
    assert find_questions(section.model_copy(update={"files": ["c"], "limit": 1}))["c"] in (
        ["a, b\nc"],
        ["d"],
    )
    assert find_questions(section.model_copy(update={"prompts": str(tmp_path / "a.json")})) == {
        "a": ["one", "two"]
    }
    for name, content, message in (
        ("d.json", "{}", "expected a list of records"),
        ("d.json", '[{"text": "x"}]', "no 'prompt'"),
        ("d.json", '[{"prompt": 3.5}]', "is a float, expected a string"),
        ("d.jsonl", '{"prompt": " "}', "'prompt' is empty"),
        ("d.jsonl", "{", "line 1: invalid JSON"),
        ("d.csv", "text\nx\n", "no 'prompt'"),
        ("d.csv", 'prompt\n"x', "is not CSV"),
        ("d.csv", "prompt\na,b\n", "has 2 values, the first line names 1"),
        ("d.json", "[3]", "is a int, expected an object"),
        ("a.csv", "prompt\nx\n", "two files"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(Fault, match=message):
            find_questions(section)
        (tmp_path / name).unlink()
    for update, message in (
        ({"files": ["aa"]}, "Did you mean 'a'"),
        ({"prompts": str(tmp_path / "gone")}, "no file or folder"),
        ({"prompts": str(tmp_path / "notes.txt")}, "no .json, .jsonl, .csv"),
    ):
        with pytest.raises(Fault, match=message):
            find_questions(section.model_copy(update=update))

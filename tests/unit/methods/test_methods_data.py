"""icl, rcl, mtl, ilora and seqft: what they show, read, visit, average and store."""

import json
import os
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from helpers import tiny_recipe, write_task

from codyra_llm.config.methods.sequential import REASONING_VARIANT
from codyra_llm.config.registry import METHODS
from codyra_llm.experiment.setup import prepare

FOMC = "What is the stance? Choose one from A, B and C.\n"


@pytest.fixture
def icl_of(tiny_llama, tmp_path):
    """Function from a task's training rows to what icl shows for test prompts."""

    def shown(task, rows, prompts, shots=3, tokens=1024):
        write_task(tmp_path / task, rows)
        write_task(tmp_path / task, [{"prompt": p, "answer": "A"} for p in prompts], "test")
        setup = prepare(
            tiny_recipe(
                tiny_llama,
                tmp_path,
                tmp_path / "out",
                method="icl",
                method__shots=shots,
                data__tasks=[task],
                data__max_prompt_tokens=tokens,
            )
        )
        return setup.method.prompts_at_test(setup.stream, setup.encoder, 0, prompts), setup

    return shown


def test_icl_prompt_by_hand(icl_of):
    rows = [
        {"prompt": f"{FOMC}Text:\n{text}\nStance:", "answer": answer}
        for text, answer in (("up", "A"), ("down", "B"), ("asked", "C"), ("flat", "C"))
    ]
    asked = f"{FOMC}Text:\nasked\nStance:"
    (one, other), _ = icl_of("FOMC", rows, [asked, f"{FOMC}Text:\nsideways\nStance:"], shots=4)
    by_hand = [
        "What is the stance? Choose one from A, B and C.\nWe will give you several examples and you should "
        "follow them to accomplish the task.\n Examples:\n" + "".join(chosen) + "Text:\nasked\nStance:"
        for chosen in permutations(
            ["Text:\nup\nStance:A\n\n", "Text:\ndown\nStance:B\n\n", "Text:\nflat\nStance:C\n\n"]
        )
    ]
    assert one in by_hand, "one of each class, and not the test prompt itself"
    assert other == one.replace("asked", "sideways")


def test_icl_is_balanced_and_seeded_and_cut_to_its_share(icl_of):
    rows = [
        {"prompt": f"{FOMC}Text:\nnumber {i}\nStance:", "answer": "AAAAAAAABC"[i % 10]} for i in range(60)
    ]
    (text,), _ = icl_of("FOMC", rows, ["x"], shots=6)
    assert Counter(re.findall("Stance:(.)", text)) == {"A": 2, "B": 2, "C": 2}
    assert icl_of("FOMC", rows, ["x"], shots=6)[0] == [text]
    long = [{"prompt": f"{FOMC}Text:\n{'政策 policy ' * 99}{i}\nStance:", "answer": "B"} for i in range(4)]
    (text,), setup = icl_of("FOMC", long, ["x"], shots=3, tokens=120)
    shown = text.partition("Examples:\n")[2].split("\n\n")[:3]
    ends = [setup.encoder.tokenizer(one, add_special_tokens=False)["input_ids"] for one in shown]
    assert all(
        15 <= len(ids) <= 21 and one.endswith("Stance:B") for ids, one in zip(ends, shown, strict=True)
    )
    (text,), _ = icl_of(
        "FOMC", long + [{"prompt": FOMC + "short\nStance:", "answer": "B"}], ["x"], shots=1, tokens=120
    )
    assert "\nshort\nStance:B\n\nx" in text, "what fits comes first"


def test_icl_py150_and_meetingbank(icl_of):
    (text,), _ = icl_of(
        "Py150", [{"prompt": f"<s> x = {i} <EOL>", "answer": "y"} for i in (1, 2)], ["<s> z <EOL>"], shots=1
    )
    assert re.fullmatch(
        r"Continue writing the following code\.\nWe will .*\n Examples:\n"
        r"Code:\n<s> x = [12] <EOL>y\n\nCode:\n<s> z <EOL>",
        text,
    )
    assert icl_of("MeetingBank", [{"prompt": "a", "answer": "b"}], ["x"])[0] == ["x"]


def test_icl_reads_the_answer_alone():
    read = METHODS["icl"](METHODS["icl"].Config(), 0).parse_answer
    assert [read("FOMC", " B. hawkish"), read("C-STANCE", "A\n"), read("C-STANCE", "")] == ["B", "A", ""]
    assert read("NumGLUE-cm", "36\n\nQuestion:\nHow") == "36"
    assert read("ScienceQA", "B\nSince it is.\n\nQuestion:\nIs") == "B\nSince it is.\n\n"
    assert read("Py150", "x = 1 <EOL> y = 2") == "x = 1 "
    assert read("20Minuten", "Kurz.\n\nParagraph:\nEs") == "Kurz.\n\n"
    assert read("MeetingBank", "AN ORDINANCE.\nMeeting transcripts:\n") == "AN ORDINANCE.\n"
    assert read("ONE", "A\n\nSay B:B") == "A"


def test_rcl_reads_the_answer_after_its_marker():
    read = METHODS["rcl"](METHODS["rcl"].Config(), 0).parse_answer
    assert read("C-STANCE", "文本对该政策提出了批评，表明持负面态度。\n回答：B") == "B"
    assert read("FOMC", "Higher rates. The answer: no.\nAnswer:B\nAnswer:C") == "B"
    assert (
        read("NumGLUE-cm", "Therefore 6 * 6 = 36 hours.\nAnswer: 36 ")
        == read("NumGLUE-ds", "Answer:36")
        == "36"
    )
    assert read("ScienceQA", "It keeps its height.\nAnswer:B") == "B"
    assert (
        read("20Minuten", "Der Text sagt …\n\nAnswer:Die Polizei hat.\nZwei Frauen.\n")
        == "Die Polizei hat.\nZwei Frauen."
    )
    assert (
        read("MeetingBank", "They vote.Therefore, the summary of the meeting transcripts is:\nA bill")
        == "A bill"
    )
    assert (
        read("Py150", "blueprint = Blueprint ( ) \nReasoning:The code\nReasoning:x")
        == "blueprint = Blueprint ( )"
    )
    assert read("FOMC", "reasoning that never comes to an end") == read("C-STANCE", "Answer:B") == ""


def test_rcl_prompts_by_hand():
    method, stream = METHODS["rcl"](METHODS["rcl"].Config(), 0), type("Stream", (), {})()
    stream.tasks = ["C-STANCE", "ScienceQA", "Py150", "MINE"]

    def shown(task, prompt):
        return method.prompts_at_test(stream, None, stream.tasks.index(task), [prompt])[0]

    assert (
        shown("C-STANCE", "判断以下。\n文本：\nx\n态度：")
        == "判断以下。先给出推理，然后给出答案。\n文本：\nx\n推理："
    )
    science = "Choose an answer for the following question and give your reasons.\n\nQuestion:\nx\n\nAnswer:"
    assert shown("ScienceQA", science) == (
        "Choose an answer for the following question. Give your reasoning first, and then the "
        "answer.\nQuestion:\nx\n\nReasoning:"
    )
    assert shown("Py150", "<s> x <EOL>") == (
        "Complete the next line of the following codes. Give your answer first, and then the "
        "reasoning.\n<s> x <EOL>"
    )
    assert shown("MINE", "x\nAnswer:") == "x\nAnswer:"


@pytest.mark.parametrize(
    "task", ["C-STANCE", "FOMC", "MeetingBank", "NumGLUE-cm", "NumGLUE-ds", "20Minuten", "ScienceQA", "Py150"]
)
def test_rcl_prompts_are_the_real_training_prompts(task):
    """Wherever both variants hold a training prompt, ours is theirs to the character."""
    root = Path(os.environ.get("CODYRA_DATA", "data"))
    files = [root / variant / task / "train.json" for variant in ("LLM-CL-Benchmark_500", REASONING_VARIANT)]
    if not all(f.is_file() for f in files):
        pytest.skip(f"no {files[0]} or no {files[1]}; set CODYRA_DATA")
    plain, theirs = (json.loads(f.read_text(encoding="utf-8")) for f in files)
    stream = type("Stream", (), {"tasks": [task]})()
    method = METHODS["rcl"](METHODS["rcl"].Config(), 0)
    ours = method.prompts_at_test(stream, None, 0, [r["prompt"] for r in plain])
    known = {re.sub(r"\s", "", r["prompt"]): r["prompt"] for r in theirs}
    both = [p for p in ours if re.sub(r"\s", "", p) in known]
    assert len(both) > 20 and all(known[re.sub(r"\s", "", p)] == p for p in both)
    assert all(method.parse_answer(task, r["answer"]) for r in theirs), "every answer holds its marker"

"""Tasks of one's own for lm-evaluation-harness, in YAML files next to their data: scores, what is refused."""

import json
import re

import pytest
import torch

from codyra_llm.config.sections import GeneralSection
from codyra_llm.core.errors import Fault
from codyra_llm.evaluate import suite
from codyra_llm.store.rows import Stage

OWN = """
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: continue.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
STAGE = Stage(0, "base")


def greedy(model, tokenizer, prompt, new):
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(new):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_generation_by_hand_with_a_task_of_ones_own(tiny_llama, live, tmp_path):
    """A YAML next to the files: exact match against the model's own greedy answers, one of two made wrong."""
    from codyra_llm.evaluate.harness import measure

    model, tokenizer, lm = live(tiny_llama)
    texts = ["Say A:", "Who is number 3 of the list, and why?\nAnswer:"]
    answers = [greedy(model, tokenizer, text, 6) for text in texts]
    assert all(answers)
    (tmp_path / "continue.yaml").write_text(OWN)
    (tmp_path / "continue.json").write_text(
        json.dumps([{"text": texts[0], "answer": answers[0]}, {"text": texts[1], "answer": answers[1] + "!"}])
    )
    section = GeneralSection(data=str(tmp_path), tasks=["continue"])
    measured = measure(lm, suite.find(section)["continue"], section, False)
    assert [p["prediction"] for p in measured.predictions] == answers
    assert measured.row(STAGE).score == 50 and measured.row(STAGE).metrics["exact_match,none"][
        "stderr"
    ] == pytest.approx(50)


LAST_WORD = """
task: last_word
dataset_path: json
dataset_kwargs: {data_files: {test: continue.json}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
"""


def test_a_score_is_a_share_of_which_more_is_better(tiny_llama, live, tmp_path):
    """LAMBADA's metrics, the harness's default for the probability of a text: perplexity, then acc. Where
    perplexity is taken for the score, a model that gets worse seems to get better."""
    from codyra_llm.evaluate.harness import measure

    model, tokenizer, lm = live(tiny_llama)
    text = "Who is number 3 of the list?"
    likeliest = tokenizer.decode(
        model(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1].argmax()
    )
    (tmp_path / "last_word.yaml").write_text(LAST_WORD + 'target_delimiter: ""\n')
    rows = [{"text": text, "answer": likeliest}, {"text": text, "answer": "y" if likeliest != "y" else "x"}]
    (tmp_path / "continue.json").write_text(json.dumps(rows))
    section = GeneralSection(data=str(tmp_path), tasks=["last_word"])
    ability = suite.find(section)["last_word"]
    ability.try_out(256)
    row = measure(lm, ability, section, False).row(STAGE)
    assert (row.headline, row.score, list(row.metrics)) == ("acc,none", 50.0, ["acc,none"])


LABELLED = """
task: labelled
dataset_path: json
dataset_kwargs: {data_files: {test: labelled.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["no", "yes"]
doc_to_target: "{{label}}"
"""


@pytest.mark.parametrize("label, said", [("2", "2"), ("true", "'true'")])
def test_a_right_answer_that_is_none_of_the_choices_is_refused(tiny_llama, live, tmp_path, label, said):
    """The harness scores every answer to it as wrong, with a warning alone: labels counted from 1, say."""
    from codyra_llm.evaluate.harness import measure

    section = GeneralSection(data=str(tmp_path), tasks=["labelled"])
    (tmp_path / "labelled.yaml").write_text(LABELLED)

    def ability(*labels):
        rows = [{"text": "Is it?", "label": one} for one in labels]
        (tmp_path / "labelled.json").write_text(json.dumps(rows))
        return suite.find(section)["labelled"]

    told = f"right answer is {said}, expected 0 to 1, or one of ['no', 'yes']"
    ability("1", "yes", "0").try_out(256)
    with pytest.raises(Fault, match=f"index out of range|{re.escape(told)}"):
        ability(label).try_out(256)
    later = ability("1", label)
    later.try_out(256)
    with pytest.raises(Fault, match=re.escape(told)):
        measure(live(tiny_llama)[2], later, section, False)


@pytest.mark.parametrize(
    "task, metric, said",
    [
        (OWN.replace("continue\n", "own\n", 1), "bleu", "bleu"),  # 0 to 100, of all texts together
        (LAST_WORD.replace("last_word", "own"), "perplexity", "perplexity"),
    ],
)
def test_a_task_that_scores_no_example_is_refused_before_weights_load(tmp_path, task, metric, said):
    lines = [line for line in task.splitlines() if not line.startswith("metric_list")]
    (tmp_path / "own.yaml").write_text("\n".join([*lines, f"metric_list: [{{metric: {metric}}}]"]))
    (tmp_path / "continue.json").write_text(json.dumps([{"text": "Say A:", "answer": "A"}]))
    ability = suite.find(GeneralSection(data=str(tmp_path), tasks=["own"]))["own"]
    with pytest.raises(
        Fault, match=f"'own' is measured by {said}, which gives an example no score of 0 to 1"
    ):
        ability.try_out(256)


def test_choices_that_look_like_numbers_stay_texts(tmp_path):
    """MMLU: '0.50' and 'None' are what the file says, a gold answer is a letter in the examples."""
    for split, row in (("dev", "Half?,0.50,1.0,None,7,0"), ("test", "Nothing?,0.25,N/A,None,08,2")):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        for config in suite.parts(suite.HUB["mmlu"], None).values():
            (tmp_path / "mmlu" / split / f"{config['dataset_name']}_{split}.csv").write_text(
                f"question,choice0,choice1,choice2,choice3,answer\n{row}\n"
            )
    ability = suite.find(GeneralSection(data=str(tmp_path), tasks=["mmlu"]))["mmlu"]
    assert len(ability.configs) == 57
    task = suite.Ability("mmlu", {"mmlu_anatomy": ability.configs["mmlu_anatomy"]}).tasks["mmlu_anatomy"]
    text = str(task.fewshot_context(task.eval_docs[0], num_fewshot=1))
    assert "Half?\nA. 0.50\nB. 1.0\nC. None\nD. 7\nAnswer: A\n\n" in text
    assert text.endswith("Nothing?\nA. 0.25\nB. N/A\nC. None\nD. 08\nAnswer:")
    assert task.doc_to_target(task.eval_docs[0]) == 2

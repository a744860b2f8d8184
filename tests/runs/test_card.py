"""The model card of every export: what huggingface_hub reads from it is what the run scored; foreign text
stays text.
"""

import json

import pytest
import yaml
from helpers import export, learnt
from huggingface_hub import ModelCard
from made_runs import EVIL, TASKS, make

from codyra_llm.experiment.setup import prepare
from codyra_llm.report import card


@pytest.fixture(scope="module")
def run(tiny_llama, toy_stream, tmp_path_factory):
    return learnt(
        tiny_llama, toy_stream, tmp_path_factory.mktemp("runs") / "run", {"name": "seqlora", "rank": 4}
    )


def read(folder):
    """The card as the hub's library reads it, which validates the model-index; written again it is the
    same.
    """
    found = ModelCard.load(folder / "README.md")
    assert ModelCard(str(found)).data.to_dict() == found.data.to_dict()
    return found


def results(found):
    return {
        (r.dataset_config, r.dataset_split, r.metric_type, r.metric_name): r.metric_value
        for r in found.data.eval_results
    }


def test_the_card_of_every_export_holds_what_its_stage_scored(run, tmp_path):
    for name, options, step in (
        ("merged", [], 2),
        ("one", ["--after", "ONE"], 1),
        ("peft", ["--format", "peft"], 2),
        ("stage", ["--format", "stage"], 2),
    ):
        found = read(export(run, tmp_path / name, *options))
        assert results(found) == {
            (row.task, "test", row.headline, f"{row.headline}@1"): pytest.approx(row.score, abs=1e-4)
            for row in run.scores
            if row.step == step
        }
        assert len(results(found)) == step and ("Measures over the stream" in found.text) == (step == 2)
        assert f"({step} of 2 tasks)" in found.text and "first 5 examples" in found.text
    assert read(tmp_path / "peft").data.library_name == "peft"
    assert (run.path / "checkpoint" / "README.md").read_bytes() == (
        tmp_path / "merged" / "README.md"
    ).read_bytes()
    text = read(run.path / "checkpoint").text
    assert json.loads(text.partition("```json\n")[2].partition("\n```")[0]) == run.recipe.model_dump(
        mode="json"
    )
    assert f"transformers {run.manifest['transformers']}" in text and f"{run.summary['op']:.2f}" in text


def test_a_model_without_an_update_has_no_scores(run, tmp_path):
    found = read(export(run, tmp_path / "less", "--without", "ONE"))
    assert (
        found.data.eval_results is None
        and "update of ONE is left out" in found.text
        and "was not scored" in found.text
    )


@pytest.mark.parametrize(
    "readme, config, licence",
    [
        ("---\nlicense: apache-2.0\n---\n# x\n", {"license": "mit"}, {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nmodel-index: 3\n---\n",
            {},
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("# no metadata\n", {"license": "mit"}, {"license": "mit"}),
        (None, {}, {}),
        ("---\nlicense: [a, b]\n---\n", {}, {}),
        ("---\n{torn: [\n---\n", {}, {}),
        ("---\n- a list\n---\n", {}, {}),
        (b"\xff\xfe", {}, {}),
    ],
)
def test_the_licence_is_what_the_base_says(readme, config, licence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if readme is not None:
        (tmp_path / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    text = card.render(tmp_path, make(tmp_path / "run"), 2, None, "merged")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    found = ModelCard.load(tmp_path / "README.md")
    assert {key: value for key, value in found.data.to_dict().items() if key.startswith("license")} == licence
    assert ("say nothing of its licence" in found.text) == (not licence)


def test_foreign_text_stays_text_and_a_hub_id_is_the_base(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    folder = make(tmp_path / "run")
    texts = [card.render(tmp_path, folder, 2, None, kind) for kind in ("merged", "merged", "peft")]
    assert texts[0] == texts[1]
    front, body = texts[0].split("---\n", 2)[1:]
    data = yaml.safe_load(front)
    assert (data["base_model"], data["base_model_relation"]) == ("some/model", "finetune")
    assert yaml.safe_load(texts[2].split("---\n", 2)[1])["base_model_relation"] == "adapter"
    assert [r["dataset"]["config"] for r in data["model-index"][0]["results"]] == [*TASKS, "probe"]
    outside = body.partition("```json")[0]
    assert (
        "<script" not in outside and "<x>" not in outside and "&lt;script>" in outside and EVIL not in outside
    )
    assert "\n```" not in body.partition("```json\n")[2].partition("\n```\n")[0]


def test_a_local_base_is_not_called_a_hub_model(run):
    found = read(run.path / "checkpoint")
    assert found.data.base_model is None and card.render(
        prepare(run.recipe).base, run, 1, None, "merged"
    ) == str((run.path / "checkpoint" / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "generation, kind, told",
    [
        (
            {"do_sample": True, "repetition_penalty": 1.1, "top_k": 20},
            "merged",
            "do_sample=True, repetition_penalty=1.1",
        ),
        ({"repetition_penalty": 1.05}, "peft", "repetition_penalty=1.05"),
        ({"do_sample": True}, "gguf", None),  # which has no such settings
        ({"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1, "temperature": 0.6}, "merged", None),
        (None, "merged", None),
    ],
)
def test_what_makes_other_answers_than_the_scored_ones_is_told(tmp_path, generation, kind, told):
    """Qwen 2.5's chat models divide logits of repeated tokens by 1.05 to 1.1, in greedy answers too."""
    if generation:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = card._decoding(tmp_path, kind)
    assert bool(found) == bool(told)
    assert not told or f"generation config sets {told}, which" in found[0]


def test_general_ability_is_told_where_this_stage_has_it(tmp_path):
    """A limit of the recipe says nothing of a stage at which general ability was not measured."""
    folder = make(tmp_path / "run", general={"data": str(tmp_path), "limit": 30})
    said = "General ability was measured on at most 30 drawn examples of each task."
    assert said in card._of_scores(folder.recipe, card._scored(folder, 2))
    lines = card._of_scores(folder.recipe, card._scored(folder, 0))
    assert lines and not any("General ability" in line for line in lines)

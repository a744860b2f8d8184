"""Runs on tasks whose examples are chats, which the model's template writes: what `generate` sends, and what
exports tell other tools to send."""

import json
import shutil

import pytest
import yaml
from adapters import recipe
from gguf import GGUFReader

from codyra_llm.checkpoints.evaluate import evaluate
from codyra_llm.checkpoints.export import Export, export
from codyra_llm.checkpoints.generate import answer
from codyra_llm.checkpoints.source import Wanted
from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.experiment.export import LINEAGE
from codyra_llm.experiment.run import run as run_recipe
from codyra_llm.experiment.setup import prepare
from codyra_llm.models.tokenizer import DATE
from codyra_llm.store.rows import Stage

TEMPLATE = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<unk>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASKED = "Say B:"


@pytest.fixture(scope="module")
def chats(tiny_llama, toy_stream, tmp_path_factory):
    """A run of two tasks: TALK has chats, SAY plain texts."""
    place = tmp_path_factory.mktemp("chats")
    base = shutil.copytree(tiny_llama, place / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    rows = []
    for number in range(20):
        said = {"role": "assistant", "content": "AB"[number % 2]}
        rows.append({"messages": [{"role": "user", "content": f"Say {number}:"}, said]})
    lines = [json.dumps(row) for row in rows]
    (place / "talk.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shutil.copy(toy_stream / "ONE" / "train.json", place / "say.json")
    tasks = {
        "TALK": {"metrics": ["exact_match"], "files": "talk.jsonl", "format": "openai"},
        "SAY": {"metrics": ["exact_match"], "files": "say.json"},
    }
    limits = {"max_prompt_tokens": 64, "max_answer_tokens": 8, "max_new_tokens": 2}
    (place / "benchmark.yaml").write_text(yaml.safe_dump({"tasks": tasks, "protocols": {"own": limits}}))
    raw = recipe(base, place, place / "run", {"name": "seqlora"}).model_dump(mode="json")
    named = [f"data.benchmark={place}", "data.tasks=[TALK, SAY]", "data.epochs=1", "eval.max_new_tokens=4"]
    return run_recipe(parse_recipe(override(raw, named)))


def sent(folder, index, by_template):
    """What the model after task `index` answers to a user's message, or to the plain text."""
    setup = prepare(folder.recipe, runs=False)
    model = setup.model(folder.archive(), index).eval()
    text = f"{DATE}[user]{ASKED}<unk>[assistant]" if by_template else ASKED
    ids = [1, *setup.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert setup.tokenizer.bos_token_id == 1
    return setup.encoder.texts(generate_ids(model, [ids], 4, setup.encoder.ends))[0]


def test_a_prompt_is_a_users_message_where_the_task_has_chats(chats, tmp_path):
    asked = [sent(chats, 0, True), sent(chats, 1, False)]
    assert asked[0] != sent(chats, 0, False)
    for name, index in (("TALK", 0), ("SAY", 1)):
        assert answer(f"{chats.path}@{name}", ASKED, 4) == asked[index]
        for format in ("merged", "peft"):
            out = tmp_path / f"{format}-{name}"
            export(chats, Export(after=name, format=format, dtype=None), out)
            assert answer(str(out), ASKED, 4) == asked[index]
        export(chats, Export(after=name, format="gguf", type="f32"), tmp_path / name)
        assert answer(str(tmp_path / name / f"{name}-f32.gguf"), ASKED, 4) == asked[index]
    assert answer(f"{chats.path}@base", ASKED, 4) == sent(chats, -1, True)
    file = tmp_path / "merged-SAY" / LINEAGE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat": 1}))
    with pytest.raises(Fault, match="'chat' is 1, expected true or false"):
        answer(str(tmp_path / "merged-SAY"), ASKED, 4)


def test_a_gguf_file_is_scored_by_the_recipe_next_to_it(chats, tmp_path):
    export(chats, Export(format="gguf", type="f32"), tmp_path / "out")
    scored = evaluate(str(tmp_path / "out" / "out-f32.gguf"), Wanted(out=tmp_path / "scores"))
    stage = Stage(2, "SAY")
    for task in ("TALK", "SAY"):
        assert scored.predictions(stage, task) == chats.predictions(stage, task)
        assert scored.predictions(stage, task)[0]["prediction"]


def test_exports_say_how_to_ask(chats, tmp_path):
    export(chats, Export(after="TALK", format="gguf"), tmp_path / "talk")
    card, ollama = ((tmp_path / "talk" / name).read_text() for name in ("README.md", "Modelfile"))
    assert "Write prompts with the tokenizer's chat template" in card and "llama-server -m" in card
    assert "Prompts are read with the tokenizer's chat template." in card
    assert f"was {DATE} in training" in card
    assert f'{{{{ if eq $i 0 }}}}{{{{ "{DATE}[user]" }}}}' in ollama and 'PARAMETER stop "<unk>"' in ollama
    fields = GGUFReader(tmp_path / "talk" / "talk-f16.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    export(chats, Export(format="merged"), tmp_path / "both")
    card = (tmp_path / "both" / "README.md").read_text()
    assert "write prompts of TALK with the tokenizer's chat template" in card
    assert "those of SAY as plain text" in card


def test_a_model_of_plain_texts_gets_no_chat_template(chats, tmp_path):
    """Ollama prefers one in the GGUF file to the Modelfile's where it knows tools, and llama.cpp's programs
    apply it to every prompt."""
    raw = chats.recipe.model_dump(mode="json")
    named = ["data.tasks=[SAY]", "data.epochs=1", "eval.max_new_tokens=4", f"output={tmp_path / 'run'}"]
    folder = run_recipe(parse_recipe(override(raw, named)))
    assert folder.archive().tasks == ["SAY"] and Stage.of(["SAY"], 0).after == "SAY"
    export(folder, Export(format="gguf"), tmp_path / "say")
    assert "tokenizer.chat_template" not in GGUFReader(tmp_path / "say" / "say-f16.gguf").fields
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "say" / "Modelfile").read_text()
    card = (tmp_path / "say" / "README.md").read_text()
    assert "Give prompts as plain text" in card and DATE not in card


@pytest.mark.parametrize("method", ["replay", "codyra_drift"])
def test_a_general_set_of_chats_is_written_by_the_template(chats, tmp_path, method):
    """Though no task that is learnt has chats."""
    raw = chats.recipe.model_dump(mode="json")
    raw |= {"method": {"name": method, "general": "TALK"}, "output": str(tmp_path / "run")}
    raw["data"] |= {"tasks": ["SAY"], "epochs": 1}
    setup = prepare(parse_recipe(raw))
    assert setup.stream.extra("TALK")[0]["prompt"].endswith("[user]Say 0:<unk>[assistant]")

"""Exports of a run: what other tools read in them."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import TASKS, recipe
from gguf import GGUFReader
from helpers import call
from safetensors.torch import load_file, save_file
from tiny import SIZES, save_tiny
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from codyra_llm.checkpoints.generate import answer
from codyra_llm.cli import app
from codyra_llm.core import files
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.experiment import export as export_module
from codyra_llm.experiment.export import (
    LINEAGE,
    adapter_notes,
    write_gguf_folder,
    write_merged,
    write_peft,
)
from codyra_llm.experiment.plan import skeleton
from codyra_llm.experiment.run import run as run_recipe
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.merge import merged_weight
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods import sizes
from codyra_llm.models import loading
from codyra_llm.models.weights import WeightReader
from codyra_llm.store.archive import Archive

SEQLORA = {"name": "seqlora"}


def logits(model, seed=0):
    ids = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def unequal(setup, folder):
    """Two updates whose ranks differ from site to site, 1 to 4, as selection and pruning leave them."""
    archive, draw = Archive(folder, "base"), torch.Generator().manual_seed(0)
    names = [name for name in WeightReader(setup.base).handle_of if "_proj" in name]
    for task in TASKS[:2]:
        adapters = {}
        for number, name in enumerate(names):
            rows, columns = WeightReader(setup.base).get(name).shape
            rank = 1 + (number + len(task)) % 4
            a, b = (torch.randn(*size, generator=draw) * 0.2 for size in ((rank, columns), (rows, rank)))
            adapters[name.removesuffix(".weight")] = Adapter(a, b, torch.rand(rank, generator=draw))
        archive.append(task, Update(adapters, 0.5))
    return archive


@pytest.fixture
def stored_bf16(tiny_llama, tmp_path):
    """The tiny LLaMA as it would be published: bfloat16."""
    folder = tmp_path / "bf16"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(tiny_llama / "model.safetensors")
    save_file({n: w.bfloat16() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def setup(tiny_llama, toy_stream, tmp_path):
    return prepare(recipe(tiny_llama, toy_stream, tmp_path / "run", SEQLORA))


def test_a_peft_export_scales_by_one_whatever_the_reader_knows(setup, tmp_path):
    """Readers that know r and lora_alpha alone (llama.cpp's converter, vLLM) scale each site by alpha / r."""
    from peft import PeftModel

    archive = unequal(setup, tmp_path / "updates")
    one = write_peft(setup, archive, 1, None, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == one.rank
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(config["target_modules"]) == projections
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    ranks = {t.shape[0] if "lora_A" in n else t.shape[1] for n, t in tensors.items()}
    assert ranks == {one.rank}
    reader = WeightReader(setup.base)
    for site in one.factors:
        a, b = (tensors[f"base_model.model.{site}.lora_{key}.weight"] for key in "AB")
        expected = merged_weight(torch.zeros(b.shape[0], a.shape[1]), archive.terms(1), site)
        torch.testing.assert_close(config["lora_alpha"] / len(a) * b @ a, expected, rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(reader.folder)
    read = logits(PeftModel.from_pretrained(base, tmp_path / "peft"))
    torch.testing.assert_close(read, logits(setup.model(archive, 1)), rtol=1e-4, atol=1e-4)


def test_a_peft_export_carries_the_bases_tokenizer_and_nothing_else_of_it(setup, tmp_path):
    write_peft(setup, unequal(setup, tmp_path / "updates"), 1, None, tmp_path / "peft")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (setup.base / name).read_bytes()
    assert not (tmp_path / "peft" / "config.json").exists()  # it would be taken for a model of its own


def exported_base(model, stream, tmp_path, **named):
    """What an adapter's config says of its base: name and revision."""
    asked = recipe(model, stream, tmp_path / "run", SEQLORA)
    setup = prepare(asked.model_copy(update={"model": asked.model.model_copy(update=named)}))
    write_peft(setup, unequal(setup, tmp_path / "updates"), 1, None, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    return config["base_model_name_or_path"], config["revision"]


def test_an_adapter_names_the_revision_of_its_base(tiny_llama, toy_stream, tmp_path, monkeypatch):
    """Without it readers put the adapter on whatever the hub's main branch holds by then."""
    monkeypatch.setattr(loading, "download", lambda name, revision: tiny_llama)
    named = exported_base("owner/name", toy_stream, tmp_path, revision="v1")
    assert named == ("owner/name", "v1")


def test_an_export_is_asked_as_its_run_asked(tiny_llama, toy_stream, tmp_path):
    """`generate` writes the prompt by the chat template if the recipe that the export carries does."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TURNS)
    asked = recipe(base, toy_stream, tmp_path / "run", SEQLORA)
    expected = {}
    for chat in (True, False):
        data = asked.data.model_copy(update={"chat_template": chat})
        setup = prepare(asked.model_copy(update={"data": data}))
        archive = unequal(setup, tmp_path / f"updates-{chat}")
        ids = setup.encoder.prompt("Say B:")[0]
        found = generate_ids(setup.model(archive, 1).eval(), [ids], 4, setup.encoder.ends)
        expected[chat] = setup.encoder.texts(found)[0]
        write_merged(setup, archive, 1, None, tmp_path / f"merged-{chat}")
        write_peft(setup, archive, 1, None, tmp_path / f"peft-{chat}")
        assert answer(str(tmp_path / f"merged-{chat}"), "Say B:", 4) == expected[chat]
        assert answer(str(tmp_path / f"peft-{chat}"), "Say B:", 4) == expected[chat]
    assert expected[True] != expected[False]


@pytest.mark.parametrize("model", ["~/models/tiny", "models/tiny"])
def test_an_adapter_names_a_folder_that_is_found_from_anywhere(
    tiny_llama, toy_stream, tmp_path, monkeypatch, model
):
    shutil.copytree(tiny_llama, tmp_path / "models" / "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert exported_base(model, toy_stream, tmp_path) == (str(tmp_path / "models" / "tiny"), None)


TURNS = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<unk>{% endfor %}"


@pytest.mark.parametrize("generation", [{"eos_token_id": 2, "top_k": 7, "_from_model_config": True}, None])
def test_an_export_stops_where_the_evaluated_model_did(tiny_llama, toy_stream, tmp_path, generation):
    """A base with a chat template whose generation config names EOS alone, as Qwen 2.5's: answers are trained
    to end as turns do, and servers stop at what the generation config names."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TURNS)
    (base / "generation_config.json").unlink()
    if generation:
        (base / "generation_config.json").write_text(json.dumps(generation))
    asked = recipe(base, toy_stream, tmp_path / "run", SEQLORA)
    data = asked.data.model_copy(update={"chat_template": True})
    setup = prepare(asked.model_copy(update={"data": data}))
    end = setup.encoder.answer("7")[0][-1]
    assert end == setup.tokenizer.unk_token_id and setup.encoder.ends == {2, end}
    archive = unequal(setup, tmp_path / "updates")
    write_merged(setup, archive, 1, None, tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
    assert (read.eos_token_id, read.bos_token_id) == ([2, end], None if generation else 1)
    assert read.top_k == (7 if generation else GenerationConfig().top_k)
    file = write_gguf_folder(setup, archive, 1, None, tmp_path / "gguf")
    assert 'PARAMETER stop "<unk>"\n' in (file.parent / "Modelfile").read_text()
    assert GGUFReader(file).fields["tokenizer.ggml.eot_token_id"].contents() == end
    notes = adapter_notes(setup, write_peft(setup, archive, 1, None, tmp_path / "peft"))
    assert "Answers end at <unk> too" in notes[1] and f"stop_token_ids=[{end}]" in notes[1]


def test_an_export_is_in_the_bases_dtype_summed_in_float32_and_cast_once(stored_bf16, toy_stream, tmp_path):
    asked = recipe(stored_bf16, toy_stream, tmp_path / "run", SEQLORA)
    wide_model = asked.model.model_copy(update={"dtype": "float32"})
    setup = prepare(asked.model_copy(update={"model": wide_model}))
    archive = unequal(setup, tmp_path / "updates")
    write_merged(setup, archive, 1, None, tmp_path / "merged")
    write_merged(setup, archive, 1, None, tmp_path / "wide", dtype=torch.float32)
    narrow, wide = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "wide"))
    assert {w.dtype for w in narrow.values()} == {torch.bfloat16}
    assert all(torch.equal(narrow[name], weight.bfloat16()) for name, weight in wide.items())
    model = setup.model(archive, 1)
    assert all(torch.equal(wide[name], weight) for name, weight in model.state_dict().items())
    assert (tmp_path / "merged" / "config.json").read_bytes() == (setup.base / "config.json").read_bytes()
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_an_export_is_summed_where_the_evaluated_model_is(setup, tmp_path, monkeypatch):
    """A GPU adds products in another order than a CPU, which a cast to bfloat16 makes a last bit of. Weights
    that no update changes are not sent there."""
    places = {}

    def noted(name, base, terms):
        places[name] = base.device.type
        return torch.zeros(base.shape)

    monkeypatch.setattr(export_module, "stored_weight", noted)
    monkeypatch.setattr(export_module, "own_device", lambda: torch.device("meta"))
    write_merged(setup, unequal(setup, tmp_path / "updates"), 1, None, tmp_path / "merged")
    sites = {name for name in WeightReader(setup.base).handle_of if "_proj" in name}
    assert places == dict.fromkeys(sites, "meta")
    own, written = WeightReader(setup.base), WeightReader(tmp_path / "merged")
    assert all(torch.equal(written.get(n), own.get(n) * (n not in sites)) for n in own.handle_of)


def test_a_tied_head_that_is_stored_stays_the_embeddings(tiny_gemma2, toy_stream, tmp_path):
    """Both names of one parameter in the files: an update of all weights is written under both."""
    base = tmp_path / "base"
    shutil.copytree(tiny_gemma2, base)
    weights = load_file(tiny_gemma2 / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    setup = prepare(recipe(base, toy_stream, tmp_path / "run", SEQLORA))
    archive, name = Archive(tmp_path / "updates", "base"), "model.embed_tokens.weight"
    archive.append("ONE", Update({}, 1.0, "replace", {name: weights[name] + 1}))
    write_merged(setup, archive, 0, None, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(written[name], weights[name] + 1)
    assert torch.equal(written["lm_head.weight"], weights[name] + 1)


def test_what_plan_says_of_the_disk_is_what_is_written(stored_bf16, toy_stream, tmp_path):
    asked = recipe(stored_bf16, toy_stream, tmp_path / "run", SEQLORA).model_copy(update={"checkpoint": True})
    setup = prepare(asked)
    folder = run_recipe(asked)
    parts = ("checkpoint", "updates", "state")
    held = [file for part in parts for file in (folder.path / part).rglob("*")]
    written = sum(file.stat().st_size for file in held if file.is_file())
    said = sizes.disk_bytes(setup.recipe, setup.base, setup.method, skeleton(setup))
    cards = 30_000  # the card, and the headers of updates, which don't grow with the model
    assert abs(written - said) < cards
    model = (folder.path / "checkpoint" / "model.safetensors").stat().st_size
    assert model == (stored_bf16 / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def trained(run):
    return run(SEQLORA).path


def export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_a_rank_is_cut_by_the_command_and_the_error_told(trained, tmp_path):
    done = export(trained, tmp_path / "peft", "--format", "peft", "--rank", 2)
    assert done.exit_code == 0, done.output
    card = (tmp_path / "peft" / "README.md").read_text()
    told = json.loads((tmp_path / "peft" / LINEAGE).read_text())["truncation"]
    assert told["rank"] == 2 and 0 < told["error"] < 1 and len(told["sites"]) == 14
    assert f"is {told['error']:.3g} over all sites" in card and "cut to rank 2" in card
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 2


def test_the_card_says_of_what_the_rank_is_a_sum(run, tmp_path):
    folder = run({"name": "olora"}).path
    for after, words in (("THREE", "rank 12 is the sum over 3 tasks"), ("ONE", "rank is 4; sites")):
        assert export(folder, tmp_path / after, "--format", "peft", "--after", after).exit_code == 0
        assert words in (tmp_path / after / "README.md").read_text()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--rank", 4], "--rank: an export as merged has no such choice"),
        (["--format", "peft", "--dtype", "float16"], "--dtype: an export as peft has no such choice"),
        (["--dtype", "float8"], "--dtype: 'float8' is not a dtype of exports; choose one of float32"),
        (["--format", "stage", "--without", "ONE"], "--without: an export as stage has no such choice"),
        (["--format", "onnx"], "--format: 'onnx' is not a format; choose merged, peft"),
    ],
)
def test_options_of_another_format_are_refused(trained, tmp_path, options, words):
    done = export(trained, tmp_path / "out", *options)
    assert words in str(done.exception) and not (tmp_path / "out").exists()


def test_a_base_of_transformers_4_is_exported_with_its_own_files(toy_stream, tmp_path):
    """RoPE's base and scaling, the tokenizer's class and special tokens: what 4.x reads is still there."""
    base = save_tiny(tmp_path / "base", LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False))
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    setup = prepare(recipe(base, toy_stream, tmp_path / "run", SEQLORA))
    archive = unequal(setup, tmp_path / "updates")
    write_merged(setup, archive, 1, None, tmp_path / "merged")
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(read), logits(setup.model(archive, 1)))


@pytest.mark.parametrize(
    "format, words",
    [
        ("merged", "AutoModelForCausalLM.from_pretrained(DIR)"),
        ("peft", "AutoPeftModelForCausalLM.from_pretrained(DIR)"),
        ("gguf", "llama-completion -m FILE.gguf"),
    ],
)
def test_the_card_says_how_to_load_and_to_ask(trained, tmp_path, format, words):
    assert export(trained, tmp_path / "out", "--format", format).exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "llama-cli" not in card
    )  # it has no mode without a chat template any more, and waits for a next turn
    assert words in card and "no chat template, and completion endpoints" in card and "## Scores" in card


def test_the_python_of_the_serving_page_runs(trained, tmp_path, monkeypatch):
    """Each block as it stands, in the folder where its export is `out`."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block, format in zip(blocks, ("merged", "peft"), strict=True):
        place = tmp_path / format
        place.mkdir()
        monkeypatch.chdir(place)
        assert export(trained, "out", "--format", format).exit_code == 0
        exec(block, {})


def test_a_gguf_export_is_a_folder_for_ollama(trained, tmp_path):
    assert export(trained, tmp_path / "mine", "--format", "gguf", "--type", "q8_0").exit_code == 0
    names = {file.name for file in (tmp_path / "mine").iterdir()}
    assert names == {"mine-q8_0.gguf", "Modelfile", "README.md", LINEAGE}
    plain = 'FROM ./mine-q8_0.gguf\nTEMPLATE """{{ .Prompt }}"""\n'
    greedy = "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
    assert (tmp_path / "mine" / "Modelfile").read_text() == plain + greedy


def test_the_readers_figures_are_those_of_the_page():
    """Every cell that was read is right, but for what transformers' own GGUF reader is known to lose."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "readers"))
    import matrix

    figures = json.loads(matrix.FIGURES.read_text(encoding="utf-8"))
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.write_page(figures)
    wrong = [
        (model, cell["export"], cell["by"])
        for model, cells in figures["models"].items()
        for cell in cells
        if "error" in cell or not (cell["tokens"] and cell["answers"] and cell["logits"] < 0.05)
    ]
    assert all(export == "gguf" and by.startswith("transformers") for _, export, by in wrong), wrong


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ([], 1.0),
        (["--dtype", "bfloat16"], 0.5),
        (["--format", "gguf", "--type", "f32"], 1.0),
        (["--format", "gguf"], 0.5),
        (["--format", "gguf", "--type", "q8_0"], 0.25),
    ],
)
def test_an_export_without_room_is_refused_before_anything_is_written(
    options, share, finished, tmp_path, monkeypatch, capsys
):
    """The weights of the base are float32, whose files are of their size but for headers and tokenizer."""
    run, _ = finished("seqlora")
    base = Path(run.recipe.model.path)
    weights = (base / "model.safetensors").stat().st_size
    others = sum(file.stat().st_size for file in base.iterdir()) - weights
    needed = share * weights + (64 << 20)
    header = 1 << 13  # at most
    for free, fits in ((needed + others + header, True), (needed - 0.1 * share * weights, False)):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        code, _, err = call(capsys, "export", run.path, tmp_path / f"out {fits}", *options)
        assert (code == 0) is fits, err
    assert "error: OUT: " in err and "GB free; free some, or choose another OUT" in err
    assert not (tmp_path / "out False").exists()

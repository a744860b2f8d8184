"""The contract of model families: what each must give from a folder of weights to an export that plain
transformers reads. A family of a user's own passes the same."""

import logging
import shutil
from copy import deepcopy
from dataclasses import replace
from io import StringIO

import pytest
import torch
from adapters import TASKS, recipe
from packed import batch, examples
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_families import MADE, OLMO2, OWN, WHOLE, make
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from codyra_llm.config.recipe import parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.evaluate import generate
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.experiment.export import write_merged, write_peft
from codyra_llm.experiment.plan import plan, skeleton
from codyra_llm.experiment.run import run
from codyra_llm.experiment.setup import prepare
from codyra_llm.formats.adapter import Base, base_of
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.models import families, loading
from codyra_llm.models.attention import packed_attention
from codyra_llm.models.families import known
from codyra_llm.models.weights import WeightReader, stored, weight_files

SCALE = 1.3
NEW = 12


@pytest.fixture
def own_family(monkeypatch):
    """OLMo 2 is a family while the test lasts."""
    monkeypatch.setattr(known, "_registered", dict(known._registered))
    return families.register(OLMO2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Function from a name to its folder, made once."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = make(name, tmp_path_factory.mktemp("families") / "model")
        return folders[name]

    return folder


@pytest.fixture(params=[*MADE, *OWN])
def folder(request, made):
    if request.param in OWN:
        request.getfixturevalue("own_family")
    return made(request.param)


def adapted(folder, fused):
    """The model in float64 with an adapter, B ≠ 0, on every projection that it has."""
    model = loading.load(folder, torch.float64).train()
    names = {name.rpartition(".")[2] for name in families.projections(model)}
    attach(model, sorted(names), AdapterSpec(3, SCALE, importance="normal"))
    draw = torch.Generator().manual_seed(1)
    for name, layer in sites(model).items():
        layer.reset(0, name)
        with torch.no_grad():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=draw, dtype=torch.float64))
    share_inputs(model, fused)
    return model


def gradients(model, own):
    model.zero_grad()
    loss = own.cross_entropy(model)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def by_transformers(folder, adapters, own):
    """The same of the whole model as transformers opens the folder, with ΔW added to its weights, from all of
    its logits: dA = s·diag(w) Bᵀ dW, dw = s·diag(Bᵀ dW Aᵀ), dB = s·dW Aᵀ diag(w)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
    family = families.family_in(folder)
    weights = {site: model.get_submodule(family.whole_name(site)).weight for site in adapters}
    with torch.no_grad():
        for site, layer in adapters.items():
            a, w, b = layer.factors
            weights[site].add_(SCALE * (b * w) @ a).requires_grad_()
    logits = model(input_ids=own.ids).logits.flatten(0, 1)[own.predictors]
    loss = (own.weights * functional.cross_entropy(logits, own.targets, reduction="none")).sum()
    loss.backward()
    found = {"loss": loss.detach()}
    for site, layer in adapters.items():
        (a, w, b), d = layer.factors, weights[site].grad
        found[f"{site}.lora_A"] = SCALE * w[:, None] * (b.T @ d)
        found[f"{site}.lora_w"] = SCALE * (b.T @ d @ a.T).diagonal()
        found[f"{site}.lora_B"] = SCALE * (d @ a.T) * w
    return found


def same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        told = f"{name}: {{}}".format
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * 1e-2, msg=told)


def test_it_is_accepted_before_weights_load(folder):
    assert loading.check(folder) == []


def test_loss_and_gradients_are_those_of_transformers(folder):
    """Fused and eager, against the whole model's logits and autograd to its merged weights, in float64."""
    own = batch(examples(), packed=False)
    fused, eager = adapted(folder, True), adapted(folder, False)
    found = gradients(fused, own)
    same(found, gradients(eager, own), 1e-9)
    same(found, by_transformers(folder, sites(fused), own), 1e-6)
    assert len(sites(fused)) >= 7


def test_packed_rows_are_padded_ones(folder):
    """With and without gradient checkpointing. Norms, and a capped softmax, are float32 in float64 too."""
    padded, packed = adapted(folder, True), adapted(folder, True)
    packed_attention.use(packed)
    own = examples()
    expected = gradients(padded, batch(own, False))
    same(gradients(packed, batch(own, True)), expected, 1e-5)
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    same(gradients(packed, batch(own, True)), expected, 1e-5)


def test_two_steps_are_the_same_fused_and_eager(folder):
    stepped = []
    for fused in (True, False):
        model, own = adapted(folder, fused), batch(examples(), packed=False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        before = [p.detach().clone() for p in trained]
        for _ in range(2):
            gradients(model, own)
            optimizer.step()
        assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
        stepped.append(dict(zip(map(str, range(len(trained))), (p.detach() for p in trained), strict=True)))
    same(*stepped, 1e-6)


def alone(model, prompt):
    """transformers' own greedy answer."""
    ids = torch.tensor([prompt])
    given = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **given)
    return made[0, len(prompt) :].tolist()


def prompts():
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(4, 250, (n,), generator=draw).tolist() for n in (3, 9, 15, 17, 30)]


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_from_a_run_to_exports_that_transformers_reads(folder, toy_stream, tmp_path):
    """What was evaluated is what the merged folder holds, in the base's names; and so is the adapter on the
    base, read by PEFT."""
    from peft import PeftModel

    asked = recipe(folder, toy_stream, tmp_path / "run", {"name": "codyra", "importance_lr": 0.02})
    ran = run(asked)
    setup = prepare(ran.recipe)
    archive, last = ran.archive(), len(TASKS) - 1
    write_merged(setup, archive, last, None, tmp_path / "merged")
    write_peft(setup, archive, last, None, tmp_path / "peft")
    evaluated = setup.model(archive, last).eval()
    ids = torch.randint(4, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(base, ids) - logits(merged, ids)).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged, ids), logits(evaluated, ids), rtol=0, atol=1e-6)
    adapter = PeftModel.from_pretrained(base, tmp_path / "peft")
    torch.testing.assert_close(logits(adapter, ids), logits(evaluated, ids), rtol=1e-3, atol=1e-4)
    theirs = [alone(merged, prompt) for prompt in prompts()]
    assert generate_ids(evaluated, prompts(), NEW, []) == theirs
    assert loading.check(tmp_path / "merged") == []
    names = {n: of for file in weight_files(folder) for n, of in stored(file).items()}
    assert names == {n: of for file in weight_files(tmp_path / "merged") for n, of in stored(file).items()}
    assert (folder / "config.json").read_bytes() == (tmp_path / "merged" / "config.json").read_bytes()


def tensors(folder):
    found = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


@pytest.mark.parametrize("name", WHOLE)
def test_other_towers_are_exported_as_they_were(name, made, toy_stream, tmp_path):
    """The text model is trained alone; the export has the eyes of the base to the last bit, and sees."""
    folder = made(name)
    ran = run(recipe(folder, toy_stream, tmp_path / "run", {"name": "seqlora"}))
    setup = prepare(ran.recipe)
    model = setup.model(ran.archive(), 2)
    assert not any("vision" in key for key in model.state_dict())
    write_merged(setup, ran.archive(), 2, None, tmp_path / "merged")
    before, after = tensors(folder), tensors(tmp_path / "merged")
    assert list(before) == list(after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all("language_model" in key and "_proj" in key for key in changed)
    assert any("vision" in key for key in before)
    seeing = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    ids = torch.randint(4, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(seeing, ids), logits(model, ids), rtol=0, atol=1e-6)


def test_gemma3_answers_about_images_go_on_with_the_trained_text_model(made, toy_stream, tmp_path):
    """The image's features are those of the base, and reach the trained text model."""
    folder = made("gemma3")
    ran = run(recipe(folder, toy_stream, tmp_path / "run", {"name": "seqlora"}))
    write_merged(prepare(ran.recipe), ran.archive(), 2, None, tmp_path / "merged")
    base, merged = (AutoModelForImageTextToText.from_pretrained(f) for f in (folder, tmp_path / "merged"))
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = [m.get_image_features(pixels).pooler_output for m in (base, merged)]
        assert torch.equal(*features)
        ids = torch.tensor([[1, 20, 261, 260, 262, 30, 31]])
        kinds = (ids == 260).long()
        told = [m(input_ids=ids, pixel_values=pixels, token_type_ids=kinds).logits for m in (base, merged)]
    assert not torch.equal(*told)


def test_other_towers_are_no_word_worth(made):
    """transformers tells of weights that are left over, here those that are meant to be."""
    folder, told = made("gemma3"), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        loading.load(folder, torch.float32)
        assert told == []
        given = {"config": families.text_config(folder), "key_mapping": families.family_in(folder).renamed()}
        AutoModelForCausalLM.from_pretrained(folder, **given)
        assert any("LOAD REPORT" in text for text in told)
    finally:
        logging.getLogger("transformers").removeHandler(handler)


def test_published_names_of_gemma3_are_read_alike(made, tmp_path):
    """Checkpoints are stored in two layouts: `language_model.model.` and `model.language_model.`."""
    folder = made("gemma3")
    other = shutil.copytree(folder, tmp_path / "other")
    renamed = {}
    for key, value in tensors(folder).items():
        text = key.startswith("language_model.model.")
        own = key.replace("language_model.model.", "model.language_model.") if text else f"model.{key}"
        renamed[own] = value
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    assert loading.check(other) == []
    one, two = (loading.load(f, torch.float32).state_dict() for f in (folder, other))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    readers = [WeightReader(f) for f in (folder, other)]
    for key in one:
        assert all(torch.equal(reader.get(key), one[key]) for reader in readers)


def test_a_skeleton_of_the_first_layers_is_the_models_own(folder, toy_stream, tmp_path):
    """What `plan` measures: shapes of the first layers as the whole model has them."""
    setup = prepare(recipe(folder, toy_stream, tmp_path / "run", {"name": "seqlora"}))
    whole, cut = skeleton(setup), skeleton(setup, 2)
    assert len(families.blocks(cut)) == 2
    shapes = {name: p.shape for name, p in families.blocks(cut).named_parameters()}
    own = {name: p.shape for name, p in families.blocks(whole).named_parameters()}
    assert all(own[name] == shape for name, shape in shapes.items())


def test_the_plan_foresees_it(folder, toy_stream, tmp_path):
    """Memory of a forward and backward on fake tensors, and a step's time, for the family's own layers."""
    said = StringIO()
    plan(recipe(folder, toy_stream, tmp_path / "run", {"name": "codyra"}), Console(file=said, width=200))
    assert "forward and backward of" in said.getvalue() and "time to train" in said.getvalue()


def test_a_prefix_that_all_prompts_share_is_read_once(folder, monkeypatch):
    """Where windows leave room for prompt and answer."""
    model = loading.load(folder, torch.float32).eval()
    if families.windows(model.config):
        model = wide(folder)
    first = prompts()[-1][:20]
    batched = [[*first, *prompt[:4]] for prompt in prompts()]
    shared = generate.shared_prefix(batched, NEW, families.windows(model.config))
    assert shared >= 20
    assert generate_ids(model, batched, NEW, []) == [alone(model, prompt) for prompt in batched]


def wide(folder):
    """The same model with windows that hold all of a test's tokens."""
    model = loading.load(folder, torch.float32)
    config = deepcopy(model.config)
    config.sliding_window = 256
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_attention_shapes_are_those_of_the_modules(folder):
    """Heads and sizes from the config, against the weights of queries and keys."""
    model = loading.load(folder, torch.float32)
    shapes = families.attention_shapes(model.config)
    for shape, attention in zip(shapes, families.attentions(model), strict=True):
        assert attention.q_proj.out_features == shape.heads * shape.head_dim
        assert hasattr(attention, "k_proj") == shape.own_keys
        if shape.own_keys:
            assert attention.k_proj.out_features == shape.kv_heads * shape.head_dim
        if hasattr(attention, "sliding_window"):  # Mistral's has none, and asks the config
            assert attention.sliding_window == shape.window


PUTS_EMBEDDINGS = [{"name": "l2p", "pool": 4, "length": 2, "chosen": 1}, {"name": "pp", "length": 2}]
PREFIXES = {"name": "dualprompt", "general_layers": [0], "expert_layers": [1]}


@pytest.mark.parametrize("section", [*PUTS_EMBEDDINGS, PREFIXES], ids=lambda section: section["name"])
def test_prompt_methods_are_refused_where_layers_read_tokens_or_differ(made, toy_stream, tmp_path, section):
    """Gemma 4's small models add embeddings of tokens in every layer, and layers share their keys."""
    base = {"data": {"root": str(toy_stream), "tasks": TASKS}, "method": section, "output": str(tmp_path)}
    small, large = (made(f"gemma4_text, {size}") for size in ("small", "large"))
    with pytest.raises(Fault, match=f"method.name: {section['name']} .* choose another method"):
        prepare(parse_recipe(base | {"model": {"path": str(small)}}))
    if section in PUTS_EMBEDDINGS:
        prepare(parse_recipe(base | {"model": {"path": str(large)}}))


def test_an_adapter_of_the_text_model_does_not_fit_the_whole(made, toy_stream, tmp_path):
    """Its sites have other names, and none of them would be found."""
    asked = recipe(made("gemma3_text"), toy_stream, tmp_path / "run", {"name": "seqlora"})
    ran = run(asked)
    write_peft(prepare(ran.recipe), ran.archive(), 2, None, tmp_path / "peft")
    with pytest.raises(Fault, match="adapts 'model.layers.0.* which the base .* lacks"):
        base_of(tmp_path / "peft", Base(str(made("gemma3"))))


def test_projections_that_a_family_lacks_are_refused(made, own_family, toy_stream, tmp_path):
    few = replace(OLMO2, projections=("q_proj", "v_proj"))
    known._registered["olmo2"] = few
    asked = recipe(made("olmo2"), toy_stream, tmp_path / "run", {"name": "seqlora", "targets": ["up_proj"]})
    with pytest.raises(Fault, match="up_proj are not projections of OLMo 2; choose from q_proj, v_proj"):
        prepare(asked)

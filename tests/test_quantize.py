"""Packed bases: what a packed weight stands for, training on it against the same weights unpacked, and whole
runs.
"""

import json
import weakref

import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy.stats import norm
from test_distributed import PROGRAM, SHIPPED, accelerate, assert_same_run, rows, sections, torchrun
from test_shared import CONFIGS, IDS, distances, loss_and_gradients, saved_bytes
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from codyra_llm.config.methods.base import PROJECTIONS
from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import load_recipe, parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment import plan, run
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.models.quantize import KINDS, Int8Weight, Nf4Weight, PackedWeight, QuantizedLinear, quantize
from codyra_llm.runtime import launch

# Whole blocks of 64 in a row; blocks across rows, of lengths that models have; a last block cut short.
SHAPES = [(96, 128), (6, 32), (6, 96), (4, 288), (4, 1120), (5, 22)]


def nf4_values() -> torch.Tensor:
    """The 16 values of NF4 from their definition (QLoRA, appendix E): 8 quantiles above zero, 7 below, and
    zero.
    """
    edge = 0.9677083
    above = norm.ppf(torch.linspace(edge, 0.5, 9)[:-1].numpy())
    below = -norm.ppf(torch.linspace(edge, 0.5, 8)[:-1].numpy())
    values = torch.tensor([*above, 0.0, *below]).sort().values
    return values / values.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_of_16_values_times_the_absmax_of_its_block(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = Nf4Weight(weight).dequantize(dtype)
    assert found.shape == weight.shape and found.dtype == dtype
    for block, got in zip(weight.flatten().split(64), found.flatten().split(64), strict=True):
        absmax = block.float().abs().max()
        nearest = (block.float()[:, None] / absmax - nf4_values()).abs().argmin(1)
        expected = nf4_values()[nearest] * absmax  # the absmax itself comes back from 8 bits
        assert (got.float() - expected).abs().max() < 0.015 * absmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_nearest_of_255_multiples_of_its_rows_absmax(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] = 0
    step = weight.double().abs().amax(1, keepdim=True) / 127
    found = Int8Weight(weight).dequantize(dtype)
    assert found.shape == weight.shape and found.dtype == dtype
    multiple = found.double() / step.clamp(min=1e-9)
    rounding = 128 * torch.finfo(dtype).eps
    assert (multiple - multiple.round()).abs().max() < rounding and multiple.abs().max() < 127 + rounding
    assert ((found.double() - weight.double()).abs() <= (0.5 + rounding) * step).all()


def made(config, kind, dtype=torch.float32, targets=PROJECTIONS, checkpointing=False, fused=True):
    """A quantised model with adapters, and the same one with plain weights that hold what the packed ones
    stand for.
    """
    pair = []
    for packed in (True, False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False).train()
        with torch.no_grad():
            for name, p in model.named_parameters():  # fresh biases are zero
                if name.endswith("bias"):
                    p.normal_(std=0.1)
        quantize(model, kind)
        if not packed:
            for name, module in list(model.named_modules()):
                if isinstance(module, QuantizedLinear):
                    plain = nn.Linear(module.in_features, module.out_features, dtype=dtype)
                    plain.weight, plain.bias = (
                        nn.Parameter(module.weight.dequantize(dtype), False),
                        module.bias,
                    )
                    parent, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(parent), leaf, plain)
        torch.manual_seed(1)
        attach(model, list(targets), AdapterSpec(4, 1.3, 0.0, "normal"))
        for name, layer in sites(model).items():
            layer.reset(0, name)
            nn.init.normal_(layer.lora_B, std=0.1)
        share_inputs(model, fused)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        pair.append(model)
    return pair


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": torch.bfloat16},
        {"targets": ["q_proj", "v_proj"]},
        {"targets": ["v_proj", "down_proj"], "checkpointing": True},
        {"fused": False},
    ],
)
@pytest.mark.parametrize("family", ["llama with biases", "gemma3"])
def test_training_on_packed_weights_equals_training_on_what_they_stand_for(family, settings, kind):
    packed, plain = made(CONFIGS[family], kind, **settings)
    assert sum(isinstance(m, PackedWeight) for m in packed.modules()) == 2 * len(PROJECTIONS)
    assert not any(isinstance(m, PackedWeight) for m in plain.modules())
    trained = {name.rpartition(".")[2] for name, p in packed.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_w"}
    found, expected = loss_and_gradients(packed), loss_and_gradients(plain)
    assert len(found) > 6 and max(distances(found, expected)) < 1e-6


def test_quantising_changes_the_loss_by_little():
    """Less with 8 bits than with 4, and not by nothing: the models above don't compute with the original
    weights.
    """
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(CONFIGS["llama"]).requires_grad_(False)
    whole = exact(IDS).logits
    error = {}
    for kind in KINDS:
        model, _ = made(CONFIGS["llama"], kind, targets=["q_proj"])
        for layer in sites(model).values():
            nn.init.zeros_(layer.lora_B)
        error[kind] = ((model(IDS).logits - whole).norm() / whole.norm()).item()
    assert 1e-4 < error["int8"] < 0.02 < error["nf4"] < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantised_weight_is_left_for_backward(kind):
    """What adapted layers leave is what they leave on plain weights; layers without an adapter leave nothing
    at all.
    """
    adapted = made(CONFIGS["llama"], kind)[0].model.layers[0]
    x = torch.randn(1, 6, 32, requires_grad=True)
    factors = list(adapted.parameters())
    q, k, v = adapted.self_attn.q_proj, adapted.self_attn.k_proj, adapted.self_attn.v_proj
    assert saved_bytes(lambda: [q(x), k(x), v(x)], *factors) == 6 * (32 + 12) * 4
    assert saved_bytes(lambda: adapted.mlp(x), *factors) == 6 * (32 + 2 * 48 + 3 * 4) * 4
    packed, plain = (
        m.model.layers[0].self_attn.o_proj for m in made(CONFIGS["llama"], kind, targets=["q_proj"])
    )
    assert saved_bytes(lambda: packed(x)) == 0 and saved_bytes(lambda: plain(x)) == 32 * 32 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_on_the_cpu_read_on_the_gpu(kind):
    packed, plain = (model.cuda() for model in made(CONFIGS["llama"], kind, targets=["q_proj", "v_proj"]))
    assert {p.device.type for p in packed.parameters()} == {"cuda"}
    x = IDS.cuda()
    found, expected = packed(x).logits, plain(x).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    parameters = [[p for p in model.parameters() if p.requires_grad] for model in (packed, plain)]
    for a, b in zip(
        *(
            torch.autograd.grad(y.square().mean(), ps)
            for y, ps in zip((found, expected), parameters, strict=True)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_what_stays(kind):
    """4.127 or 8 bits per weight beside a table of 256 (nf4) or a float per row (int8); the rest of the model
    is as it was, and the weights that were packed are gone."""
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=9)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    before = dict(model.named_parameters())
    old = [weakref.ref(p) for name, p in before.items() if "_proj" in name]
    rest = {name: p for name, p in before.items() if "_proj" not in name}
    count = sum(r().numel() for r in old)
    del before
    quantize(model, kind)
    assert len(old) == 14 and all(r() is None for r in old)
    assert all(model.get_parameter(name) is p for name, p in rest.items())
    layers = [m for m in model.modules() if isinstance(m, PackedWeight)]
    held = sum(p.nbytes for m in layers for p in m.parameters())
    beside = sum(m.shape[0] * 4 for m in layers) if kind == "int8" else 14 * (256 * 4 + 4)
    assert held == pytest.approx(count * KINDS[kind].bits / 8 + beside, rel=1e-4)
    assert {m.dtype for m in layers} == {torch.bfloat16} and not any(list(m.buffers()) for m in layers)


def recipe(model, stream, out, **changes):
    raw = {
        "model": {"path": str(model), "quantization": "nf4"},
        "output": str(out),
        "eval": {"max_new_tokens": 4},
        "data": {"root": str(stream), "tasks": ["ONE", "TWO"], "epochs": 2},
        "optim": {"lr": 1e-2, "batch_size": 8},
        "method": {"name": "codyra", "rank": 4, "importance_lr": 0.02},
    }
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return parse_recipe(override(raw, overrides))


def updates(folder):
    return {
        f"{f.name} {key}": t for f in (folder.path / "updates").iterdir() for key, t in load_file(f).items()
    }


def test_updates_go_to_the_original_weights_and_each_task_quantises_anew(
    tiny_llama, toy_stream, tmp_path, monkeypatch
):
    packed = []

    def spy(model, kind):
        packed.append(({k: v.clone() for k, v in model.state_dict().items()}, kind))
        quantize(model, kind)

    with monkeypatch.context() as patch:
        patch.setattr("codyra_llm.models.quantize.quantize", spy)
        folder = run.run(recipe(tiny_llama, toy_stream, tmp_path / "run"))
    assert [kind for _, kind in packed] == ["nf4", "nf4"] and "bitsandbytes" in folder.manifest
    plain = prepare(recipe(tiny_llama, toy_stream, tmp_path / "other", model__quantization=None))
    archive, stored = (
        folder.archive(),
        AutoModelForCausalLM.from_pretrained(folder.path / "checkpoint").state_dict(),
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    for after, state in ((-1, packed[0][0]), (0, packed[1][0]), (1, stored)):
        assert all(torch.equal(state[k], v) for k, v in plain.model(archive, after).state_dict().items())
        for site in archive.load(0).adapters:
            terms = [archive.load(k).adapters[site].delta(1.0).double() for k in range(after + 1)]
            weight = f"{site}.weight"
            torch.testing.assert_close(
                state[weight].double(), base[weight].double() + sum(terms), rtol=1e-6, atol=1e-7
            )
    assert not torch.equal(packed[0][0][weight], packed[1][0][weight])

    again = recipe(tiny_llama, toy_stream, tmp_path / "restarted")
    learn = run.learn

    def dies(setup, folder, acc, peak, index):
        if index == 1:
            raise KeyboardInterrupt
        learn(setup, folder, acc, peak, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "learn", dies)
        run.run(again)
    restarted = updates(run.run(again))
    assert (
        all(torch.equal(restarted[key], t) for key, t in updates(folder).items())
        and len(restarted) == 2 * 14 * 3
    )
    unpacked = run.run(
        recipe(tiny_llama, toy_stream, tmp_path / "plain", model__quantization=None, checkpoint=False)
    )
    losses = [[row["loss"] for row in rows(f.path / "log.jsonl")] for f in (folder, unpacked)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2) and losses[0] != pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(Fault, match="model.quantization was 'nf4', now 'int8'"):
        run.run(recipe(tiny_llama, toy_stream, folder.path, model__quantization="int8"))


def test_the_plan_counts_packed_weights(tiny_llama, toy_stream, tmp_path):
    for kind in KINDS:
        setup = prepare(recipe(tiny_llama, toy_stream, tmp_path / "run", model__quantization=kind))
        skeleton = plan.skeleton(setup)
        total = sum(p.numel() for p in skeleton.parameters() if not p.requires_grad)
        estimate = plan._weight_bytes(setup, skeleton, total)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        quantize(model, kind)
        tables = 14 * 1028 if kind == "nf4" else 0
        assert estimate == pytest.approx(sum(p.nbytes for p in model.parameters()) - tables, rel=0.05)


def test_what_can_not_be_is_refused_before_weights_load(tiny_llama, toy_stream, tmp_path, monkeypatch):
    monkeypatch.setattr("codyra_llm.models.loading.load", lambda *a, **k: pytest.fail("weights were loaded"))
    with monkeypatch.context() as patch, pytest.raises(Fault, match="ZeRO stage 2, this launch has stage 3"):
        patch.setattr(launch, "zero_stage", lambda acc: 3)
        run.run(recipe(tiny_llama, toy_stream, tmp_path / "run"))
    monkeypatch.setattr("codyra_llm.experiment.setup.find_spec", lambda name: None)
    with pytest.raises(Fault, match=r"'nf4' needs bitsandbytes.*codyra-llm\[bitsandbytes\]"):
        run.run(recipe(tiny_llama, toy_stream, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    prepare(recipe(tiny_llama, toy_stream, tmp_path / "run", model__quantization=None))


@pytest.fixture(scope="module")
def quantised_recipe(tiny_llama, toy_stream, tmp_path_factory):
    """A recipe file that is a program as well, and the run of one process."""
    folder = tmp_path_factory.mktemp("quantised")
    raw = sections(tiny_llama, toy_stream, "codyra")
    raw["model"]["quantization"], raw["method"]["targets"] = "nf4", ["q_proj", "v_proj", "down_proj"]
    (folder / "nf4.yaml").write_text(PROGRAM.format(yaml.safe_dump(raw)), encoding="utf-8")
    return folder / "nf4.yaml", run.run(load_recipe(folder / "nf4.yaml", [f"output={folder / 'one'}"])).path


@pytest.mark.distributed
def test_ddp(quantised_recipe, tmp_path):
    file, one = quantised_recipe
    done = torchrun(file, f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert_same_run(one, tmp_path / "run", 0)


@pytest.mark.distributed
def test_zero_2(quantised_recipe, tmp_path):
    file, one = quantised_recipe
    done = accelerate(SHIPPED / "accelerate" / "zero2.yaml", file, f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert_same_run(one, tmp_path / "run", 2)

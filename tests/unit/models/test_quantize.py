"""Packed bases: what a packed weight stands for, training on it against the same weights unpacked, and whole
runs.
"""

import weakref

import pytest
import torch
from fused import CONFIGS, IDS, distances, loss_and_gradients, quantised_pair, saved_bytes
from scipy.stats import norm
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from codyra_llm.config.methods.base import PROJECTIONS
from codyra_llm.lora.layer import sites
from codyra_llm.models.quantize import KINDS, Int8Weight, Nf4Weight, PackedWeight, quantize

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
    packed, plain = quantised_pair(CONFIGS[family], kind, **settings)
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
        model, _ = quantised_pair(CONFIGS["llama"], kind, targets=["q_proj"])
        for layer in sites(model).values():
            nn.init.zeros_(layer.lora_B)
        error[kind] = ((model(IDS).logits - whole).norm() / whole.norm()).item()
    assert 1e-4 < error["int8"] < 0.02 < error["nf4"] < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantised_weight_is_left_for_backward(kind):
    """What adapted layers leave is what they leave on plain weights; layers without an adapter leave nothing
    at all.
    """
    adapted = quantised_pair(CONFIGS["llama"], kind)[0].model.layers[0]
    x = torch.randn(1, 6, 32, requires_grad=True)
    factors = list(adapted.parameters())
    q, k, v = adapted.self_attn.q_proj, adapted.self_attn.k_proj, adapted.self_attn.v_proj
    assert saved_bytes(lambda: [q(x), k(x), v(x)], *factors) == 6 * (32 + 12) * 4
    assert saved_bytes(lambda: adapted.mlp(x), *factors) == 6 * (32 + 2 * 48 + 3 * 4) * 4
    packed, plain = (
        m.model.layers[0].self_attn.o_proj for m in quantised_pair(CONFIGS["llama"], kind, targets=["q_proj"])
    )
    assert saved_bytes(lambda: packed(x)) == 0 and saved_bytes(lambda: plain(x)) == 32 * 32 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_what_stays(kind):
    """4.127 or 8 bits per weight plus a table of 256 (nf4) or a float per row (int8); the rest of the model
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

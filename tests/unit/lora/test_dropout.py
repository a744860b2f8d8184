"""Passes without dropout: neither the adapters' nor the base's own, which some models have in attention."""

import copy

import pytest
import torch
from tiny import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from codyra_llm.lora.layer import AdapterSpec, attach, sites, snapshot, stand_in, without_dropout
from codyra_llm.lora.shared import share_inputs
from codyra_llm.models.loading import checkpoint_layers

IDS = torch.randint(4, 300, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    """In training, with dropout in attention and in the adapters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, attention_dropout=0.5, **SIZES)).double()
    attach(model.requires_grad_(False), ["q_proj", "v_proj"], AdapterSpec(3, 1.0, dropout=0.5))
    share_inputs(model)
    draw = torch.Generator().manual_seed(1)
    for layer in sites(model).values():
        layer.lora_A.data.normal_(generator=draw)
        layer.lora_B.data.normal_(generator=draw)
    return model.train()


def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_dropped_within(model, checkpointing):
    """And afterwards all is as before, dropout and checkpoints."""
    expected = logits(copy.deepcopy(model).eval())
    if checkpointing:
        checkpoint_layers(model)
    with without_dropout(model):
        assert torch.equal(logits(model), expected)
    assert all(module.training for module in model.modules())
    assert not torch.allclose(logits(model), expected)


def test_a_stand_in_drops_nothing(model):
    """A teacher's answers don't depend on what is drawn."""
    factors = snapshot(model)
    expected = logits(copy.deepcopy(model).eval())
    with torch.no_grad(), stand_in(model, factors):
        assert torch.equal(logits(model), expected)


def test_checkpoints_stay_on(model):
    """Within the block too: of a layer that was checkpointed nothing but its input is kept."""
    checkpoint_layers(model)
    saved = []
    pack = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x)
    with pack, without_dropout(model):
        logits(model)
    kept = len(saved)
    saved.clear()
    model.gradient_checkpointing_disable()
    with pack, without_dropout(model):
        logits(model)
    assert kept < len(saved) / 2

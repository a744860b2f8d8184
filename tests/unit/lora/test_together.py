"""Shadows and gradients of all sites made together: equal to those that every site makes for itself, in a
number of operations that does not grow with the sites."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from codyra_llm.config.methods.base import PROJECTIONS
from codyra_llm.lora.layer import AdapterSpec, attach, sites, snapshot, stand_in
from codyra_llm.lora.shared import share_inputs, shared_inputs
from codyra_llm.lora.together import deferred, finish_gradients, make_shadows

IDS = torch.arange(3, 27).view(2, 12)


def adapted(importance="normal", layers=2, dtype=torch.float64, fused=True, dropout=0.0):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False).train()
    attach(model, list(PROJECTIONS), AdapterSpec(4, 1.3, dropout, importance))
    for name, layer in sites(model).items():
        layer.reset(0, name)
        nn.init.normal_(layer.lora_B, std=0.1)
    share_inputs(model, fused)
    return model


class Operations(TorchDispatchMode):
    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = ("view", "split", "unbind", "detach", "select", "unsqueeze", "alias", "t", "slice")
        self.count += not func.overloadpacket.__name__.startswith(views)
        return func(*args, **(kwargs or {}))


def gradients(model) -> dict:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def backwards(model, defers: bool, passes: int = 2) -> dict:
    """Gradients of as many micro-batches, and of a term of the parameters alone."""
    model.zero_grad()
    shared = shared_inputs(model)
    make_shadows(shared)
    with deferred(shared, defers):
        for i in range(passes):
            torch.manual_seed(i)
            loss = model(IDS + i).logits.square().mean()
            if not i:
                loss = loss + 1e-3 * sum(layer.lora_A.square().sum() for layer in sites(model).values())
            loss.backward()
    finish_gradients(shared)
    return gradients(model)


@pytest.mark.parametrize("importance", [None, "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shadows_made_together_are_those_made_alone_to_the_last_bit(importance, dtype):
    model = adapted(importance, dtype=dtype)
    shared = shared_inputs(model)
    alone = [group.group(dtype).shadow for group in shared]
    for group in shared:
        group.forget()
    make_shadows(shared)
    for group, theirs in zip(shared, alone, strict=True):
        mine = group.group(dtype).shadow
        assert torch.equal(mine.a, theirs.a) and torch.equal(mine.wa, theirs.wa)
        for ours, other in zip((*mine.b, *mine.wb), (*theirs.b, *theirs.wb), strict=True):
            assert torch.equal(ours, other)
    made = [group.group(dtype).shadow.a for group in shared]
    make_shadows(shared)
    with torch.no_grad():
        next(iter(sites(model).values())).lora_A.zero_()
    assert shared[0].group(dtype).shadow.a is not made[0]  # another version of a master makes another


@pytest.mark.parametrize("importance, dropout", [(None, 0.0), ("normal", 0.0), ("normal", 0.3)])
def test_deferred_gradients_are_those_of_autograd(importance, dropout):
    found = backwards(adapted(importance, dropout=dropout), True)
    expected = backwards(adapted(importance, dropout=dropout, fused=False), False)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-12)


def test_frozen_factors_get_no_gradient_and_nothing_is_left_over():
    model = adapted()
    for layer in sites(model).values():
        layer.lora_A.requires_grad_(False)
    shared = shared_inputs(model)
    with deferred(shared):
        model(IDS).logits.sum().backward()
        assert all(layer.lora_B.grad is None for layer in sites(model).values())
    finish_gradients(shared)
    assert all(layer.lora_A.grad is None for layer in sites(model).values())
    first = {name: grad.clone() for name, grad in gradients(model).items()}
    finish_gradients(shared)  # nothing is left, so nothing is added
    assert all(torch.equal(grad, first[name]) for name, grad in gradients(model).items())
    with deferred(shared):
        model(IDS).logits.sum().backward()
    for group in shared:
        group.forget()  # a step that did not come to its end
    finish_gradients(shared)
    assert all(torch.equal(grad, first[name]) for name, grad in gradients(model).items())


def test_what_stands_in_for_the_factors_gets_its_own_gradients():
    """They are not the parameters, so that nothing of them may be left to these."""
    model = adapted()
    factors, shared = snapshot(model), shared_inputs(model)
    columns = [b.requires_grad_() for _, _, b in factors.values()]
    with deferred(shared), stand_in(model, factors):
        model(IDS).logits.sum().backward()
    assert all(group.left is None for group in shared)
    assert all(b.grad is not None and b.grad.any() for b in columns)
    finish_gradients(shared)
    assert all(grad is None for grad in gradients(model).values())


def test_the_number_of_operations_does_not_grow_with_the_layers():
    counts = []
    for layers in (2, 4):
        model = adapted(layers=layers, dtype=torch.float32)
        shared = shared_inputs(model)
        with Operations() as shadows:
            make_shadows(shared)
        with deferred(shared):
            model(IDS).logits.sum().backward()
        with Operations() as finish:
            finish_gradients(shared)
        counts.append((shadows.count, finish.count))
    assert counts[0] == counts[1]
    assert counts[0][0] < 40 and counts[0][1] < 40

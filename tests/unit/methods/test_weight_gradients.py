"""Gradients by the frozen weights against autograd on the same model without adapters."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.data.batches import collate, micro_batches
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.weight_gradients import mean_gradients, weight_fisher
from codyra_llm.models.attention import packed_attention

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXAMPLES = [
    Encoded([1, 5, 9, 4], [7, 2], cut=False),
    Encoded([1, 8], [3, 6, 11, 2], cut=False),
    Encoded([1, 12, 10], [2], cut=False),
]


def task(model, packed: bool) -> Task:
    def batches(examples):
        for chosen in micro_batches([len(e) for e in examples], 1, 12, packed)[0]:
            yield collate(examples, chosen, [0.0] * len(chosen), 0, packed)

    return Task(0, None, None, None, batches, {})


def expected(path) -> list[dict[str, torch.Tensor]]:
    """The gradient of each example's mean cross entropy by every projection, from the plain model."""
    plain, found = AutoModelForCausalLM.from_pretrained(path), []
    weights = {
        n.removesuffix(".weight"): p for n, p in plain.named_parameters() if n.split(".")[-2] in TARGETS
    }
    for example in EXAMPLES:
        ids = torch.tensor([example.prompt + example.answer])
        logits = plain(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
        loss = functional.cross_entropy(logits, torch.tensor(example.answer))
        found.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_they_are_those_of_the_plain_model(tiny_llama, packed):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    if packed:
        packed_attention.use(model)
    attach(model, TARGETS, AdapterSpec(2))
    share_inputs(model)
    for layer in sites(model).values():
        layer.reset("start")
        layer.lora_A.requires_grad_(False)  # B alone is enough for autograd to come by
    model.train()
    of_each = expected(tiny_llama)
    mean = mean_gradients(model, sites(model), task(model, packed), EXAMPLES)
    fisher = weight_fisher(model, task(model, packed), EXAMPLES)
    assert model.training and mean.keys() == fisher.keys() == of_each[0].keys()
    for site in mean:
        single = torch.stack([gradients[site] for gradients in of_each])
        torch.testing.assert_close(mean[site].float(), single.mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(fisher[site], single.square().mean(0), rtol=1e-4, atol=1e-9)


def test_an_example_that_nothing_is_learnt_of_has_no_gradient(tiny_llama):
    """An answer of one token without a prompt or BOS: nothing predicts it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    attach(model, TARGETS, AdapterSpec(2))
    share_inputs(model)
    for layer in sites(model).values():
        layer.reset("start")
    mean = mean_gradients(model, sites(model), task(model, False), [Encoded([], [2], cut=False)])
    assert mean and not any(gradient.any() for gradient in mean.values())

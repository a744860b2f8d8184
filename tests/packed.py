"""Packed rows equal padded ones, to the gradient; examples of a pack do not see one another; no T x T mask is
built.
"""

import torch
from transformers import AutoModelForCausalLM

from codyra_llm.data.batches import collate, example_weights
from codyra_llm.data.encoding import Encoded

LENGTHS = [(37, 4), (1, 2), (20, 3), (8, 9), (13, 3)]  # three of five are longer than the window of 16


def examples(lengths=LENGTHS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        Encoded(*(torch.randint(4, 300, (n,), generator=draw).tolist() for n in pair), False)
        for pair in lengths
    ]


def loaded(folder, dtype=torch.float64, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).train()


def batch(own, packed):
    chosen = list(range(len(own)))
    return collate(own, chosen, example_weights(own, chosen, "sample"), 0, packed)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = batch.cross_entropy(model)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

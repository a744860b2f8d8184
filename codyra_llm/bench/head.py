"""Level `head`: the language model's head and cross entropy, from hidden states to their gradient."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from codyra_llm.bench.measure import Contestant, Options, compare, machine
from codyra_llm.core.errors import Fault
from codyra_llm.data.batches import Batch, collate, example_weights
from codyra_llm.data.encoding import Encoded
from codyra_llm.runtime.memory import saved_bytes

NOTES = {
    "full": "logits at all positions, in float32, as transformers computes its loss",
    "labelled": "logits at the labelled positions, all at once",
    "ours": "the loss that training uses",
}

ROWS = 8  # sequences that the N positions are cut into


class Decoder(nn.Module):
    """Gives the hidden states that it was made with, whatever it reads."""

    def __init__(self, states: Tensor):
        super().__init__()
        self.states = states

    def forward(self, **_) -> SimpleNamespace:
        """The states, as a decoder returns them."""
        return SimpleNamespace(last_hidden_state=self.states)


class Head(nn.Module):
    """A causal model whose decoder gives fixed hidden states [rows, T, h] that want a gradient."""

    def __init__(self, states: Tensor, vocabulary: int):
        super().__init__()
        self.states, self.config = states, SimpleNamespace(model_type="llama")
        self.model = Decoder(states)
        self.lm_head = nn.Linear(states.shape[-1], vocabulary, bias=False).requires_grad_(False)


def full(head: Head, batch: Batch, labels: Tensor) -> Tensor:
    """Logits at all positions, and transformers' own loss."""
    return ForCausalLMLoss(head.lm_head(head.states), labels, head.lm_head.out_features)


def labelled(head: Head, batch: Batch, labels: Tensor) -> Tensor:
    """Logits at labelled positions, all at once."""
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return functional.cross_entropy(
        head.lm_head(head.states[rows, columns]).float(), labels[rows, columns + 1]
    )


def ours(head: Head, batch: Batch, labels: Tensor) -> Tensor:
    """Logits at labelled positions, in chunks."""
    return batch.cross_entropy(head)


ARMS = {"full": full, "labelled": labelled, "ours": ours}


def measure(options: Options) -> dict:
    """Positions N in rows of equal length, of which `labelled` at the rows' ends have a label."""
    default = (8192, 4096, 128256, 1024) if options.device.type == "cuda" else (1024, 576, 49152, 128)
    positions, width, vocabulary, count = options.sizes("N,hidden,vocabulary,labelled", default)
    generator = torch.Generator().manual_seed(0)
    length, answer = positions // ROWS, count // ROWS
    if not 0 < answer < length:
        raise Fault(
            f"--shape: {count} labelled of {positions} positions do not fit; there are {ROWS} rows, so give "
            f"at least {ROWS} labelled, and {ROWS} positions more than that"
        )
    ids = torch.randint(vocabulary, (ROWS, length), generator=generator)
    encoded = [Encoded(row[:-answer], row[-answer:], False) for row in ids.tolist()]
    weights = example_weights(encoded, range(ROWS), "token")
    batch = collate(encoded, range(ROWS), weights, 0).to(options.device)
    labels = ids.clone()
    labels[:, :-answer] = -100
    states = torch.randn(ROWS, length, width, generator=generator)
    states = states.to(options.device, options.dtype).requires_grad_()
    head = Head(states, vocabulary).to(options.device, options.dtype)
    contestants = {
        name: _contestant(ARMS[name], head, batch, labels.to(options.device))
        for name in options.chosen(list(ARMS))
    }
    return {
        "level": "head",
        "shape": [f"N={ROWS * length}", f"h={width}", f"V={vocabulary}", f"labelled={ROWS * answer}"],
        "machine": machine(options),
        "arms": compare(contestants, options, options.rounds or 10),
        "notes": [f"{name}: {NOTES[name]}" for name in contestants],
    }


def _contestant(loss, head: Head, batch: Batch, labels: Tensor) -> Contestant:
    """An arm's loss and the gradient of the hidden states; expected are those of a copy in float64."""
    twin = Head(head.states.detach().double().requires_grad_(), head.lm_head.out_features).double()
    twin.lm_head.weight.data = head.lm_head.weight.double()

    def run(model: Head, arm=loss) -> Tensor:
        model.states.grad = None
        value = arm(model, batch, labels)
        value.backward()
        return value.detach()

    def outcome(model: Head, arm=loss) -> dict[str, Tensor]:
        return {"loss": run(model, arm), "dx": model.states.grad}

    return Contestant(
        lambda: outcome(head),
        outcome(twin, _in_float64),
        lambda _: run(head),
        lambda: saved_bytes(lambda: loss(head, batch, labels), [head.states, head.lm_head.weight]),
    )


def _in_float64(head: Head, batch: Batch, labels: Tensor) -> Tensor:
    """The mean over labelled positions, without any cast (transformers casts logits to float32)."""
    logits = head.lm_head(head.states[:, :-1]).flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)

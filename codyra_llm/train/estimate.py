"""Estimates of a training step without the model's weights: memory from a run on fake tensors; time from a
few layers that are timed, or, if that would take too long, from counted operations."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from codyra_llm.data.batches import Batch
from codyra_llm.lora.shared import shared_inputs
from codyra_llm.lora.together import deferred, finish_gradients, make_shadows
from codyra_llm.methods.base import Method, OutsideSteps
from codyra_llm.methods.parts.samples import self_sampled
from codyra_llm.models import families
from codyra_llm.runtime.memory import Meter
from codyra_llm.train.recorded import SEEN, Recorder, recorder_for

# Even numbers, since in some families layers alternate between two kinds of attention.
MEASURED_LAYERS = (2, 4)
SECONDS = 0.3  # how long products are timed
DECODED = 8  # steps of generation that are timed together
ENOUGH = 0.5  # seconds that the timed passes of a model take together, unless ROUNDS of them are shorter
ROUNDS = 3


class Depth(NamedTuple):
    """How many layers have adapters, how many have none though backward goes through them, and how many come
    before the first of these, where backward ends."""

    adapted: int
    passed: int
    ended: int


def depth(model: nn.Module) -> Depth:
    """The depth of a model's adapters, read from what requires gradients."""
    trains = [_trained(block) > 0 for block in families.blocks(model)]
    # Set where inputs require gradients: prompts train in front of the layers, and backward passes through
    # all.
    inputs_train = getattr(model, "_require_grads_hooks", None)
    ended = 0 if inputs_train or True not in trains else trains.index(True)
    return Depth(sum(trains), len(trains) - sum(trains) - ended, ended)


def activation_bytes(model: nn.Module, batch: Batch, device: torch.device, front: int = 0) -> int:
    """Peak bytes of forward and backward of one micro-batch, without the weights: activations, gradients,
    shadows of adapters. `front`: how many positions of prompts that train are before each row.

    `model` is a skeleton on the meta device as it trains (adapters, checkpointing, train mode) and is turned
    into fake tensors of `device`: every operation gives tensors of the right shape, dtype and lifetime, and
    none has memory. Of a deep model only 2 and 4 layers run, and the peak is extrapolated linearly, if every
    layer adds the same to it: if all have adapters, or none has.
    """
    layers = families.blocks(model)
    _fix_frequencies(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        batch = batch.to(device)
        try:
            if len(layers) <= MEASURED_LAYERS[1] or len(layers) not in depth(model):
                return _peak(model, batch, front)
            peaks = []
            for count in MEASURED_LAYERS:
                families.set_blocks(model, layers[:count])
                peaks.append(_peak(model, batch, front))
        finally:
            families.set_blocks(model, layers)
    few, more = MEASURED_LAYERS
    return peaks[1] + (len(layers) - more) * (peaks[1] - peaks[0]) // (more - few)


def _fix_frequencies(model: nn.Module) -> None:
    """Make every RoPE a plain one. Kinds whose frequencies follow the longest position ("dynamic",
    "longrope") read its value, which fake tensors don't have; shapes are the same either way."""
    module: Any
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = dict.fromkeys(kind, "default")


def _peak(model: nn.Module, batch: Batch, front: int) -> int:
    """Peak bytes of one forward and backward, as `Meter` counts them."""
    model.zero_grad()
    for shared in shared_inputs(model):
        shared.forget()
    with Meter() as meter:
        _loss(model, batch, front).backward()
    return meter.peak


def _loss(model: nn.Module, batch: Batch, front: int) -> torch.Tensor:
    """The loss of a micro-batch after `front` positions of prompts in float32, which require gradients."""
    if not front:
        return batch.cross_entropy(model)
    shape = len(batch.ids), front, families.pretrained(model).config.hidden_size
    return batch.cross_entropy(model, torch.zeros(shape, device=batch.ids.device, requires_grad=True))


def step_flops(model: nn.Module, tokens: int, squares: int, labelled: int) -> int:
    """Floating-point operations of matrix products, forward and backward, of micro-batches with `tokens` in
    all (padding included), `squares` the sum of their segments' squared lengths, and `labelled` tokens.

    Per token and frozen weight 2 forward and 2 for the input's gradient, per adapter's weight 6; attention in
    full squares, without what a causal kernel or a sliding window skips; the head at the labelled positions.
    Gradient checkpointing runs the layers' forward twice. Layers where backward has ended have a forward
    alone.
    """
    config = model.config
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    again = 2 if checkpointed else 0  # operations of the second forward, per weight and token
    ended, trained = depth(model).ended, _trained(model)
    weights = [_linear_weights(block) for block in families.blocks(model)]
    widths = [2 * squares * shape.heads * shape.head_dim for shape in families.attention_shapes(config)]
    forward = 2 * tokens * sum(weights) + 2 * sum(widths)  # of QKᵀ, and of the weights with V
    backward = 4 if config._attn_implementation == "eager" else 5  # fused kernels compute QKᵀ again
    returning = (2 + again) * tokens * sum(weights[ended:]) + (backward + again) * sum(widths[ended:])
    adapters = (6 + again) * tokens * trained
    return forward + returning + adapters + 4 * labelled * config.hidden_size * config.vocab_size


def outside_flops(model: nn.Module, outside: OutsideSteps) -> float:
    """Operations of matrix products in forward passes without the head, and of what is made of their inputs;
    generation is not among them."""
    config = families.pretrained(model).config
    widths = [shape.heads * shape.head_dim for shape in families.attention_shapes(config)]
    return 2 * outside.tokens * _layer_weights(model) + 4 * outside.squares * sum(widths) + outside.products


def decoding_flops(model: nn.Module, outside: OutsideSteps) -> float:
    """Operations of matrix products in generation, without those of attention, since texts are short."""
    config = families.pretrained(model).config
    head = config.hidden_size * config.vocab_size
    return 2 * outside.decoding * outside.rows * (_layer_weights(model) + head)


def _layer_weights(model: nn.Module) -> int:
    """How many weights a token meets in the layers, those that train among them."""
    return _trained(model) + sum(_linear_weights(block) for block in families.blocks(model))


def _trained(module: nn.Module) -> int:
    """How many weights the trained matrices have."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad and p.ndim == 2)


def _linear_weights(block: nn.Module) -> int:
    """How many weights a block's linear layers have."""
    return sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))


@dataclass
class Timed:
    """A micro-batch: the operations of its matrix products, and the seconds that it takes."""

    operations: float
    seconds: float


def total_seconds(big: Timed, typical: Timed, count: int, operations: float) -> float:
    """Seconds of `count` micro-batches with `operations` in total: a fixed time per micro-batch, and a time
    per operation, both fitted to two that were timed."""
    difference = big.operations - typical.operations
    per_operation = (big.seconds - typical.seconds) / difference if difference > 0 else 0.0
    fixed = big.seconds - per_operation * big.operations
    if per_operation <= 0 or fixed < 0:
        # Both have one size, or the timing is noise: scale with the operations.
        return operations * big.seconds / big.operations
    return count * fixed + operations * per_operation


Make = Callable[[int, range | None], nn.Module]  # from the number of layers and the adapted ones, to a model


def step_seconds(
    make: Make, batch: Batch, layers: Depth, front: int = 0, method: Method | None = None
) -> float:
    """Seconds of forward and backward of one micro-batch in a model of these `layers`, measured on models of
    fewer. `make(count, adapted)` gives one with `count` layers and random weights, on its device, with
    adapters in the `adapted` layers (None: those that the recipe asks for). `front` as in
    `activation_bytes`. `method`: trains these models; where its micro-batches are recorded, replays are
    timed."""

    def measured(count: int, adapted: range | None) -> float:
        return _seconds(make(count, adapted), batch, front, method)

    if sum(layers) <= MEASURED_LAYERS[1]:
        return measured(sum(layers), None)
    few, more = MEASURED_LAYERS
    start, whole = (measured(count, range(count)) for count in MEASURED_LAYERS)

    def each(seconds: float) -> float:
        """Seconds of one layer, from those of a model with `more` layers: the first `few` of them have
        adapters and take `start`."""
        return max(0.0, seconds - start) / (more - few)

    if not layers.adapted:  # prompts train in front of the layers, which all cost the same
        return start + (sum(layers) - few) * each(whole)
    total = start + (layers.adapted - few) * each(whole)
    if layers.passed:
        total += layers.passed * each(measured(more, range(few)))
    if layers.ended:
        total += layers.ended * each(measured(more, range(more - few, more)))
    return total


def _seconds(model: nn.Module, batch: Batch, front: int = 0, method: Method | None = None) -> float:
    """Seconds of one forward and backward: the median of at most ROUNDS, after one that allocates, or, where
    they are recorded, after the recording. A single long pass is enough; with a large model on a CPU each
    takes seconds."""
    recorder = recorder_for(model, method) if method and not front else None
    first = SEEN + 1 if recorder else 1
    times: list[float] = []
    while len(times) < first + ROUNDS and sum(times[first:]) < ENOUGH:
        began = time.perf_counter()
        one_pass(model, batch, front, recorder)
        times.append(time.perf_counter() - began)
    return median(times[first:])


def one_pass(model: nn.Module, batch: Batch, front: int = 0, recorder: Recorder | None = None) -> None:
    """Forward and backward of one micro-batch as in training, until the device is done. The gradients of an
    earlier pass are dropped. `batch` is on the host."""
    device, shared = next(model.parameters()).device, shared_inputs(model)
    model.zero_grad()
    for group in shared:
        group.forget()
    if recorder:
        recorder.begin_step()
    with deferred(shared, device.type == "cuda"):
        loss = recorder.run(batch) if recorder else None
        if loss is None:
            make_shadows(shared)
            loss = _loss(model, batch.to(device), front)
            loss.backward()
    finish_gradients(shared)
    loss.item()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decoding_seconds(make: Make, layers: int, rows: int) -> float:
    """Seconds of one step of generation of so many rows in a model of `layers`, measured on models of fewer;
    `make` as in `step_seconds`."""

    def measured(count: int) -> float:
        model = make(count, None)
        self_sampled(model, rows, 1, 0)  # allocates
        began = time.perf_counter()
        self_sampled(model, rows, DECODED, 0)
        return (time.perf_counter() - began) / DECODED

    if layers <= MEASURED_LAYERS[1]:
        return measured(layers)
    start, more = map(measured, MEASURED_LAYERS)
    each = max(0.0, more - start) / (MEASURED_LAYERS[1] - MEASURED_LAYERS[0])
    return start + (layers - MEASURED_LAYERS[0]) * each


def host_speed() -> float:
    """Floating-point operations per second that the CPU reaches in products in float64."""
    x = torch.ones(512, 512, dtype=torch.float64)
    times: list[float] = []
    while len(times) < 3:
        began = time.perf_counter()
        torch.mm(x, x)
        times.append(time.perf_counter() - began)
    return 2 * len(x) ** 3 / min(times)


def matmul_speed(model: nn.Module, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second that the device reaches in the model's own shapes: the products of
    the MLP, up and down again, for SECONDS."""
    config = model.config
    tokens = min(tokens, 1024 if device.type == "cpu" else tokens)
    x = torch.randn(tokens, config.hidden_size, device=device).to(dtype)
    up = torch.randn(config.intermediate_size, config.hidden_size, device=device).to(dtype)
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 3:
        began = time.perf_counter()
        (x @ up.T @ up)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - began)
    return 4 * tokens * up.numel() / median(times)

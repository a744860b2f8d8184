"""Adapted layers that read the same input computed together, and the gated MLP as one function."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional

from codyra_llm.lora.function import GatedMlp, Group, Shadow, SharedLinears, shadow
from codyra_llm.models import families

GatedNames = tuple[str, str, str, str]  # of gate, up, down and the activation


class SharedSpec(Protocol):
    """What the layers of a group have in common; `AdapterSpec` is such a spec."""

    @property
    def scale(self) -> float:
        """s of ΔW = s·B diag(w) A."""
        ...

    @property
    def dropout(self) -> float:
        """The share of the adapters' inputs that dropout sets to 0."""
        ...


class AdaptedLayer(Protocol):
    """What a group needs from a layer; `LoraLinear` is such a layer."""

    spec: SharedSpec
    weight: Tensor | nn.Module  # the frozen one; a module where it is packed
    bias: Tensor | None
    shared: "SharedInput"
    training: bool
    factors: tuple
    sources: tuple
    stand_in: tuple | None
    dtype: torch.dtype

    def frozen(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in this dtype."""
        ...


class SharedInput:
    """Computes the outputs of all its layers when the first of them is called, and returns the others when
    these are called on the same tensor. So the model's own attention and MLP code stays unchanged.

    Dropout draws one mask for all layers. `fused` False: the same maths by plain autograd. The layers own
    this object, and it refers to them weakly, so that a model is freed as soon as nothing else refers to it.
    """

    def __init__(self, layers: list[AdaptedLayer]):
        self._layers = [ref(layer) for layer in layers]
        self.fused = True
        self.defers = False  # whether a backward leaves its products here in place of gradients
        self.forget()
        for layer in layers:
            layer.shared = self

    def __deepcopy__(self, memo: dict) -> "SharedInput":
        """The group of the copied layers, which are being copied when this is called."""
        copied = memo[id(self)] = SharedInput([])
        copied._layers = [ref(copy.deepcopy(layer, memo)) for layer in self.layers]
        copied.fused = self.fused
        return copied

    @property
    def layers(self) -> list[AdaptedLayer]:
        """The layers that still exist, in order."""
        found = [layer() for layer in self._layers]
        return [layer for layer in found if layer is not None]

    def forget(self) -> None:
        """Drop the cached shadows. Needed after the masters were written in a way that autograd's version
        counters don't see (DeepSpeed writes to `.data`)."""
        self._input = None
        self.forget_shadows()
        self._outputs: dict[int, Tensor] = {}  # by id of the layer; those that were not asked for yet
        # Q [R, in] and all P_k [out_k, r_k], summed over the backward passes since they were taken out.
        self.left: tuple[Tensor, list[Tensor]] | None = None

    def forget_shadows(self) -> None:
        """Drop the cached shadows alone."""
        self._shadows: dict[int, tuple[tuple, Shadow]] = {}  # of the masters and of their replacements

    def output(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        """This layer's output for x [..., in]."""
        layers = self.layers
        if len(layers) == 1:
            return self.compute(x)[0]
        # Only for the same tensor in the same version: it may have been written to since the first call.
        kept = self._input is not None and self._input[0] is x and self._input[1] == x._version
        if not kept or id(layer) not in self._outputs:
            self._input = x, x._version
            self._outputs = dict(zip(map(id, layers), self.compute(x), strict=True))
        y = self._outputs.pop(id(layer))
        if not self._outputs:
            self._input = None
        return y

    def compute(self, x: Tensor) -> list[Tensor]:
        """The outputs of all layers, in order."""
        layers = self.layers
        dtype, spec = layers[0].dtype, layers[0].spec
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        # Dtypes are explicit here, and autocast does not support addmm_.
        with torch.autocast(x.device.type, enabled=False):
            drops = spec.dropout and layers[0].training
            dropped = functional.dropout(flat, spec.dropout) if drops else None
            if self.fused:
                out = SharedLinears.apply(flat, dropped, self.group(dtype), *self.masters())
            else:
                out = [_eager(layer, flat, flat if dropped is None else dropped) for layer in layers]
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in out]

    def masters(self) -> list[Tensor | None]:
        """A_1, w_1, B_1, A_2, … as the autograd functions take them."""
        return [factor for layer in self.layers for factor in layer.factors]

    def group(self, dtype: torch.dtype) -> Group:
        """What the autograd functions need, with shadows of the current masters, which are made once per
        optimizer step.
        """
        layers = self.layers
        scale = layers[0].spec.scale
        key, made_from = self._made_from(dtype)
        kept = self._shadows.get(key)
        if kept is None or kept[0] != made_from:
            kept = made_from, shadow([layer.factors for layer in layers], scale, dtype)
            self._shadows[key] = kept
        weights = tuple(partial(layer.frozen, dtype) for layer in layers)
        biases = tuple(None if layer.bias is None else layer.bias.to(dtype) for layer in layers)
        leave = self.leave if self.defers and self.trains_itself() else None
        return Group(weights, biases, scale, kept[1], leave)

    def keep(self, dtype: torch.dtype, made: Shadow) -> None:
        """Cache shadows of the current masters that were made together with those of other groups."""
        key, made_from = self._made_from(dtype)
        self._shadows[key] = made_from, made

    def leave(self, q: Tensor, ps: list[Tensor]) -> None:
        """Add the products of one more backward pass to `left`: Q [R, in], and P_k [out_k, r_k]."""
        if self.left is None:
            self.left = q, ps
        else:
            torch._foreach_add_([self.left[0], *self.left[1]], [q, *ps])

    def _made_from(self, dtype: torch.dtype) -> tuple[int, tuple]:
        """The key of the cached shadows, and what they depend on: the tensors and their versions, dtype,
        device and scale."""
        layers = self.layers
        sources = [source for layer in layers for source in layer.sources if source is not None]
        states = [(id(s), s._version) for s in sources]
        return id(sources[0]), (dtype, sources[0].device, layers[0].spec.scale, states)

    def trains_itself(self) -> bool:
        """Whether the factors are the parameters themselves, not computed from others and not replaced."""
        replaced = any(layer.stand_in for layer in self.layers)
        return not replaced and all(factor is None or factor.is_leaf for factor in self.masters())


def _eager(layer: AdaptedLayer, x: Tensor, source: Tensor) -> Tensor:
    """The layer's formula in plain autograd: y [N, out] of x [N, in], and of the adapter's input `source`
    [N, in], which is x or x after dropout."""
    a, w, b = layer.factors
    hidden = source @ a.to(x.dtype).T
    scale = layer.spec.scale if w is None else (layer.spec.scale * w).to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return (hidden * scale) @ b.to(x.dtype).T + functional.linear(x, layer.frozen(x.dtype), bias)


def share_inputs(model: nn.Module, fused: bool = True, across: bool = True) -> None:
    """Compute the family's siblings (q, k, v; gate, up) together where they have adapters, and a block's
    gated MLP as one function where all three projections have adapters and there is no dropout. `fused`
    False: the same grouping in plain autograd. `across` False: every layer separately, for ZeRO-3, which
    gathers weights layer by layer."""
    family = families.of(model.config)
    for block in list(model.modules()):
        for names in family.siblings if across else ():
            children = [getattr(block, name, None) for name in names]
            adapted = [child for child in children if hasattr(child, "shared")]
            if adapted:
                SharedInput(adapted)  # makes itself the `shared` of each layer
        if fused and across and _is_adapted_mlp(block, family.gated_mlp):
            block.forward = _MlpForward(block, family.gated_mlp)
    for shared in shared_inputs(model):
        shared.fused = fused


@contextmanager
def layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Within this block no MLP is computed as one function, so that every adapted layer is called and its
    hooks see its input."""
    fused = {
        block: vars(block).pop("forward")
        for block in model.modules()
        if isinstance(vars(block).get("forward"), _MlpForward)
    }
    try:
        yield
    finally:
        for block, forward in fused.items():
            block.forward = forward


def _is_adapted_mlp(block: nn.Module, names: GatedNames | None) -> bool:
    if names is None:
        return False
    *layers, activation = (getattr(block, name, None) for name in names)
    adapted = all(hasattr(layer, "shared") and not layer.spec.dropout for layer in layers)
    return adapted and isinstance(activation, nn.Module)


class _MlpForward:
    """down(act(gate(x)) ⊙ up(x)), the forward of a gated MLP, which refers to it weakly. `names`: what the
    family calls gate, up, down and the activation."""

    def __init__(self, block: nn.Module, names: GatedNames):
        self.block, self.names = ref(block), names

    def __deepcopy__(self, memo: dict) -> "_MlpForward":
        return _MlpForward(copy.deepcopy(self.block(), memo), self.names)

    def __call__(self, x: Tensor) -> Tensor:
        gate, _, last, activation = (getattr(self.block(), name) for name in self.names)
        pair, down = gate.shared, last.shared
        dtype = gate.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = GatedMlp.apply(
                x.reshape(-1, x.shape[-1]).to(dtype),
                pair.group(dtype),
                down.group(dtype),
                activation,
                *pair.masters(),
                *down.masters(),
            )
        return y.view(*x.shape[:-1], y.shape[-1])


def shared_inputs(model: nn.Module) -> list[SharedInput]:
    """The model's groups, each once."""
    return list({id(m.shared): m.shared for m in model.modules() if hasattr(m, "shared")}.values())

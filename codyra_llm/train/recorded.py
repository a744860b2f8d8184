"""Forward and backward of packed micro-batches, recorded once for each shape and replayed (CUDA graphs): a
micro-batch of short examples is thousands of kernels, which a GPU finishes long before the host has started
them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from codyra_llm.data.batches import Batch
from codyra_llm.lora.layer import LoraLinear
from codyra_llm.lora.shared import AdaptedLayer, SharedInput, shared_inputs
from codyra_llm.lora.together import make_shadows
from codyra_llm.methods.base import Method
from codyra_llm.models import families
from codyra_llm.models.attention import packed_attention
from codyra_llm.runtime import graphs

LARGEST = 8192  # tokens; more of them keep a GPU busy for longer than the host needs
SEEN = 2  # micro-batches of a shape that run as they come, before it is recorded
MOST = 24  # recordings of a task
TENSORS = ("ids", "positions", "predictors", "targets", "weights", "ends")  # of a packed batch
Record = Callable[[Callable[[], None]], Callable[[], None]]  # from work to what does it again


class Shape(NamedTuple):
    """What is fixed in a recorded micro-batch. A batch gets pads up to the numbers of its shape."""

    tokens: int
    labelled: int
    segments: int
    longest: int  # an upper bound of the segments' lengths


# The smallest shape: with less in it a micro-batch takes a GPU about as long, and there would be more shapes.
LEAST = Shape(tokens=256, labelled=64, segments=8, longest=256)


def shape_of(batch: Batch) -> Shape:
    """The shape of a packed batch: at most an eighth of its tokens, or 255, are added as pads, and the other
    numbers are powers of two."""
    assert batch.segments is not None, "only packed batches are recorded"
    count = batch.ids.numel()
    step = max(LEAST.tokens, _power(count) // 16)
    tokens = -(-count // step) * step
    longest = max(*batch.segments, tokens - count)
    others = (_power(len(batch.targets)), _power(len(batch.segments) + 1), _power(longest))
    return Shape(tokens, *map(max, others, LEAST[1:]))


def _power(count: int) -> int:
    """The least power of two that is not less than `count`."""
    return 1 << max(count - 1, 0).bit_length()


def padded(batch: Batch, shape: Shape) -> Batch:
    """A packed batch with pads as one more segment, empty segments up to the shape's number, and labelled
    positions of weight 0: loss and gradients are the same."""
    assert batch.segments is not None and batch.positions is not None, "only packed batches are recorded"
    pads = shape.tokens - batch.ids.numel()
    segments = [*batch.segments, pads]
    segments += [0] * (shape.segments - len(segments))
    more = shape.labelled - len(batch.targets)
    return replace(
        batch,
        ids=functional.pad(batch.ids, (0, pads)),
        positions=torch.cat([batch.positions, torch.arange(pads)[None]], 1),
        predictors=functional.pad(batch.predictors, (0, more)),
        targets=functional.pad(batch.targets, (0, more)),
        weights=functional.pad(batch.weights, (0, more)),
        segments=segments,
        ends=packed_attention.segment_ends(segments),
        longest=shape.longest,
    )


def can_record(model: nn.Module, method: Method) -> bool:
    """Whether a micro-batch of a shape is the same kernels every time in this method's training: the loss is
    the usual one, and what trains are adapters whose gradients are computed together at the end of a step."""
    if not method.has_usual_loss or not repeats(model):
        return False
    masters = {id(p) for group in shared_inputs(model) for p in group.masters()}
    return all(id(p) in masters for p in model.parameters() if p.requires_grad)


def repeats(model: nn.Module) -> bool:
    """Whether the model's loss is the same kernels for every micro-batch of a shape: one kernel attends in
    packed rows, and nothing is drawn, dequantised or computed twice. Without that kernel, attention reads
    the segments' lengths on the host."""
    base, shared = families.pretrained(model), shared_inputs(model)
    if not packed_attention.used(base) or not packed_attention.pays(base, base.device):
        return False
    fixed = families.of(base.config).recorded_steps and "dynamic" not in families.rope_type(base.config)
    return bool(fixed and shared and not base.is_activation_checkpointing and all(map(_is_fixed, shared)))


def _is_fixed(group: SharedInput) -> bool:
    """Whether the group's products are the same kernels every time, and sum where they are told to."""
    plain = all(map(_is_plain, group.layers))
    return plain and group.fused and group.trains_itself() and not group.layers[0].spec.dropout


def _is_plain(layer: AdaptedLayer) -> bool:
    """Not packed, and without a forward of its own, which might read numbers on the host."""
    usual = isinstance(layer, LoraLinear) and type(layer).forward is LoraLinear.forward
    return usual and isinstance(layer.weight, Tensor)


def _product_shapes(group: SharedInput) -> list[tuple[int, int]]:
    """The shapes of Q [R, in] and of all P_k [out_k, r_k]."""
    factors = [layer.factors for layer in group.layers]
    rows, inputs = sum(len(a) for a, _, _ in factors), factors[0][0].shape[1]
    return [(rows, inputs), *((len(b), b.shape[1]) for _, _, b in factors)]


class Graphs:
    """Records work that runs on the GPU, on a stream for this alone. All recordings share the memory of their
    intermediate tensors, so what is to last is written into tensors that were there before."""

    def __init__(self, stream: torch.cuda.Stream):
        self.stream, self.pool = stream, torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that does again what `work` does; `work` itself is not done yet."""
        return graphs.recorded(work, self.stream, self.pool).replay


@dataclass
class _Recording:
    """One shape's input, its loss, and the function that computes it and adds to the groups' sums."""

    batch: Batch
    loss: Tensor
    replay: Callable[[], None]


class Recorder:
    """Runs forward and backward of micro-batches by replaying them where it can.

    `loss`: the loss of a batch on the device. The products from which the factors' gradients follow
    (`together.finish_gradients`) are summed in tensors that stay, one for all micro-batches of a step.
    `begin` gives what records, at first and after all recordings were freed."""

    def __init__(
        self,
        shared: Sequence[SharedInput],
        loss: Callable[[Batch], Tensor],
        device: torch.device,
        begin: Callable[[], Record] | None = None,
    ):
        self.shared, self.loss, self.device = shared, loss, device
        self.begin = begin or partial(Graphs, torch.cuda.Stream(device))
        self.record = self.begin()
        self.on = True
        self.more = True  # whether new shapes may be recorded
        self.seen: Counter[tuple] = Counter()
        self.recordings: dict[tuple, _Recording] = {}  # by the shape and what else is fixed
        self.made = 0  # how many there have been, those that were freed included
        self.flat = torch.empty(0)  # all sums
        self.sums: list[tuple[Tensor, list[Tensor]]] = []  # its parts by group: Q and all P_k

    def begin_step(self) -> None:
        """Begin the sums of a step anew."""
        if self.sums:
            self.flat.zero_()
            self._sum_here()

    def run(self, batch: Batch) -> Tensor | None:
        """Forward and backward of a batch that is still on the host: its loss. None where it is to be run in
        the usual way: a shape that is too large, or new, or that there is no room for.

        No graph of autograd with the factors in it may be alive. Its nodes would be those of a recording too,
        whose backward pass would wait at its end for the streams on which they were made (PyTorch 2.13). That
        is not allowed while it is recorded."""
        if not self.on or batch.segments is None or batch.ids.numel() > LARGEST:
            return None
        shape = shape_of(batch)
        # The scale of ΔW is a number on the host, which a method may change from step to step.
        kind = shape, *(group.layers[0].spec.scale for group in self.shared)
        if kind not in self.recordings:
            self.seen[kind] += 1
            if self.seen[kind] <= SEEN or not self._takes_more():
                return None
        given = padded(batch, shape).to(self.device)
        if kind not in self.recordings:
            self.recordings[kind] = self._recorded(given)
            self.made += 1
        recording = self.recordings[kind]
        self._set(recording.batch, given)
        recording.replay()
        return recording.loss.clone()

    def free(self) -> bool:
        """Free all recordings; returns whether there were any."""
        held = bool(self.sums)
        self.recordings, self.sums, self.flat = {}, [], torch.empty(0)
        self.seen.clear()
        # Memory that recordings shared may not be asked for again once the last of them is gone: PyTorch's
        # allocator asserts that it is in use.
        self.record = self.begin()
        return held

    def stop(self) -> bool:
        """Free all recordings and record nothing more; returns whether there were any."""
        self.on = False
        return self.free()

    def _takes_more(self) -> bool:
        """Whether there are fewer than MOST recordings, and half of the GPU's memory is free: recordings have
        memory of their own, which other micro-batches can't use."""
        if self.more:
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
            self.more = len(self.recordings) < MOST and 2 * free > total
        return self.more

    def _recorded(self, given: Batch) -> _Recording:
        """A recording for batches of this one's shape."""
        if not self.sums:
            self._make_sums()
        total = torch.zeros((), device=self.device, dtype=self.sums[0][0].dtype)

        def work() -> None:
            make_shadows(self.shared)
            loss = self.loss(given)
            loss.backward()
            total.copy_(loss.detach())

        replay = self.record(work)
        for group in self.shared:  # their memory is that of the recording, and may soon hold something else
            group.forget_shadows()
        return _Recording(given, total, replay)

    def _make_sums(self) -> None:
        """Make the sums, as parts of one tensor, with what this step's micro-batches have left so far."""
        shapes = [_product_shapes(group) for group in self.shared]
        sizes = [rows * columns for own in shapes for rows, columns in own]
        self.flat = self.shared[0].layers[0].factors[0].new_zeros(sum(sizes))
        parts = iter(self.flat.split(sizes))
        for group, own in zip(self.shared, shapes, strict=True):
            q, *ps = [next(parts).view(shape) for shape in own]
            self.sums.append((q, ps))
            if group.left is not None:
                for total, left in zip((q, *ps), (group.left[0], *group.left[1]), strict=True):
                    total.add_(left)
        self._sum_here()

    def _sum_here(self) -> None:
        for group, sums in zip(self.shared, self.sums, strict=True):
            group.left = sums

    @staticmethod
    def _set(fixed: Batch, given: Batch) -> None:
        """Write the batch into the one whose tensors were recorded."""
        targets = [getattr(fixed, name) for name in TENSORS]
        sources = [getattr(given, name) for name in TENSORS]
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def recorder_for(model: nn.Module, method: Method) -> Recorder | None:
    """What records the micro-batches of this model in training, None where they are not recorded."""
    device = next(model.parameters()).device
    if device.type != "cuda" or not can_record(model, method):
        return None
    return Recorder(shared_inputs(model), lambda batch: batch.cross_entropy(model), device)

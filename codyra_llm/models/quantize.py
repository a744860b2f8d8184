"""Frozen weights in 4 or 8 bits (bitsandbytes), on a CPU or a GPU: dequantised each time they are read."""

import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from codyra_llm.models import families

BLOCK, NESTED_BLOCK = 64, 256  # weights that share an absmax; absmaxes that share theirs


class PackedWeight(nn.Module):
    """A frozen W [out, in] in few bits, in the place where a linear layer has its parameter `weight`.

    `shape` and `dtype` are those of the W it was made from. What it holds are frozen parameters, not buffers:
    they move with the model, and DDP sends them once, where it would send buffers with every forward.
    """

    bits: float  # per weight, scales included

    def __init__(self, weight: Tensor):
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        for name, tensor in self.pack(weight.detach().to(self.packed_on())).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def device(self) -> torch.device:
        """Where the packed bytes are."""
        return self.packed.device

    @staticmethod
    def packed_on() -> torch.device:
        """Where to pack: on the host, unless a kind knows better."""
        return torch.device("cpu")

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """What is kept of W, by name; "packed" among it."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in `dtype` (float32, bfloat16 or float16), new at every call."""
        raise NotImplementedError


class Nf4Weight(PackedWeight):
    """NF4: W = absmax of its block of 64 · one of 16 quantiles of N(0, 1). The absmaxes are quantised in
    turn, to 8 bits in blocks of 256 around their mean (Dettmers et al., QLoRA, 2305.14314, section 3)."""

    bits = 4 + 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK)

    @staticmethod
    def packed_on() -> torch.device:
        """A core packs 20 million weights per second, minutes for a large model; a GPU takes one weight at a
        time.
        """
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Two 4-bit values a byte, and their absmaxes, 8-bit too."""
        packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
        return {
            "packed": packed,
            "absmax": state.absmax,
            "nested_absmax": state.state2.absmax,
            "nested_code": state.state2.code,
            "offset": state.offset.view(1),  # DeepSpeed can't send a tensor of 0 dimensions
        }

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in this dtype."""
        nested = bnb.QuantState(
            self.nested_absmax, code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        # As one row: bitsandbytes 0.50's AVX-512 kernel reads rows of a length that is no multiple of 64
        # wrongly.
        row = torch.Size((1, self.shape.numel()))
        state = bnb.QuantState(
            self.absmax,
            row,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.offset,
            state2=nested,
        )
        return bnb.dequantize_4bit(self.packed, state).view(self.shape)


class Int8Weight(PackedWeight):
    """W = q · s, q an int8 and s = absmax / 127 of its row (as the weights of LLM.int8(), 2208.07339)."""

    bits = 8.0

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """One byte a value, and a scale per row."""
        packed, absmax, _ = bnb.int8_vectorwise_quant(weight)
        return {"packed": packed, "scale": absmax.view(-1, 1) / 127}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in this dtype."""
        # Into `out`: the product is rounded once, and no float32 copy of W is made on the way to 16 bits.
        return torch.mul(
            self.packed, self.scale, out=torch.empty(self.shape, dtype=dtype, device=self.device)
        )


KINDS: dict[str, type[PackedWeight]] = {"nf4": Nf4Weight, "int8": Int8Weight}


class FrozenProduct(torch.autograd.Function):
    """y = x Wᵀ + b and dx = dy W for a packed W and a frozen b; nothing is saved but the packed W itself."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """y = x Wᵀ + b; of W only the packed bytes are kept."""
        ctx.weight = weight
        return functional.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        """dx = dy W, with W made again."""
        return dy @ ctx.weight.dequantize(dy.dtype), None, None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with its W packed. `LoraLinear` takes W and b over from it as from a plain
    one.
    """

    def __init__(self, linear: nn.Linear, kind: type[PackedWeight]):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = kind(linear.weight), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in]."""
        return FrozenProduct.apply(x, self.weight, self.bias)


@torch.no_grad()
def quantize(model: nn.Module, kind: str) -> None:
    """Pack every projection of the blocks, adapted later or not, one after the other; each frees what it was
    made from. Embeddings, norms, biases and the head stay as they are."""
    for name in list(families.projections(model)):
        parent, _, leaf = name.rpartition(".")
        block = model.get_submodule(parent)
        setattr(block, leaf, QuantizedLinear(getattr(block, leaf), KINDS[kind]))

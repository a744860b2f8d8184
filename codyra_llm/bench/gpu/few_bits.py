"""Stage `nf4`: a base in 4 and in 8 bits against bfloat16."""

from functools import partial
from importlib.util import find_spec
from time import perf_counter

import torch
from transformers import PreTrainedModel

from codyra_llm.bench.gpu.context import Context
from codyra_llm.bench.gpu.planned import forget
from codyra_llm.bench.gpu.shapes import PAD, adapted, examples, model
from codyra_llm.data.batches import Batch, collate, example_weights
from codyra_llm.models.attention import packed_attention
from codyra_llm.runtime.memory import peak_bytes

SHAPE = "four layers of llama-3-8b"


def nf4(context: Context) -> None:
    """Measure all three. Without bitsandbytes, which is an extra, record that it is missing."""
    if find_spec("bitsandbytes") is None:
        context.record("bitsandbytes", "is not installed; install codyra-llm[bitsandbytes]")
        return
    for kind in (None, "nf4", "int8"):
        context.attempt(kind or "bfloat16", partial(measure_kind, context, kind))


def measure_kind(context: Context, kind: str | None) -> dict:
    """Seconds to quantise, megabytes of the weights, and of one step the seconds, the peak memory without the
    weights, and the loss."""
    made = model(context, SHAPE)
    packing = _packed(context, made, kind) if kind else 0.0
    weights = sum(p.nbytes for p in made.parameters())
    wrong = _dequantised(made) if kind else {}
    adapted(made, context)
    batch = _batch(context, made)

    def work() -> None:
        forget(made)
        batch.cross_entropy(made).backward()

    return {
        "packing, s": round(packing, 3),
        "weights, MB": round(weights / 1e6, 1),
        "step, s": round(context.seconds(work, 2 if context.tiny else 5), 4),
        "peak without weights, MB": round(peak_bytes(work, context.device) / 1e6, 1),
        "loss": round(batch.cross_entropy(made).item(), 4),
        **wrong,
    }


def _packed(context: Context, made: PreTrainedModel, kind: str) -> float:
    """Quantise the projections; returns the seconds that it takes."""
    from codyra_llm.models.quantize import quantize  # bitsandbytes is slow to import

    began = perf_counter()
    quantize(made, kind)
    made.to(context.device)
    context.wait()
    return perf_counter() - began


def _batch(context: Context, made: PreTrainedModel) -> Batch:
    given = examples(context, 4 if context.tiny else 16)
    packed = packed_attention.pays(made, context.device)
    if packed:
        packed_attention.use(made)
    weights = example_weights(given, range(len(given)), "token")
    return collate(given, range(len(given)), weights, PAD, packed).to(context.device)


def _dequantised(made: PreTrainedModel) -> dict:
    """Whether the first packed weight comes back finite, on the device."""
    from codyra_llm.models.quantize import PackedWeight

    first = next(module for module in made.modules() if isinstance(module, PackedWeight))
    weight = first.dequantize(torch.bfloat16)
    return {"dequantised": f"{weight.dtype} on {weight.device.type}, finite: {bool(weight.isfinite().all())}"}

"""Stage `plan`: the memory and time that `plan` estimates for one micro-batch, against what it takes."""

from functools import partial

from transformers import PreTrainedModel

from codyra_llm.bench.gpu.context import Context
from codyra_llm.bench.gpu.shapes import PAD, adapted, config, examples, model, skeleton
from codyra_llm.data.batches import Batch, collate, example_weights
from codyra_llm.lora.shared import shared_inputs
from codyra_llm.methods.base import Method
from codyra_llm.models import loading
from codyra_llm.models.attention import packed_attention
from codyra_llm.runtime.memory import peak_bytes
from codyra_llm.train.estimate import activation_bytes, depth, one_pass, step_seconds
from codyra_llm.train.recorded import SEEN, recorder_for

SHAPE = "llama-3.2-1b"
CASES = (("padded", False), ("packed", False), ("packed", True))


def plan(context: Context) -> None:
    """Compare estimate and measurement in all CASES; the targets are for the worst of them."""
    memory, time = [], []
    for kind, checkpointing in CASES:
        key = f"{kind}{', checkpointing' if checkpointing else ''}"
        packed = kind == "packed"
        measure = context.on_gpu if packed else context.attempt
        found = measure(key, partial(estimate_errors, context, packed, checkpointing))
        if found:
            memory.append(abs(found["peak, off by"]))
            time.append(abs(found["seconds, off by"]))
    if len(memory) == len(CASES):
        context.target("memory that plan estimates, off by", max(memory))
        context.target("time that plan estimates, off by", max(time))


def estimate_errors(context: Context, packed: bool, checkpointing: bool) -> dict[str, float]:
    """Estimated and measured for one micro-batch: megabytes at the peak, without weights, and seconds."""
    batch = micro_batch(context, packed)
    planned, method = as_trained(skeleton(context, SHAPE), context, packed, checkpointing)
    layers = depth(planned)
    predicted = activation_bytes(planned, batch, context.device)

    def with_layers(count: int, adapted_layers: range | None = None) -> PreTrainedModel:
        """The model with its first `count` layers, all of them with adapters whatever is asked for."""
        return as_trained(model(context, SHAPE, count), context, packed, checkpointing)[0]

    expected = step_seconds(with_layers, batch, layers, method=method)
    made = with_layers(config(context, SHAPE).num_hidden_layers)
    one_pass(made, batch)
    forget(made)  # so that nothing of this pass is there before the next one is measured
    peak = peak_bytes(partial(one_pass, made, batch), context.device)
    recorder = recorder_for(made, method)
    for _ in range(SEEN):
        one_pass(made, batch, recorder=recorder)
    rounds = 2 if context.tiny else 5
    seconds = context.seconds(partial(one_pass, made, batch, recorder=recorder), rounds)
    return {
        "tokens": batch.ids.numel(),
        "recorded": bool(recorder and recorder.recordings),
        "peak MB": round(peak / 1e6, 2),
        "peak MB, estimated": round(predicted / 1e6, 2),
        "peak, off by": round(predicted / peak - 1, 4),
        "s": round(seconds, 4),
        "s, estimated": round(expected, 4),
        "seconds, off by": round(expected / seconds - 1, 4),
    }


def micro_batch(context: Context, packed: bool) -> Batch:
    """One micro-batch of short examples, on the CPU."""
    given = examples(context, 8 if context.tiny else 48)
    chosen = range(len(given))
    return collate(given, chosen, example_weights(given, chosen, "token"), PAD, packed)


def as_trained(
    made: PreTrainedModel, context: Context, packed: bool, checkpointing: bool
) -> tuple[PreTrainedModel, Method]:
    """The model with adapters, ready for training in this way, and its method."""
    method = adapted(made, context)
    if checkpointing:
        loading.checkpoint_layers(made)
    if packed:
        packed_attention.use(made)
    return made, method


def forget(made: PreTrainedModel) -> None:
    """Drop the gradients, and what layers with a shared input keep for a step."""
    made.zero_grad()
    for shared in shared_inputs(made):
        shared.forget()

"""Level `step`: whole training steps of a model on TRACE examples, optimizer included."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from codyra_llm.bench.arms import ARMS, NOTES, Arm, draw, exact
from codyra_llm.bench.measure import Contestant, Options, compare, machine
from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.config.sections import DataSection
from codyra_llm.core.errors import Fault
from codyra_llm.data.batches import Batch, collate, default_tokens, example_weights, micro_batches
from codyra_llm.data.check import task_folders
from codyra_llm.data.encoding import Encoded, Encoder
from codyra_llm.data.records import read_split
from codyra_llm.experiment.setup import base_folder, data_root
from codyra_llm.lora.together import deferred, finish_gradients, make_shadows
from codyra_llm.models import loading
from codyra_llm.models.attention import packed_attention
from codyra_llm.models.tokenizer import load_tokenizer
from codyra_llm.train.recorded import SEEN, Recorder, repeats

RANK = 16
LR = 1e-4
GATE = 2  # examples that are checked; float64 is slow
OURS = "micro-batches and loss of this program"

BATCHES = {
    "peft": "batches in the order of the data, padded and masked, and the loss that transformers computes "
    "from all logits",
    "peft-strong": f"{OURS}, so what is left between it and ours is the LoRA layer",
}

# The losses of a global batch's pieces, which sum to its loss; of recorded ones backward has already run.
Losses = Callable[[Arm, list[Encoded]], Iterator[Tensor]]


def measure(options: Options) -> dict:
    """Global batches of `batch` examples, the first `examples` of each task; every arm takes the same ones.
    Micro-batches of all arms are cut at the same number of tokens, padding included."""
    folder = base_folder(options.model or "mini")
    tokenizer = load_tokenizer(folder)
    batches = _global_batches(options, Encoder(tokenizer, _section(options)))
    base = loading.load(folder, options.dtype)
    return steps(base, folder.name, batches, tokenizer.pad_token_id, options)


def steps(
    base: PreTrainedModel, title: str, batches: list[list[Encoded]], pad: int, options: Options
) -> dict:
    """Whole training steps of `base` on these global batches. Rows are packed where that is faster."""
    base = base.to(options.device).train()
    sizes = [sum(map(len, batch)) for batch in batches]
    largest, checked = sizes.index(max(sizes)), batches[sizes.index(min(sizes))][:GATE]
    numbers = draw(base, RANK)
    limit = options.tokens or default_tokens(options.device)
    packed = packed_attention.pays(base, options.device)
    peft = partial(_peft_losses, limit=limit, pad=pad, device=options.device)
    ours = partial(_our_losses, limit=limit, pad=pad, device=options.device, packed=packed)
    contestants, expected = {}, {}
    for name in options.chosen(list(ARMS)):
        kind = "frozen" if name == "frozen" else "adapted"
        if kind not in expected:
            reference = _prepared(exact(base, numbers, name), packed)
            expected[kind] = _outcome(reference, ours, checked, options.device)
            del reference
        losses = peft if name == "peft" else ours
        arm = _prepared(ARMS[name](base, numbers), packed and losses is ours)
        if name == "ours" and options.device.type == "cuda" and repeats(arm.model):
            arm.recorder = Recorder(arm.shared, partial(_loss, arm.model), options.device)
            for batch in (checked, *batches):  # in training a shape comes often enough to be recorded
                for _ in range(SEEN):
                    _outcome(arm, losses, batch, options.device)
        step = _stepper(arm, losses, batches, options.device)
        contestants[name] = Contestant(
            partial(_outcome, arm, losses, checked, options.device),
            expected[kind],
            step,
            before_weighing=partial(_stop_recording, arm),
        )
    rows = compare(contestants, options, (options.rounds or 1) * len(batches), largest, len(batches))
    for row in rows.values():
        row["tokens_per_second"] = sum(sizes) * (options.rounds or 1) / row["seconds"]
    shape = [
        title,
        f"{len(batches)} batches of {max(map(len, batches))}",
        f"{sum(sizes)} tokens",
        f"r={RANK}",
    ]
    notes = [f"{name}: {NOTES[name]}; {BATCHES.get(name, OURS)}" for name in rows]
    notes.append(
        f"tokens without padding, at most {limit} at once with it{', rows packed' if packed else ''}; peak: "
        f"the batch of {max(sizes)} tokens, without weights and Adam's moments; fused AdamW for all; "
        f"float64: {len(checked)} examples"
    )
    return {"level": "step", "shape": shape, "machine": machine(options), "arms": rows, "notes": notes}


def _prepared(arm: Arm, packed: bool) -> Arm:
    """Ready for packed rows; and where nothing trains, backward runs down to the embeddings' output."""
    if packed:
        packed_attention.use(arm.model)
    if not arm.masters:
        arm.model.enable_input_require_grads()
    return arm


def _section(options: Options) -> DataSection:
    lengths = load_benchmark("trace").protocols["trace"]
    return DataSection(
        root=options.data,
        max_prompt_tokens=lengths.max_prompt_tokens,
        max_answer_tokens=lengths.max_answer_tokens,
    )


def _global_batches(options: Options, encoder: Encoder) -> list[list[Encoded]]:
    """Batches of each task's first examples. Raises Fault where the folder has none of the tasks."""
    root = data_root(options.data)
    present = {folder.name for folder in task_folders(root)}
    batches = []
    for task in options.tasks or [name for name in load_benchmark("trace").tasks if name in present]:
        encoded = encoder.encode(read_split(root, task, "train")[: options.examples])
        batches += [encoded[i : i + options.batch] for i in range(0, len(encoded), options.batch)]
    if not batches:
        raise Fault(
            f"--data: {root} holds none of TRACE's tasks; give the folder that holds <task>/train.json, or "
            "--tasks"
        )
    return batches


def _loss(model: nn.Module, piece: Batch) -> Tensor:
    return piece.cross_entropy(model)


def _stop_recording(arm: Arm) -> None:
    """From here on steps run without recordings, whose memory the allocator does not count."""
    if arm.recorder:
        arm.recorder.stop()
    for group in arm.shared:
        group.forget()


def _our_losses(
    arm: Arm, batch: list[Encoded], limit: int, pad: int, device: torch.device, packed: bool
) -> Iterator[Tensor]:
    """Micro-batches and loss as the training loop has them."""
    weights = example_weights(batch, range(len(batch)), "token")
    for chosen in micro_batches([len(e) for e in batch], 1, limit, packed)[0]:
        piece = collate(batch, chosen, [weights[i] for i in chosen], pad, packed)
        loss = arm.recorder.run(piece) if arm.recorder else None
        yield _loss(arm.model, piece.to(device)) if loss is None else loss


def _peft_losses(
    arm: Arm, batch: list[Encoded], limit: int, pad: int, device: torch.device
) -> Iterator[Tensor]:
    """Examples in their order, as many to a micro-batch as fit under the limit with padding, and the loss of
    transformers, which divides by the labelled tokens of the whole batch."""
    count, piece = sum(len(e.answer) for e in batch), []
    for example in batch:
        longest = max(map(len, [*piece, example]))
        if piece and longest * (len(piece) + 1) > limit:
            yield arm.model(**_padded(piece, pad, device), num_items_in_batch=count).loss
            piece = []
        piece.append(example)
    yield arm.model(**_padded(piece, pad, device), num_items_in_batch=count).loss


def _padded(examples: list[Encoded], pad: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [n, T], padded on the right."""

    def stack(rows: list[list[int]], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value).to(device)

    ids, seen, labels = [], [], []
    for example in examples:
        ids.append(example.prompt + example.answer)
        seen.append([1] * len(example))
        labels.append([-100] * len(example.prompt) + example.answer)
    return {
        "input_ids": stack(ids, pad),
        "attention_mask": stack(seen, 0),
        "labels": stack(labels, -100),
    }


def _forward_backward(arm: Arm, losses: Losses, batch: list[Encoded], device: torch.device) -> Tensor:
    """The loss; gradients are left on the arm's parameters."""
    total = torch.zeros((), device=device)
    pieces = losses(arm, batch)
    shared = arm.shared
    make_shadows(shared)  # as the training loop does
    if arm.recorder:
        arm.recorder.begin_step()
    with deferred(shared, device.type == "cuda"):
        while True:
            with arm.context(device):
                loss = next(pieces, None)
            if loss is None:
                break
            if loss.requires_grad:
                loss.backward()
            total = total + loss.detach()
            # With it goes autograd's graph, which must be gone before the next piece may be recorded
            # (`Recorder.run`).
            del loss
    finish_gradients(shared)
    return total


def _outcome(arm: Arm, losses: Losses, batch: list[Encoded], device: torch.device) -> dict[str, Tensor]:
    """The loss and the gradients of a batch."""
    arm.forget_gradients()
    return {"loss": _forward_backward(arm, losses, batch, device), **arm.gradients()}


def _stepper(
    arm: Arm, losses: Losses, batches: list[list[Encoded]], device: torch.device
) -> Callable[[int], None]:
    """A function of the round that does one training step; `frozen` has nothing to optimize."""
    optimizer = torch.optim.AdamW(arm.parameters(), lr=LR, fused=True) if arm.parameters() else None

    def step(number: int) -> None:
        _forward_backward(arm, losses, batches[number % len(batches)], device)
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step

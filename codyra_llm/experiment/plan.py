"""Shows what a recipe will do, without training: steps, tokens, parameters, memory, time, disk, and one
example."""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import nn

from codyra_llm.config.recipe import Recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.core.tensors import own_device
from codyra_llm.data.batches import Batch, batch_tokens, collate, default_tokens, micro_batches
from codyra_llm.data.encoding import Encoded
from codyra_llm.evaluate.budget import MOST, affordable, free_bytes, token_bytes
from codyra_llm.experiment.inspection import as_presented, hints, splits
from codyra_llm.experiment.preflight import refuse_lacking
from codyra_llm.experiment.setup import Setup, prepare
from codyra_llm.lora.layer import sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.methods import sizes
from codyra_llm.methods.base import Method, OutsideSteps
from codyra_llm.models import families, fused_norm, loading
from codyra_llm.models.attention import packed_attention
from codyra_llm.models.ends import ended
from codyra_llm.runtime.forecast import duration
from codyra_llm.train.estimate import (
    MEASURED_LAYERS,
    Timed,
    activation_bytes,
    decoding_flops,
    decoding_seconds,
    depth,
    host_speed,
    matmul_speed,
    outside_flops,
    step_flops,
    step_seconds,
    total_seconds,
)
from codyra_llm.train.task_data import TaskData


@dataclass
class Work:
    """What the recipe trains on, cut into micro-batches as in one process: its tasks, all micro-batches, the
    one with the most tokens, and one of median size."""

    tasks: list[TaskData] = field(default_factory=list)
    pieces: list["Piece"] = field(default_factory=list)
    biggest: Batch | None = None
    typical: Batch | None = None


class Piece(NamedTuple):
    """A micro-batch: its tokens, with padding and with the prompts that the method puts before each example,
    its labelled tokens, the sum of its segments' squared lengths, which examples of which task it holds, and
    how many positions those prompts take before each."""

    tokens: int
    labelled: int
    squares: int
    task: int
    examples: list[int]
    front: int


def plan(recipe: Recipe, console: Console) -> None:
    """Print the plan of a recipe. Raises one Fault with everything that is wrong with it."""
    setup = prepare(recipe)
    refuse_lacking(setup, judges=bool(setup.prompts))
    model = skeleton(setup)
    work = _work(setup, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bare = loading.bare(setup.base, setup.dtype, setup.recipe.model.attention)
    size = sum(p.numel() for p in bare.parameters())
    console.print(
        Text.assemble(
            (setup.recipe.model.path, "bold"),
            f" ({model.config.model_type}, {size / 1e6:.1f} M parameters, "
            f"{str(setup.dtype).removeprefix('torch.')}); method ",
            (setup.method.name, "bold"),
            f" trains {trained / 1e6:.2f} M parameters",
        )
    )
    console.print(_table(setup, work))
    if work.tasks:
        console.print(_shown(setup, work.tasks[0].examples[0]))
    read = list(splits(setup.recipe, setup.stream, bool(setup.method.trains)))
    read = as_presented(setup.method, setup.stream, setup.encoder, read)
    front = setup.method.prompt_positions(len(setup.recipe.tasks))
    hinted = hints(setup.recipe, read, setup.encoder, model.config, setup.base, front)
    for hint in [*setup.stream.remarks(), *_cut(setup, work), *_endless(setup, work), *hinted]:
        console.print(f"note: {hint}", style="yellow", soft_wrap=True)
    steps = [task.steps(setup.recipe.optim.batch_size) for task in work.tasks]
    foreseen = setup.method.remarks(model, steps, setup.recipe.optim.schedule) if steps else []
    for line in [*foreseen, *_estimates(setup, model, work, trained, size)]:
        console.print(line)


def skeleton(
    setup: Setup,
    layers: int | None = None,
    device: torch.device | str = "meta",
    adapted: range | None = None,
) -> nn.Module:
    """The model as it trains, without weights (meta device); on another device with random ones, and with
    only its first `layers` layers. `adapted`: the layers with adapters, where the method has such a choice;
    None: those of the recipe."""
    attention = setup.recipe.model.attention
    model = loading.bare(setup.base, setup.dtype, attention, layers, device)
    if own_device().type == "cuda":
        fused_norm.replace(model)
    if setup.method.trains:
        method = setup.method if adapted is None else _with_layers(setup, adapted)
        method.attach(model)
        share_inputs(model, setup.recipe.model.fused)
    if setup.recipe.model.gradient_checkpointing:
        loading.checkpoint_layers(model)
    if setup.method.trains and not setup.method.merges:
        # What such a method adds to the model is small and not counted.
        model.enable_input_require_grads()
    return model.train()


def _with_layers(setup: Setup, layers: range) -> Method:
    """The recipe's method with its adapters on these layers, where it has such a choice."""
    config = setup.recipe.method
    update = {"layers": [*layers]} if hasattr(config, "layers") else {}
    return METHODS[config.name](config.model_copy(update=update), setup.recipe.seed)


def _work(setup: Setup, model: nn.Module) -> Work:
    """Encode what every task trains on, and cut it into micro-batches. Switches `model` to packed attention
    where the run would."""
    recipe, work = setup.recipe, Work()
    device = own_device()
    limit = recipe.optim.micro_batch_tokens or default_tokens(device)
    packed = recipe.data.batching == "packed" or (
        recipe.data.batching == "auto" and setup.method.packs and packed_attention.pays(model, device)
    )
    if packed:
        packed_attention.use(model)
    for index, task in enumerate(recipe.tasks if setup.method.trains else ()):
        records, epochs = setup.method.train_data(setup.stream, index)
        data = TaskData(task, index, setup.encoder.encode(records), epochs, [])
        work.tasks.append(data)
        front = setup.method.prompt_positions(index + 1)
        for chosen in data.batches(recipe.seed, recipe.optim.batch_size):
            for positions in micro_batches([len(data.examples[i]) for i in chosen], 1, limit, packed)[0]:
                own = [chosen[i] for i in positions]
                lengths = [front + len(data.examples[i]) for i in own]
                tokens = batch_tokens(lengths, packed)
                labelled = sum(data.examples[i].targets for i in own)
                squares = sum(n * n for n in lengths) if packed else max(lengths) * tokens
                work.pieces.append(Piece(tokens, labelled, squares, index, own, front))
    if work.pieces:
        work.pieces.sort()
        middle = work.pieces[len(work.pieces) // 2]
        work.biggest = _batch(setup, work, work.pieces[-1], packed)
        work.typical = _batch(setup, work, middle, packed)
    return work


def _batch(setup: Setup, work: Work, piece: Piece, packed: bool) -> Batch:
    """The tensors of a micro-batch, on the CPU; weights are 1, since only its size matters."""
    examples, weights = work.tasks[piece.task].examples, [1.0] * len(piece.examples)
    return collate(examples, piece.examples, weights, setup.tokenizer.pad_token_id, packed)


def _table(setup: Setup, work: Work) -> Table:
    """A row for each task: what it trains on (blank where nothing trains), and what it is tested on."""
    recipe, right = setup.recipe, {"justify": "right", "no_wrap": True}
    warm = f" after warm-up {recipe.optim.warmup:g}" if recipe.optim.warmup else ""
    table = Table(
        Column("task", no_wrap=True),
        *(
            Column(name, **right)
            for name in ("train", "epochs", "steps", "tokens", "labelled", "longest", "cut", "test", "new")
        ),
        box=SIMPLE,
        padding=0,
        collapse_padding=True,
        title=f"{recipe.data.protocol} protocol, batch {recipe.optim.batch_size}, lr {recipe.optim.lr:g} "
        f"{recipe.optim.schedule}{warm}, loss per {recipe.optim.loss_average}",
    )
    for index, task in enumerate(recipe.tasks):
        training = [""] * 7
        if work.tasks:
            data = work.tasks[index]
            visited = [data.examples[i] for epoch in data.epochs for i in epoch]
            labelled = sum(example.targets for example in visited)
            cut = [example for example in data.examples if example.cut]
            training = [
                str(len(data.examples)),
                str(len(data.epochs)),
                str(data.steps(recipe.optim.batch_size)),
                f"{sum(map(len, visited)):,}",
                f"{labelled:,}",
                str(max(map(len, data.examples))),
                f"{len(cut) / len(data.examples):.0%}",
            ]
        table.add_row(task, *training, str(len(setup.test(index))), str(setup.new_tokens(index)))
    return table


def _cut(setup: Setup, work: Work) -> list[str]:
    """A sentence for each task of which most examples are cut."""
    limits, found = setup.recipe.data, []
    for name, data in zip(setup.recipe.tasks, work.tasks, strict=False):  # of no tasks where nothing trains
        cut = [example for example in data.examples if example.cut]
        if 2 * len(cut) > len(data.examples):
            found.append(
                f"{name}: {len(cut)} of {len(data.examples)} training examples are cut, prompts to "
                f"data.max_prompt_tokens ({limits.max_prompt_tokens}) or answers to data.max_answer_tokens "
                f"({limits.max_answer_tokens}); raise these to have them whole"
            )
    return found


def _endless(setup: Setup, work: Work) -> list[str]:
    """A sentence on the tasks whose answers are mostly cut, so that they hardly teach the model to stop,
    while evaluation allows longer answers."""
    room, found = setup.recipe.data.max_answer_tokens, []
    assert room is not None, "resolved() fills it in"
    for index, data in enumerate(work.tasks):
        cut = [example for example in data.examples if not ended(example.answer, setup.encoder.ends)]
        if 2 * len(cut) > len(data.examples) and setup.new_tokens(index) > room:
            found.append(setup.recipe.tasks[index])
    if not found:
        return []
    return [
        f"{', '.join(found)}: most training answers are cut to data.max_answer_tokens ({room}) and have no "
        "end to learn, and eval.max_new_tokens lets the model say more; raise data.max_answer_tokens, or "
        "lower eval.max_new_tokens to it"
    ]


def _shown(setup: Setup, example: Encoded) -> Text:
    """The first training example as the model sees it, labelled tokens marked."""
    decode, parts, place = setup.tokenizer.decode, [], 0
    for start, stop in example.turns:
        parts += [decode(example.prompt[place:start]), (decode(example.prompt[start:stop]), "bold green")]
        place = stop
    return Text.assemble(
        "first example, labelled part in green:\n",
        *parts,
        decode(example.prompt[place:]),
        (decode(example.answer), "bold green"),
        f"\n{len(example.prompt)} prompt tokens, {example.targets} labelled: {example.answer[:12]}",
    )


def _estimates(setup: Setup, model: nn.Module, work: Work, trained: int, size: int) -> list[str]:
    """Memory: weights, what trains with two moments in float32, and the peak of the largest micro-batch with
    what the method holds, or that of the method's passes over data. Time: of a few layers that run here.
    Disk: updates, states and, if asked, the final model. `trained`, `size`: how many parameters train, and
    how many the base has."""
    device = own_device()
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    held = {"weights": _weight_bytes(setup, model, frozen)}
    lines = []
    if work.biggest:
        # Time first: estimating memory fills the skeleton with fake tensors.
        expected = _training(setup, model, work, device)
        lines += [line for line in (expected.line, expected.outside) if line]
        held[f"{setup.method.trains} and Adam's moments"] = trained * 12
        held |= _at_the_peak(setup, model, work, device)
    disk = sizes.disk_bytes(setup.recipe, setup.base, setup.method, model)
    parts = ", ".join(f"{name} {part / 1e9:.2f}" for name, part in held.items())
    return [
        f"memory, estimated: {sum(held.values()) / 1e9:.2f} GB ({parts})",
        *lines,
        _answering(setup, model, size),
        f"disk, at most: {disk / 1e9:.2f} GB in {setup.recipe.output}",
    ]


def _at_the_peak(setup: Setup, model: nn.Module, work: Work, device: torch.device) -> dict[str, int]:
    """What is in memory at the peak, in addition to the weights and to what trains: in a step of the last
    task, or, where that takes more, in a pass over data. Turns `model` into fake tensors."""
    method, biggest = setup.method, work.pieces[-1]
    assert work.biggest, "there are pieces"
    reading = method.pass_bytes(model, biggest.tokens)
    held = method.held_bytes(model, len(work.tasks) - 1)
    activations = activation_bytes(model, work.biggest, device, biggest.front)
    if reading > activations + held:
        return {f"a pass over {biggest.tokens} tokens at a time": reading}
    found = {f"forward and backward of {biggest.tokens} tokens": activations}
    return found | {f"what {method.name} holds": held} if held else found


# If a micro-batch takes more than these seconds in a few layers, time is estimated from counted operations.
LONGEST = 20
SLOWEST = 1e9  # operations of matrix products a second; no machine that trains is slower


class Training(NamedTuple):
    """What training takes in one process: optimizer steps, tokens (padding included) and seconds; `line` is
    the plan's sentence on the seconds and how they were estimated, `outside` the one on what the method does
    before and after the steps, which is part of the seconds."""

    steps: int
    tokens: int
    seconds: float
    line: str
    outside: str = ""


def training(recipe: Recipe) -> Training:
    """What a recipe's training will take, without doing it; zeros for a method that trains nothing. Raises
    one Fault with everything that is wrong with the recipe."""
    setup = prepare(recipe)
    model = skeleton(setup)
    work = _work(setup, model)
    if not work.pieces:
        return Training(0, 0, 0.0, "nothing is trained")
    return _training(setup, model, work, own_device())


def _training(setup: Setup, model: nn.Module, work: Work, device: torch.device) -> Training:
    """The cost of training on `work`: two micro-batches are timed on a few layers, or, if that would take too
    long, operations are counted."""
    size = setup.recipe.optim.batch_size
    assert size is not None, "resolved() fills in the protocol's"
    steps = sum(task.steps(size) for task in work.tasks)
    tokens = sum(piece.tokens for piece in work.pieces)
    labelled = sum(piece.labelled for piece in work.pieces)
    squares = sum(piece.squares for piece in work.pieces)
    operations = step_flops(model, tokens, squares, labelled)
    middle = work.pieces[len(work.pieces) // 2]
    timed_pieces = (work.pieces[-1], middle)
    flops = [step_flops(model, piece.tokens, piece.squares, piece.labelled) for piece in timed_pieces]
    layers = depth(model)
    timed_flops = flops[0] * MEASURED_LAYERS[1] / sum(layers)  # of a few layers
    speed = SLOWEST
    if timed_flops / speed > LONGEST:
        speed = matmul_speed(model, work.pieces[-1].tokens, setup.dtype, device)
    if timed_flops / speed > LONGEST:
        outside = _outside_steps(setup, model, work, operations, speed)
        total = operations / speed + outside.seconds
        basis = f"{operations:.2g} operations of matrix products, {speed:.2g} a second measured here"
        line = f"time to train, at least: {duration(total)} ({basis}, one process)"
        return Training(steps, tokens, total, line, outside.line)

    def make(count: int, adapted: range | None) -> nn.Module:
        made = _small(setup, device, count, adapted)
        if packed_attention.used(model):
            packed_attention.use(made)
        return made

    batches = (work.biggest, work.pieces[-1].front), (work.typical, middle.front)
    seconds = [step_seconds(make, batch, layers, front, setup.method) for batch, front in batches]
    timed = [Timed(n, each) for n, each in zip(flops, seconds, strict=True)]
    in_steps = total_seconds(*timed, len(work.pieces), operations)
    outside = _outside_steps(setup, model, work, operations, operations / in_steps, device)
    total = in_steps + outside.seconds
    line = (
        f"time to train, estimated: {duration(total)} ({len(work.pieces):,} micro-batches; the largest "
        f"takes {timed[0].seconds:.2g} s, one of median size {timed[1].seconds:.2g} s, measured on a few "
        "layers here; one process; optimizer, loading and evaluation come on top)"
    )
    return Training(steps, tokens, total, line, outside.line)


class _Outside(NamedTuple):
    """What the method does before and after the steps of all tasks, in seconds, and the sentence on it."""

    seconds: float
    line: str


def _outside_steps(
    setup: Setup,
    model: nn.Module,
    work: Work,
    operations: float,
    speed: float,
    device: torch.device | None = None,
) -> _Outside:
    """`operations` of matrix products are those of all steps, at this `speed`, which forward passes are taken
    to have too. Generation is timed on a few layers on `device`; None: at the same speed, at least."""
    chats, found = bool(setup.tokenizer.chat_template), OutsideSteps()
    for data in work.tasks:
        lengths = [len(example) for example in data.examples]
        found = found.plus(setup.method.outside_steps(model, data.index, lengths, chats))
    if not any(found):
        return _Outside(0.0, "")
    flops = outside_flops(model, found)
    seconds = flops / speed
    parts = [
        f"forward passes over {found.tokens:,.0f} tokens with {flops:.2g} operations of matrix products, "
        f"{flops / operations:.1%} of those in steps"
    ]
    if found.decoding:
        parts.append(f"{found.decoding:,} steps of generation, {found.rows} texts at once")
        seconds += _generation(setup, model, found, speed, device)
    if found.on_host:
        parts.append(f"{found.on_host:.2g} operations in float64 on the CPU")
        seconds += found.on_host / host_speed()
    line = f"of that before and after the steps: about {duration(seconds)} ({'; '.join(parts)})"
    return _Outside(seconds, line)


def _generation(
    setup: Setup, model: nn.Module, outside: OutsideSteps, speed: float, device: torch.device | None
) -> float:
    """Seconds of the method's steps of generation; `speed` and `device` as in `_outside_steps`."""
    if device is None:
        return decoding_flops(model, outside) / speed

    make = partial(_small, setup, device)  # not packed: the run turns that on later
    return outside.decoding * decoding_seconds(make, sum(depth(model)), outside.rows)


def _small(setup: Setup, device: torch.device, count: int, adapted: range | None) -> nn.Module:
    """A model as it trains with `count` layers and random weights; `adapted` as in `skeleton`."""
    made = skeleton(setup, count, device, adapted)
    for name, layer in sites(made).items():
        layer.reset(0, name)
    return made


def _answering(setup: Setup, model: nn.Module, size: int) -> str:
    """How many tokens are decoded at once in the memory that the base's `size` weights leave free."""
    device, asked = own_device(), setup.recipe.eval.batch_tokens
    each = token_bytes(model.config, setup.dtype)
    if device.type == "cuda":
        most = affordable(model.config, setup.dtype, free_bytes(device) - size * setup.dtype.itemsize)
    else:
        most = MOST["cpu"]
    return f"answers: {asked or most:,} tokens at once, {each / 1e3:.0f} kB each, halved if memory runs out"


def _weight_bytes(setup: Setup, model: nn.Module, frozen: int) -> float:
    """Bytes of the `frozen` weights in training; those of quantised weights are computed, none is loaded."""
    kind, width = setup.recipe.model.quantization, setup.dtype.itemsize
    if not (kind and setup.method.trains):
        return frozen * width
    from codyra_llm.models.quantize import KINDS  # bitsandbytes is an extra

    packed = sum(module.weight.numel() for module in families.projections(model).values())
    return (frozen - packed) * width + packed * KINDS[kind].bits / 8

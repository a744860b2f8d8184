"""What a recipe will do, counted without training: steps, tokens, parameters, memory, disk, and one example as it is."""

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from .data import Encoded
from .models import PROJECTIONS
from .recipe import Recipe
from .setup import Setup, prepare, size
from .train import TaskData


def plan(recipe: Recipe, console: Console) -> None:
    """Print the plan of a recipe. Raises one Fault with all that is wrong with it."""
    setup = prepare(recipe)
    model = skeleton(setup)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    console.print(f"[b]{setup.recipe.model.path}[/b] ({model.config.model_type}, {total / 1e6:.1f} M parameters, "
                  f"{str(setup.dtype).removeprefix('torch.')}); method [b]{setup.method.name}[/b] trains "
                  f"{trained / 1e6:.2f} M parameters", highlight=False)
    table, example = _tasks(setup)
    console.print(table)
    if example:
        console.print(_shown(setup, example))
    for line in _estimates(setup, model, trained, total):
        console.print(line, highlight=False)


def skeleton(setup: Setup) -> nn.Module:
    """The model with its adapters, without weights (meta device)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(setup.base)).requires_grad_(False)
    if setup.method.trains:
        setup.method.attach(model)
    return model


def _tasks(setup: Setup) -> tuple[Table, Encoded | None]:
    recipe, example = setup.recipe, None
    right = {"justify": "right", "no_wrap": True}
    table = Table(Column("task", no_wrap=True), *(Column(name, **right) for name in (
                      "train", "epochs", "steps", "tokens", "labelled", "longest", "cut", "test", "new")),
                  box=SIMPLE, padding=0, collapse_padding=True,
                  title=f"{recipe.data.protocol} protocol, batch {recipe.optim.batch_size}, lr {recipe.optim.lr:g} "
                        f"{recipe.optim.schedule}, loss per {recipe.optim.loss_average}")
    for index, task in enumerate(recipe.tasks):
        tests = [str(len(setup.test(index))), str(setup.new_tokens(index))]
        if not setup.method.trains:
            table.add_row(task, *[""] * 7, *tests)
            continue
        records, epochs = setup.method.train_data(setup.stream, index)
        encoded = setup.encoder.encode(records)
        example = example or encoded[0]
        visited = [encoded[i] for epoch in epochs for i in epoch]
        table.add_row(task, str(len(records)), str(len(epochs)),
                      str(TaskData(task, index, encoded, epochs, []).steps(recipe.optim.batch_size)),
                      f"{sum(map(len, visited)):,}", f"{sum(len(e.answer) for e in visited):,}",
                      str(max(map(len, encoded))), f"{sum(e.cut for e in encoded) / len(encoded):.0%}", *tests)
    return table, example


def _shown(setup: Setup, example: Encoded) -> Text:
    """The first training example as the model sees it, labelled tokens marked."""
    decode = setup.tokenizer.decode
    return Text.assemble("first example, labelled part in green:\n", decode(example.prompt),
                         (decode(example.answer), "bold green"),
                         f"\n{len(example.prompt)} prompt tokens, {len(example.answer)} labelled: {example.answer[:12]}")


def _estimates(setup: Setup, model: nn.Module, trained: int, total: int) -> list[str]:
    """Memory: weights, adapters with gradient and two moments in float32, and what a micro-batch leaves for backward
    (per token and layer about 10 hidden and 4 intermediate vectors). Disk: updates and, if asked, the final model."""
    c, width = model.config, setup.dtype.itemsize
    tokens = setup.recipe.optim.micro_batch_tokens or (16384 if torch.cuda.is_available() else 4096)
    per_token = c.num_hidden_layers * (10 * c.hidden_size + 4 * c.intermediate_size) * width
    activations = 0 if not setup.method.trains else tokens * (
        c.hidden_size * c.num_hidden_layers * width if setup.recipe.model.gradient_checkpointing else per_token)
    weights = _weight_bytes(setup, model, total)
    memory = weights + trained * 16 + activations
    disk = len(setup.recipe.tasks) * trained * 4 + (size(setup.base) if setup.recipe.checkpoint else 0)
    return [f"memory, estimated: {memory / 1e9:.2f} GB (weights {weights / 1e9:.2f}, adapters with optimizer "
            f"{trained * 16 / 1e9:.2f}, {tokens} tokens at once {activations / 1e9:.2f})",
            f"disk, at most: {disk / 1e9:.2f} GB in {setup.recipe.output}"]


def _weight_bytes(setup: Setup, model: nn.Module, total: int) -> float:
    """Bytes of the frozen weights in training; the packed ones counted without loading any."""
    kind, width = setup.recipe.model.quantization, setup.dtype.itemsize
    if not (kind and setup.method.trains):
        return total * width
    from .quantize import KINDS  # bitsandbytes is an extra

    packed = sum(module.weight.numel() for name, module in model.named_modules()
                 if name.rpartition(".")[2] in PROJECTIONS)
    return (total - packed) * width + packed * KINDS[kind].bits / 8

"""How fast evaluation decodes: `generate_ids` in batches against transformers' `generate`, one prompt at a
time.
"""

import time
from collections.abc import Callable

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedModel

from codyra_llm.bench.measure import Options, machine, report
from codyra_llm.config.sections import DataSection
from codyra_llm.data.encoding import Encoder
from codyra_llm.data.records import read_split
from codyra_llm.evaluate.budget import MOST, STEP, batches
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.experiment.setup import base_folder, data_root
from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer

# New tokens per task, about as long as its answers, so that a row in the table costs seconds on a CPU.
NEW = {
    "C-STANCE": 4,
    "FOMC": 4,
    "NumGLUE-cm": 12,
    "NumGLUE-ds": 12,
    "ScienceQA": 24,
    "Py150": 40,
    "MeetingBank": 40,
    "20Minuten": 40,
}


def one_by_one(model: PreTrainedModel, prompts: list[list[int]], new: int, eos: int) -> list[list[int]]:
    """Greedy continuations by transformers, each up to and with EOS."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        out.append(made[0, len(prompt) :].tolist())
    return out


def batched(model: PreTrainedModel, prompts: list[list[int]], new: int, eos: int) -> list[list[int]]:
    """Greedy continuations as evaluation makes them on one rank."""
    kind, found = model.device.type, {}
    for chosen in batches([len(p) for p in prompts], new, MOST[kind], STEP[kind]):
        found.update(zip(chosen, generate_ids(model, [prompts[i] for i in chosen], new, eos), strict=True))
    return [found[i] for i in range(len(prompts))]


ARMS: dict[str, Callable] = {"one by one": one_by_one, "ours": batched}


def measure(options: Options) -> dict:
    """The first `examples` test prompts of each task, the end of each up to `tokens` (default 256) tokens
    long.

    Seconds are wall-clock, decoding alone; `flipped` counts prompts whose ids are not those of one-by-one
    decoding.
    """
    folder = base_folder(options.model or "mini")
    model, tokenizer = loading.load(folder, options.dtype).to(options.device).eval(), load_tokenizer(folder)
    longest, root = options.tokens or 256, data_root(options.data)
    encoder = Encoder(
        tokenizer, DataSection(root=options.data, max_prompt_tokens=longest, max_answer_tokens=2)
    )
    rows = {}
    for task in options.tasks or NEW:
        records = read_split(root, task, "test")[: options.examples]
        encoded = encoder.prompts([record["prompt"] for record in records])
        prompts = [ids for ids, _ in encoded]
        rows[task] = _task(model, prompts, NEW.get(task, 40), tokenizer.eos_token_id)
    total = dict.fromkeys(next(iter(rows.values())), 0)
    for row in rows.values():
        total = {key: value + row[key] for key, value in total.items()}
    return {
        "level": "eval",
        "machine": machine(options),
        "tasks": {**rows, "all": total},
        "shape": [folder.name, f"{options.examples} prompts per task", f"of at most {longest} tokens"],
        "notes": [
            "one by one: transformers' generate on one prompt at a time; ours: batches of like length, "
            "finished rows leave, a shared prefix is encoded once",
            f"new tokens: {', '.join(f'{task} {NEW.get(task, 40)}' for task in rows)}, or up to EOS",
        ],
    }


def _task(model: PreTrainedModel, prompts: list[list[int]], new: int, eos: int) -> dict:
    """The row of one task: seconds of each arm, and how many answers differ between the arms."""
    row = {"prompts": len(prompts), "prompt_tokens": sum(map(len, prompts))}
    found = {}
    for name, arm in ARMS.items():
        arm(model, [prompts[0][:8]], 2, eos)  # first calls allocate
        began = time.perf_counter()
        found[name] = arm(model, prompts, new, eos)
        row[f"{name}, seconds"] = time.perf_counter() - began
    first, ours = found.values()
    return {
        **row,
        "new_tokens": sum(map(len, first)),
        "flipped": sum(a != b for a, b in zip(first, ours, strict=True)),
    }


def show(result: dict, console: Console) -> None:
    """One line per task."""
    right = {"justify": "right", "no_wrap": True}
    table = Table(
        Column("task", no_wrap=True),
        *(
            Column(name, **right)
            for name in (
                "times as fast",
                "one by one, s",
                "ours, s",
                "prompt tokens",
                "new tokens",
                "flipped",
            )
        ),
        box=SIMPLE,
        padding=0,
        collapse_padding=True,
        title=" ".join(["eval", *result["shape"]]),
    )
    for task, row in result["tasks"].items():
        slow, fast = row["one by one, seconds"], row["ours, seconds"]
        table.add_row(
            task,
            f"{slow / fast:.2f}",
            f"{slow:.1f}",
            f"{fast:.1f}",
            str(row["prompt_tokens"]),
            str(row["new_tokens"]),
            f"{row['flipped']} of {row['prompts']}",
        )
    console.print(table)
    report(result, console)

"""How fast evaluation decodes: `generate_ids` in batches against transformers' `generate`, one prompt at a time."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from codyra_llm import models
from codyra_llm.data import Encoder
from codyra_llm.evaluate.generate import CPU, GPU, batches, generate_ids
from codyra_llm.examples import read_split
from codyra_llm.recipe import DataSection

# New tokens per task, about as long as its answers, so that a row in the table costs seconds on a CPU.
NEW = {"C-STANCE": 4, "FOMC": 4, "NumGLUE-cm": 12, "NumGLUE-ds": 12, "ScienceQA": 24, "Py150": 40, "MeetingBank": 40,
       "20Minuten": 40}


def one_by_one(model: PreTrainedModel, prompts: list[list[int]], new: int, eos: int) -> list[list[int]]:
    """Greedy continuations by transformers, each up to and with EOS."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                              num_beams=1, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
                              eos_token_id=eos, pad_token_id=eos)
        out.append(made[0, len(prompt):].tolist())
    return out


def batched(model: PreTrainedModel, prompts: list[list[int]], new: int, eos: int) -> list[list[int]]:
    """Greedy continuations as evaluation makes them on one rank."""
    tokens, step = GPU if model.device.type == "cuda" else CPU
    found: dict[int, list[int]] = {}
    for chosen in batches([len(p) for p in prompts], new, tokens, step):
        found.update(zip(chosen, generate_ids(model, [prompts[i] for i in chosen], new, eos)))
    return [found[i] for i in range(len(prompts))]


ARMS: dict[str, Callable] = {"transformers, one by one": one_by_one, "batched": batched}


def measure(model_folder: Path, data_root: Path, examples: int = 8, new: dict[str, int] = NEW, max_prompt: int = 256,
            dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[dict]:
    """One row per task and arm, on the first `examples` test prompts of each task in `new`.

    A row has task, arm, seconds (wall-clock, decoding alone), tokens_per_s (new tokens), ratio (speed over the first
    arm's), identical (all ids equal the first arm's) and flipped (prompts whose ids do not).
    """
    model = models.load(model_folder, dtype).to(device).eval()
    tokenizer = models.load_tokenizer(model_folder)
    encoder = Encoder(tokenizer, DataSection(root=str(data_root), max_prompt_tokens=max_prompt, max_answer_tokens=2))
    rows = []
    for task, limit in new.items():
        records = read_split(data_root, task, "test")[:examples]
        prompts = [encoder.prompt(record["prompt"])[0] for record in records]
        first = None
        for name, arm in ARMS.items():
            arm(model, [prompts[0][:8]], 2, tokenizer.eos_token_id)  # first calls allocate and compile
            began = time.perf_counter()
            found = arm(model, prompts, limit, tokenizer.eos_token_id)
            seconds = time.perf_counter() - began
            first = first or (seconds, found)
            flipped = sum(a != b for a, b in zip(found, first[1]))
            rows.append({"task": task, "arm": name, "seconds": seconds, "tokens_per_s": sum(map(len, found)) / seconds,
                         "ratio": first[0] / seconds, "identical": not flipped, "flipped": flipped})
    return rows

"""Models, exports of them, and what a reader must find in each: `exports.py FOLDER [MODELS]`, by this
project's own environment. MODELS holds the folders of `codyra-llm model get`: smollm2-135m and gemma3-270m.

FOLDER/<model>/ gets the base, the exports and expected.json with expected.npz: prompts, their tokens, and for
each export the logits of the base with its updates in float32 and the greedy answers. They are computed from
base and updates, never from what was exported.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from adapters import recipe
from safetensors.torch import load_file, save_file
from tiny import SIZES, save_tiny
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
)

from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.experiment.export import write_gguf_folder, write_merged, write_peft
from codyra_llm.experiment.setup import Setup, prepare
from codyra_llm.lora.merge import stored_weight
from codyra_llm.lora.one_adapter import one_adapter
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.models import loading
from codyra_llm.models.saved import published_config
from codyra_llm.models.weights import WeightReader
from codyra_llm.store.archive import Archive

PROMPTS = [
    "In the year 1969, the first man walked on the",
    "Question: what is the capital of France?\nAnswer:",
    "def add(a, b):\n    return",
    "The hikers turned back before the storm, since the path was steep; " * 3 + "so the",  # past windows
]
NEW = 16  # tokens of an answer
CUT = 4  # the rank of `peft --rank`
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TINY = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16}  # GGUF knows no other scale


def tiny_llama(folder: Path) -> Path:
    return save_tiny(folder, LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=SCALED))


def tiny_gemma2(folder: Path) -> Path:
    return save_tiny(folder, Gemma2ForCausalLM, Gemma2Config(**SIZES, **TINY))


def tiny_gemma3(folder: Path) -> Path:
    sizes = SIZES | {"num_hidden_layers": 6}  # the first layer of full attention is the sixth
    return save_tiny(folder, Gemma3ForCausalLM, Gemma3TextConfig(**sizes, **TINY))


def tiny_whole_gemma3(folder: Path) -> Path:
    """As Gemma 3 from 4B on: with a vision tower, and positions of full layers stretched eightfold."""
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 1e4}
    sizes = SIZES | TINY | {"num_hidden_layers": 6}
    ropes = {"full_attention": rope, "sliding_attention": local}
    eyes = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**sizes, rope_parameters=ropes),
        vision_config=SiglipVisionConfig(hidden_size=16, intermediate_size=32, **eyes),
        mm_tokens_per_image=1,
        image_token_index=260,
    )
    save_tiny(folder, Gemma3ForConditionalGeneration, config)
    file = folder / "model.safetensors"
    named = {published_name(name): weight for name, weight in load_file(file).items()}
    save_file(named, file, {"format": "pt"})
    return folder


def published_name(name: str) -> str:
    """Of a weight of the vision tower, which transformers 5 stores without a part of its name."""
    own = name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model.")
    return name.replace("vision_tower.", "vision_tower.vision_model.") if own else name


MADE: dict[str, Callable[[Path], Path]] = {
    "tiny LLaMA 3": tiny_llama,
    "tiny Gemma 2": tiny_gemma2,
    "tiny Gemma 3": tiny_gemma3,
    "tiny Gemma 3 with vision": tiny_whole_gemma3,
}
REAL = {"SmolLM2-135M": "smollm2-135m", "Gemma 3 270M": "gemma3-270m"}


def publish(folder: Path) -> None:
    """Give a base that transformers 5 saved the config that published ones have."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if "text_config" in config:
        config["text_config"] = published_config(config["text_config"])
    else:
        config = published_config(config)
    file.write_text(json.dumps(config))
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(told))


def updates(base: Path, folder: Path, size: float) -> Archive:
    """Two tasks' updates of ranks 1 to 4 that differ from site to site, `size` of the weight's norm."""
    archive, draw = Archive(folder, "base"), torch.Generator().manual_seed(0)
    reader = WeightReader(base)
    names = [name for name in reader.handle_of if name.endswith("_proj.weight")]
    for step, task in enumerate(("ONE", "TWO")):
        adapters = {}
        for number, name in enumerate(names):
            weight, rank = reader.get(name).float(), 1 + (number + step) % 4
            a = torch.randn(rank, weight.shape[1], generator=draw)
            b = torch.randn(weight.shape[0], rank, generator=draw)
            b *= size * weight.norm() / (b @ a).norm()
            adapters[name.removesuffix(".weight")] = Adapter(a, b, None)
        archive.append(task, Update(adapters, 1.0))
    return archive


def reference(setup: Setup, terms: list[Update], dtype: torch.dtype | None) -> PreTrainedModel:
    """Base with updates in float32, each weight rounded to `dtype` (None: the stored) as in its export."""
    model, reader = loading.load(setup.base, torch.float32), WeightReader(setup.base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = reader.get(name)
            kept = dtype or stored.dtype
            single = dtype == torch.float16 and stored.ndim < 2  # norms stay float32 in a GGUF file
            whole = stored_weight(name, stored.float(), terms)
            parameter.copy_(whole if single else whole.to(kept))
    return model.eval()


def low_rank(terms: list[Update], rank: int | None) -> list[Update]:
    one = one_adapter(terms, rank)
    return [Update({site: Adapter(a, b, None) for site, (a, b) in one.factors.items()}, 1.0)]


def make(name: str, folder: Path, models: Path | None) -> None:
    base = folder / "base"
    if name in MADE:
        publish(MADE[name](base))
    else:
        shutil.copytree(models / REAL[name], base)
    stream = folder / "data"
    for task in ("ONE", "TWO", "THREE"):
        (stream / task).mkdir(parents=True)
        for split in ("train", "eval", "test"):
            rows = [{"prompt": f"{split} {number}", "answer": "B"} for number in range(2)]
            (stream / task / f"{split}.json").write_text(json.dumps(rows))
    asked = recipe(base.resolve(), stream, folder / "run", {"name": "olora"})
    setup = prepare(asked.model_copy(update={"model": asked.model.model_copy(update={"dtype": "float32"})}))
    archive = updates(base, folder / "updates", 0.3 if name in MADE else 0.02)
    terms = archive.terms(1)
    write_merged(setup, archive, 1, None, folder / "merged")
    write_peft(setup, archive, 1, None, folder / "peft")
    write_peft(setup, archive, 1, None, folder / "peft-rank", rank=CUT)
    file = write_gguf_folder(setup, archive, 1, None, folder / "gguf")
    file.rename(folder / "gguf" / "model.gguf")
    made = {
        "merged": (terms, None),
        "peft": (terms, torch.float32),
        "peft-rank": (low_rank(terms, CUT), torch.float32),
        "gguf": (terms, torch.float16),
    }
    ids = [setup.encoder.prompt(text)[0] for text in PROMPTS]
    expected, arrays = {"prompts": PROMPTS, "ids": ids, "new": NEW, "answers": {}}, {}
    expected["ends"] = sorted(setup.encoder.ends)
    for export, (updated, dtype) in made.items():
        model = reference(setup, updated, dtype)
        with torch.no_grad():
            for number, row in enumerate(ids):
                arrays[f"{export}-{number}"] = model(torch.tensor([row])).logits[0].numpy()
        expected["answers"][export] = [generate_ids(model, [row], NEW, [])[0] for row in ids]
    np.savez(folder / "expected.npz", **arrays)
    (folder / "expected.json").write_text(json.dumps(expected))


def main(folder: Path, models: Path | None) -> None:
    for name in [*MADE, *(REAL if models else [])]:
        make(name, folder / name.replace(" ", "-"), models)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)

"""Read a model's exports by whatever transformers and PEFT are installed: `read_transformers.py FOLDER`, one
that exports.py wrote. Prints JSON: by export and reader how far logits are off and whether tokens and greedy
answers are the same. Imports nothing of this project."""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def plain(folder, **given):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)


READERS = {
    ("merged", "transformers"): lambda folder: plain(folder / "merged"),
    ("peft", "transformers"): lambda folder: plain(folder / "peft"),  # which finds the base by the adapter
    ("peft-rank", "transformers"): lambda folder: plain(folder / "peft-rank"),
    ("gguf", "transformers"): lambda folder: plain(folder / "gguf", gguf_file="model.gguf"),
    ("peft", "peft"): lambda folder: PeftModel.from_pretrained(plain(folder / "base"), folder / "peft"),
    ("peft-rank", "peft"): lambda folder: PeftModel.from_pretrained(
        plain(folder / "base"), folder / "peft-rank"
    ),
}


def compare(folder, export, model, expected, logits):
    """What a reader makes of an export, against what it should."""
    off, same = 0.0, True
    for number, row in enumerate(expected["ids"]):
        ids = torch.tensor([row])
        with torch.no_grad():
            found = model(input_ids=ids).logits[0].numpy()
        off = max(off, float(np.abs(found - logits[f"{export}-{number}"]).max()))
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=expected["new"],
            min_new_tokens=expected["new"],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        same = same and made[0, len(row) :].tolist() == expected["answers"][export][number]
    given = {"gguf_file": "model.gguf"} if export == "gguf" else {}
    tokenizer = AutoTokenizer.from_pretrained(folder / export, **given)
    tokens = [tokenizer(text)["input_ids"] for text in expected["prompts"]] == expected["ids"]
    return {"logits": off, "answers": same, "tokens": tokens}


def main(folder):
    expected = json.loads((folder / "expected.json").read_text())
    logits = np.load(folder / "expected.npz")
    rows = {"transformers": transformers.__version__, "peft": peft.__version__, "cells": []}
    for (export, reader), read in READERS.items():
        try:
            found = compare(folder, export, read(folder).eval(), expected, logits)
        except Exception as error:  # what a reader refuses is a figure of the matrix, with its words
            found = {"error": " ".join(str(error).split())[:200]}
        rows["cells"].append({"export": export, "reader": reader, **found})
    print(json.dumps(rows))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]))

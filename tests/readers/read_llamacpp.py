"""Read a model's GGUF export by llama.cpp's engine: `read_llamacpp.py FOLDER`, one that exports.py wrote.
Prints JSON: how far the log-probabilities of the likeliest next tokens are off, and whether tokens and greedy
answers are the same. Imports nothing of this project."""

import json
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xllamacpp

TOP = 10  # next tokens whose log-probabilities are compared


def serve(file):
    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.n_parallel = str(file), 256, 1
    given.warmup, given.port, given.verbosity, given.cpuparams.n_threads = False, 0, 0, 2
    return xllamacpp.Server(given)


def ask(server, route, body):
    request = urllib.request.Request(
        server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def next_logs(server, row):
    """By token the log-probabilities of the likeliest next ones; none where the likeliest is a part of a
    character, of which the server tells no probabilities."""
    wanted = {"prompt": row, "n_predict": 1, "temperature": 0, "n_probs": TOP, "cache_prompt": False}
    told = ask(server, "/completion", wanted | {"ignore_eos": True}).get("completion_probabilities", [])
    return {item["id"]: item["logprob"] for place in told for item in place["top_logprobs"]}


def up_to_end(tokens, ends):
    """An answer without what ended it: the engine does not go on after that."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def main(folder):
    expected, logits = json.loads((folder / "expected.json").read_text()), np.load(folder / "expected.npz")
    server = serve(folder / "gguf" / "model.gguf")
    off, same, tokens = [], True, True
    for number, (text, row) in enumerate(zip(expected["prompts"], expected["ids"], strict=True)):
        found = ask(server, "/tokenize", {"content": text, "add_special": True})["tokens"]
        tokens = tokens and found == row
        wanted = {"prompt": row, "n_predict": expected["new"], "temperature": 0, "return_tokens": True}
        made = ask(server, "/completion", wanted | {"cache_prompt": False})["tokens"]
        answer = expected["answers"]["gguf"][number]
        same = same and up_to_end(made, expected["ends"]) == up_to_end(answer, expected["ends"])
        last = logits[f"gguf-{number}"][-1].astype(np.float64)
        logs = last - last.max() - np.log(np.exp(last - last.max()).sum())
        off += [abs(log - logs[token]) for token, log in next_logs(server, row).items()]
    cell = {"export": "gguf", "reader": "llama.cpp", "logits": float(max(off))}
    cell |= {"answers": same, "tokens": tokens}
    print(json.dumps({"xllamacpp": version("xllamacpp"), "cells": [cell]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

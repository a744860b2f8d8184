"""Greedy generation against transformers' own, one prompt at a time, and with a stub in vLLM's place."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.sections import DataSection
from codyra_llm.core.errors import Fault
from codyra_llm.data.encoding import Encoder
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.evaluate.vllm import vllm_answers
from codyra_llm.experiment import run
from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer

SEED = 2


FAMILIES = ["tiny_llama", "tiny_gemma2", "tiny_gemma3"]


def prompts(lengths, prefix=()):
    drawn = torch.Generator().manual_seed(SEED)
    return [[*prefix, *torch.randint(4, 300, (n,), generator=drawn).tolist()] for n in lengths]


@pytest.fixture(params=FAMILIES)
def model(request):
    return loading.load(request.getfixturevalue(request.param), torch.float32).eval()


@pytest.fixture
def vllm_stub(monkeypatch):
    """A module `vllm` that notes what it is given and answers by the torch decoder."""
    seen = SimpleNamespace(engines=[], params=[], prompts=0, shut=0)

    class LLM:
        def __init__(self, model, **options):
            self.model = loading.load(Path(model), getattr(torch, options["dtype"])).eval()
            # Or vLLM refuses to start.
            assert options["max_model_len"] <= self.model.config.max_position_embeddings
            seen.engines.append(
                {**options, "folder": Path(model), "files": {f.name for f in Path(model).iterdir()}}
            )
            self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))

        def shutdown(self):
            seen.shut += 1

        def generate(self, prompts, params, use_tqdm):
            ids = [p["prompt_token_ids"] for p in prompts]
            assert max(map(len, ids)) + params["max_tokens"] <= seen.engines[-1]["max_model_len"]
            seen.params.append(params)
            made = [
                generate_ids(self.model, [p], params["max_tokens"], *params["stop_token_ids"])[0] for p in ids
            ]
            return [SimpleNamespace(outputs=[self.output(row, params)]) for row in made]

        def output(self, row, params):
            """As vLLM's scheduler, which looks whether an answer is as long as it may be before it looks for
            an end."""
            reason = "length" if len(row) == params["max_tokens"] else "stop"
            return SimpleNamespace(token_ids=tuple(row), finish_reason=reason)

    stub = ModuleType("vllm")
    stub.__spec__, stub.LLM, stub.SamplingParams = ModuleSpec("vllm", None), LLM, dict
    monkeypatch.setitem(sys.modules, "vllm", stub)
    return seen


def recipe(model, stream, out, backend):
    return parse_recipe(
        {
            "model": {"path": str(model)},
            "data": {"root": str(stream), "tasks": ["ONE", "THREE"], "epochs": 1},
            "method": {"name": "seqlora", "rank": 4},
            "optim": {"lr": 1e-4, "batch_size": 8},
            "output": str(out),
            "eval": {"max_new_tokens": {"ONE": 3, "THREE": 5}, "backend": backend},
            "checkpoint": False,
        }
    )


def test_vllm_gets_the_evaluated_weights_and_the_same_prompts(vllm_stub, tiny_llama, toy_stream, tmp_path):
    by_torch, by_vllm = (
        run.run(recipe(tiny_llama, toy_stream, tmp_path / name, name)) for name in ("torch", "vllm")
    )
    for mine, other in zip(
        sorted((by_torch.path / "predictions").rglob("*.jsonl")),
        sorted((by_vllm.path / "predictions").rglob("*.jsonl")),
        strict=True,
    ):
        assert mine.name == other.name and mine.read_text() == other.read_text()
        assert any(json.loads(line)["prediction"] for line in mine.read_text().splitlines())
    assert by_torch.scores == by_vllm.scores and all(row.cut is not None for row in by_torch.scores)
    assert len(vllm_stub.engines) == vllm_stub.shut == 2
    for engine in vllm_stub.engines:
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= engine["files"]
        assert engine["tokenizer"] == str(engine["folder"]) and not engine["folder"].parent.exists()
        assert (engine["dtype"], engine["seed"]) == ("float32", 1234)
    assert [p["max_tokens"] for p in vllm_stub.params] == [3, 3, 5]
    assert all(
        p["temperature"] == 0 and p["stop_token_ids"] == [2] and p["ignore_eos"] for p in vllm_stub.params
    )


@pytest.mark.parametrize(
    "ids, reason, cut",
    [
        ((5, 6, 7), "length", True),
        ((5, 6, 2), "length", False),  # ended by the last token that it may have
        ((5, 2), "stop", False),
        ((5,), "stop", False),  # an engine that leaves the end out
    ],
)
def test_which_answers_of_vllm_are_cut(vllm_stub, tiny_llama, ids, reason, cut):
    section = DataSection(root="-", max_prompt_tokens=64, max_answer_tokens=8)
    encoder = Encoder(load_tokenizer(tiny_llama), section, frozenset([2]))
    output = SimpleNamespace(token_ids=ids, finish_reason=reason)
    engine = SimpleNamespace(generate=lambda prompts, *_, **__: [SimpleNamespace(outputs=[output])])
    assert [answer.cut for answer in vllm_answers(engine, encoder, ["Say:"], 3)] == [cut]


def test_vllm_is_refused_where_it_is_not_installed(tiny_llama, toy_stream, tmp_path, monkeypatch):
    monkeypatch.setattr("codyra_llm.evaluate.vllm.find_spec", lambda name: None)
    with pytest.raises(Fault, match=r"vllm is not installed; .* or set eval.backend=torch$"):
        run.run(recipe(tiny_llama, toy_stream, tmp_path / "run", "vllm"))
    assert not (tmp_path / "run").exists()

"""Greedy generation against transformers' own, one prompt at a time, and with a stub in vLLM's place."""

import json
import sys
import weakref
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from codyra_llm.bench import evaluation
from codyra_llm.bench.measure import Options
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.sections import DataSection
from codyra_llm.core.errors import Fault
from codyra_llm.data.encoding import Encoder
from codyra_llm.evaluate import generate
from codyra_llm.evaluate.generate import batches, generate_ids, shared_prefix
from codyra_llm.experiment import run
from codyra_llm.experiment.backends import torch_answering
from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer

NEW, SEED = 24, 2
FAMILIES = ["tiny_llama", "tiny_gemma2", "tiny_gemma3"]


def prompts(lengths, prefix=()):
    drawn = torch.Generator().manual_seed(SEED)
    return [[*prefix, *torch.randint(4, 300, (n,), generator=drawn).tolist()] for n in lengths]


def cut(row, eos):
    return row[: row.index(eos) + 1] if eos in row else row


def test_the_model_is_let_go_with_the_answers():
    """The next model comes while `ask` is still at hand."""
    model = torch.nn.Linear(1, 1)
    held, setup = weakref.ref(model), SimpleNamespace(stage=lambda *_, models=[model]: (models.pop(), None))
    with torch_answering(Accelerator(), setup, None, 0) as ask:
        del model
        assert held() is not None
    assert held() is None and callable(ask)


def alone(model, batch):
    """What transformers gives for each prompt alone, all NEW tokens."""
    masks = [torch.ones(1, len(p), dtype=torch.long) for p in batch]
    return [
        model.generate(
            input_ids=torch.tensor([p]),
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(p) :].tolist()
        for p, mask in zip(batch, masks, strict=True)
    ]


def a_token_that_ends_some(rows):
    """An id that the model gives at three or more different steps, and never for some prompts: it serves as
    EOS.
    """

    def steps(token):
        return len({row.index(token) for row in rows if token in row}) * any(token not in row for row in rows)

    best = max({token for row in rows for token in row}, key=steps)
    assert steps(best) >= 3
    return best


@pytest.fixture(params=FAMILIES)
def model(request):
    return loading.load(request.getfixturevalue(request.param), torch.float32).eval()


@pytest.fixture
def widths(model):
    """(rows, tokens) of every forward pass of the model."""
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def test_equals_transformers_in_a_batch_and_alone(model, widths):
    """Prompts on both sides of the sliding windows of 16, answers that cross them, EOS at different steps."""
    batch = prompts([1, 2, 3, 5, 7, 9, 11, 15, 16, 17, 20, 24, 28, 30, 41, 41])
    free = alone(model, batch)
    eos = a_token_that_ends_some(free)
    width = max(map(len, batch))
    ids, mask = (
        torch.tensor([[0] * (width - len(p)) + row for p, row in zip(batch, rows, strict=True)])
        for rows in (batch, [[1] * len(p) for p in batch])
    )
    full = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=eos,
        pad_token_id=0,
    )[:, width:].tolist()
    expected = [cut(row, eos) for row in free]
    assert [cut(row, eos) for row in full] == expected
    widths.clear()
    assert generate_ids(model, batch, NEW, eos) == expected
    rows = [n for n, _ in widths]
    done = sum(len(row) < NEW for row in expected)
    assert rows[0] == 16 and rows == sorted(rows, reverse=True) and (rows[-1] < 16) == (done >= 4)
    assert [generate_ids(model, [p], NEW, eos)[0] for p in batch] == expected


def test_stops_when_all_are_done(model, widths):
    batch = prompts([5, 5])
    first = alone(model, batch[:1])[0][:1]
    widths.clear()
    assert generate_ids(model, batch[:1], NEW, *first) == [first] and len(widths) == 1
    assert [len(row) for row in generate_ids(model, batch, 1, -1)] == [1, 1]


@pytest.mark.parametrize(
    "family, window", [("tiny_llama", None), *((f, w) for f in FAMILIES[1:] for w in (16, 256))]
)
def test_a_shared_prefix_changes_nothing(family, window, request, monkeypatch):
    """With windows of 16 the pads between prefix and rest would move it out of sight, so nothing is shared
    there.
    """
    model = loading.load(request.getfixturevalue(family), torch.float32).eval()
    if window:
        model.config.sliding_window = window
    for layer in model.model.layers:
        if getattr(layer.self_attn, "sliding_window", None):
            layer.self_attn.sliding_window = window
    batch = prompts([1, 2, 4, 7, 9, 12, 15, 19, 23, 30], prefix=range(10, 40))
    free = alone(model, batch)
    eos = a_token_that_ends_some(free)
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared = generate_ids(model, batch, NEW, eos)
    assert seen[0] == ((10, 60) if window == 16 else (1, 30))
    monkeypatch.setattr(generate, "shared_prefix", lambda *args: 0)
    assert shared == generate_ids(model, batch, NEW, eos) == [cut(row, eos) for row in free]


def test_when_a_prefix_is_shared():
    head = list(range(20))
    assert shared_prefix([head + [1, 2], head + [3]], 4, []) == 20
    assert shared_prefix([head, head + [3]], 4, []) == 19  # every prompt keeps a token of its own
    assert shared_prefix([head, head], 4, [24]) == 19 and shared_prefix([head, head], 4, [24, 23]) == 0
    assert shared_prefix([head + [1]], 4, []) == 0  # nothing is saved
    assert shared_prefix([head[:16], head[:16]], 4, []) == 0  # 15 tokens
    assert shared_prefix([head + [1] * 200, head + [2] * 200], 4, []) == 0  # 20 of 440 tokens
    assert shared_prefix([head, [5] + head], 4, []) == 0


def test_batches_keep_to_the_budget_and_pad_little():
    lengths = [int(n) for n in torch.randint(5, 200, (300,), generator=torch.Generator().manual_seed(0))]
    for tokens, new, step in ((600, 10, 1000), (10**6, 10, 3), (1000, 4, 5)):
        cut = list(batches(lengths, new, tokens, step))
        assert sorted(i for batch in cut for i in batch) == list(range(300))
        inner = [[lengths[i] for i in batch] for batch in cut]
        assert [n for batch in inner for n in batch] == sorted(lengths, reverse=True)
        for batch, following in zip(inner, [*inner[1:], None], strict=True):
            assert (batch[0] + new) * len(batch) <= tokens and sum(batch[0] - n for n in batch) <= step * new
            if following:  # the next one would have been too much
                more = [*batch, following[0]]
                assert (more[0] + new) * len(more) > tokens or sum(more[0] - n for n in more) > step * new
    assert list(batches([50, 40], 1, 10, 0)) == [[0], [1]] and list(batches([], 1, 10, 0)) == []


def test_ranks_share_the_work_and_repeated_prompts_are_answered_once(tiny_llama, monkeypatch):
    model, tokenizer = loading.load(tiny_llama, torch.float32).eval(), load_tokenizer(tiny_llama)
    encoder = Encoder(tokenizer, DataSection(root="-", max_prompt_tokens=64, max_answer_tokens=8))
    texts = [
        "What is the stance",
        "Answer: 7",
        "How many pens?",
        "Answer: 7",
        "Write a summary of the meeting",
    ]
    everywhere, parts = generate.answers(Accelerator(cpu=True), model, encoder, texts, 6), []
    monkeypatch.setattr(
        generate, "gather_object", lambda own: parts.append(own) or [(i, "") for i in range(4)]
    )
    for rank in range(2):
        acc = SimpleNamespace(device=torch.device("cpu"), num_processes=2, process_index=rank)
        generate.answers(acc, model, encoder, texts, 6, tokens=16)
    assert [len(own) for own in parts] == [2, 2]
    found = dict(parts[0] + parts[1])
    assert [found[i] for i in (0, 1, 2, 1, 3)] == everywhere and any(everywhere)


def test_the_benchmark_counts_what_differs(tiny_llama, toy_stream, monkeypatch, capsys):
    options = Options(
        torch.device("cpu"),
        torch.float32,
        model=str(tiny_llama),
        data=str(toy_stream),
        examples=4,
        tasks=("ONE", "THREE"),
    )
    found = evaluation.measure(options)["tasks"]
    assert list(found) == ["ONE", "THREE", "all"]
    assert [(row["prompts"], row["flipped"]) for row in found.values()] == [(4, 0), (4, 0), (8, 0)]
    assert found["all"]["ours, seconds"] == pytest.approx(
        sum(found[task]["ours, seconds"] for task in ("ONE", "THREE"))
    )
    monkeypatch.setitem(evaluation.ARMS, "ours", lambda *args: [[-1], *evaluation.batched(*args)[1:]])
    result = evaluation.measure(options)
    assert [row["flipped"] for row in result["tasks"].values()] == [1, 1, 2]
    evaluation.show(result, Console())
    assert "2 of 8" in capsys.readouterr().out


@pytest.fixture
def vllm_stub(monkeypatch):
    """A module `vllm` that notes what it is given and answers by the torch decoder."""
    seen = SimpleNamespace(engines=[], params=[], prompts=0, shut=0)

    class LLM:
        def __init__(self, model, **options):
            self.model = loading.load(Path(model), getattr(torch, options["dtype"])).eval()
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
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(row))]) for row in made]

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
    assert len(vllm_stub.engines) == vllm_stub.shut == 2
    for engine in vllm_stub.engines:
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= engine["files"]
        assert engine["tokenizer"] == str(engine["folder"]) and not engine["folder"].parent.exists()
        assert (engine["dtype"], engine["seed"]) == ("float32", 1234)
    assert [p["max_tokens"] for p in vllm_stub.params] == [3, 3, 5]
    assert all(
        p["temperature"] == 0 and p["stop_token_ids"] == [2] and p["ignore_eos"] for p in vllm_stub.params
    )


def test_vllm_is_refused_where_it_is_not_installed(tiny_llama, toy_stream, tmp_path, monkeypatch):
    monkeypatch.setattr("codyra_llm.evaluate.vllm.find_spec", lambda name: None)
    with pytest.raises(Fault, match=r"vllm is not installed; .* or set eval.backend=torch$"):
        run.run(recipe(tiny_llama, toy_stream, tmp_path / "run", "vllm"))
    assert not (tmp_path / "run").exists()

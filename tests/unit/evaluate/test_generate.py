"""Greedy generation against transformers' own, one prompt at a time, and with a stub in vLLM's place."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from codyra_llm.bench import evaluation
from codyra_llm.bench.measure import Options
from codyra_llm.config.sections import DataSection
from codyra_llm.data.encoding import Encoder
from codyra_llm.evaluate import generate
from codyra_llm.evaluate.budget import batches
from codyra_llm.evaluate.generate import generate_ids, shared_prefix
from codyra_llm.experiment.experiment import Experiment, torch_answering
from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer
from codyra_llm.store.rows import Stage

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
    held, models = weakref.ref(model), [model]
    setup = SimpleNamespace(load_stage=lambda *_: (models.pop(), None))
    with torch_answering(Experiment(setup, None, Accelerator(), None), Stage(1, "ONE")) as ask:
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
    assert [found[i] for i in (0, 1, 2, 1, 3)] == everywhere and any(answer.text for answer in everywhere)


def test_an_answer_that_did_not_end_is_cut(tiny_llama):
    """Against the token ids: one that ends at the very last token that it may have is whole."""
    model, tokenizer = loading.load(tiny_llama, torch.float32).eval(), load_tokenizer(tiny_llama)
    section = DataSection(root="-", max_prompt_tokens=64, max_answer_tokens=8)
    texts = ["What is the stance", "Answer: 7", "How many pens?", "Write a summary of the meeting"]
    free = [generate_ids(model, [ids], NEW, [])[0] for ids, _ in Encoder(tokenizer, section).prompts(texts)]
    end = a_token_that_ends_some(free)
    encoder = Encoder(tokenizer, section, frozenset([end]))
    last = next(row.index(end) for row in free if end in row) + 1
    for new in (last - 1, last, NEW):
        found = generate.answers(Accelerator(cpu=True), model, encoder, texts, new)
        assert [answer.cut for answer in found] == [end not in row[:new] for row in free]
        assert [answer.text for answer in found] == encoder.texts([cut(row[:new], end) for row in free])


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

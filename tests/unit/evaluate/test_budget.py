"""How many tokens are decoded at once, and what happens when they are too many."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from full_memory import ERRORS
from transformers import Gemma2Config, GemmaConfig, LlamaConfig

from codyra_llm.config.sections import DataSection
from codyra_llm.core.errors import Fault
from codyra_llm.data.encoding import Encoder
from codyra_llm.evaluate import budget, generate
from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer

LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
GEMMA_2B = GemmaConfig(
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=256,
)
TEXTS = ["What is the stance", "Answer: 7", "How many pens?", "Write a summary", "Say something else", "No"]


@pytest.mark.parametrize(
    "config, cache", [(LLAMA_2_7B, 524288), (LLAMA_3_8B, 131072), (GEMMA_2B, 2 * 18 * 256 * 2)]
)
def test_bytes_of_a_token(config, cache):
    activations = (8 * config.hidden_size + 3 * config.intermediate_size) * 2
    assert budget.token_bytes(config, torch.bfloat16) == cache + activations


JOINED_7B = 32 * 4096 * 3 * 4096 * 2  # bytes of all queries', keys' and values' weights: 3.2 GB


def test_half_of_the_free_memory_is_used_and_never_more_than_pays():
    free = 60 << 30
    tokens = budget.affordable(LLAMA_2_7B, torch.bfloat16, free)
    assert tokens < 131072 and tokens * 524288 < free / 2
    each = budget.token_bytes(LLAMA_2_7B, torch.bfloat16)
    assert tokens == (free - JOINED_7B) // 2 // each, "recorded steps hold weights once more"
    assert budget.affordable(LLAMA_3_8B, torch.bfloat16, 200 << 30) == 131072
    assert budget.affordable(LLAMA_3_8B, torch.bfloat16, -5) == 1


@pytest.mark.parametrize("free, joined", [(60 << 30, True), (8 * JOINED_7B, True), (2 << 30, False)])
def test_weights_are_joined_where_they_take_an_eighth_of_the_free_memory_at_most(free, joined, monkeypatch):
    monkeypatch.setattr(budget, "free_bytes", lambda device: free)
    model = SimpleNamespace(config=LLAMA_2_7B, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert budget.joins(model) is joined
    assert budget.joined_within(LLAMA_2_7B, torch.bfloat16, free) == (JOINED_7B if joined else 0)
    windows = Gemma2Config()  # nothing is recorded
    assert budget.joined_within(windows, torch.bfloat16, free) == 0


def test_all_ranks_cut_by_the_least_memory(monkeypatch):
    model = SimpleNamespace(config=LLAMA_2_7B, dtype=torch.bfloat16)
    acc = SimpleNamespace(device=torch.device("cuda"), num_processes=2)
    monkeypatch.setattr(budget, "free_bytes", lambda device: 60 << 30)
    monkeypatch.setattr(budget, "gather_object", lambda own: [*own, 777])
    assert budget.budget(acc, model, None).tokens == 777
    assert budget.budget(acc, model, 4000).tokens == 4000


@pytest.fixture
def asked(tiny_llama, monkeypatch):
    """Function that answers TEXTS where more than so many tokens at once run out of memory: the answers, and
    the rows of every batch that was tried."""
    model, tokenizer = loading.load(tiny_llama, torch.float32).eval(), load_tokenizer(tiny_llama)
    encoder = Encoder(tokenizer, DataSection(root="-", max_prompt_tokens=64, max_answer_tokens=8))
    plain, acc = generate.generate_ids, Accelerator(cpu=True)

    def ask(most: int, error=ERRORS[0]) -> tuple[list[generate.Answer], list[int]]:
        tried = []

        def limited(model, prompts, new, *others):
            tried.append(len(prompts))
            if (max(map(len, prompts)) + new) * len(prompts) > most:
                raise error()
            return plain(model, prompts, new, *others)

        monkeypatch.setattr(generate, "generate_ids", limited)
        return generate.answers(acc, model, encoder, TEXTS, 6), tried

    return ask


@pytest.mark.parametrize("error", ERRORS)
def test_memory_that_runs_out_halves_the_batch_and_every_prompt_is_answered(error, asked):
    whole, tried = asked(10**9)
    assert tried == [len(TEXTS)] and any(answer.text for answer in whole)
    found, tried = asked(70, error)
    assert found == whole
    assert tried[0] == len(TEXTS) and len(tried) > 2 and max(tried[-2:]) < len(TEXTS)


def test_one_prompt_that_does_not_fit_is_a_fault(asked):
    with pytest.raises(Fault, match=r"one prompt with its answer, \d+ tokens.*max_prompt_tokens"):
        asked(3)


def test_rows_that_begin_alike_are_a_group_where_that_saves_more_than_a_batch_costs():
    """Two sets of questions after examples of their own, and others that begin alike by 10 tokens alone."""
    first, second, none = [1] * 90, [2] * 70, [3] * 10
    rows = [[*first, 7], [*none, 8], [*second, 9], [*first, 10], [*none, 11], [*second, 12, 13], [*first, 14]]
    assert budget.by_prefix(rows, 1, 69) == [([0, 3, 6], 90), ([2, 5], 70), ([1, 4], 0)]
    assert budget.by_prefix(rows, 1, 70) == [([0, 3, 6], 90), ([1, 2, 5, 4], 0)]  # 70 saved, 70 lost
    assert budget.by_prefix(rows, 2, 90) == [([0, 3, 6, 1, 2, 5, 4], 0)]
    assert budget.by_prefix([], 1, 70) == []


def test_a_batch_ends_where_pads_cost_more_than_another():
    """Pads cost as much as prompt tokens; another batch costs its steps, and what each batch reads first."""
    lengths = [10, 8, 5]
    assert list(budget.batches(lengths, 1, 100, 1)) == [[0], [1], [2]]
    assert list(budget.batches(lengths, 1, 100, 2)) == [[0, 1], [2]]
    assert list(budget.batches(lengths, 1, 100, 1, again=6)) == [[0, 1, 2]]
    assert list(budget.batches(lengths, 1, 32, 1, again=6)) == [[0, 1], [2]]

"""Dream: the term against full distributions in float64, its cut over processes, and what is dreamt."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.config.registry import METHODS
from codyra_llm.data.batches import collate
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.methods.parts.samples import continued, end_tokens, first_token
from codyra_llm.methods.regularised import dream
from codyra_llm.methods.regularised.demonstrations import common_prefix
from codyra_llm.models.attention import packed_attention


def begun(path, state=None, **settings):
    """The method at the start of a task with an adapter that is not zero, then moved as by training; the
    plain models before and after the move."""
    kind = METHODS["dream"]
    method = kind(kind.Config(rank=2, fresh=True, samples=9, sample_tokens=7, batch=5, **settings), 7)
    model = AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)
    method.attach(model)
    share_inputs(model)
    state = state or {}
    task = SimpleNamespace(index=len(state) // 2, state=state, archive=None)
    method.begin_task(model, task)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.lora_B += 0.5 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(1))
    return method, model


def log_chances(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids[None]).logits[0].double().log_softmax(1)


@pytest.mark.parametrize("target", ["kl", "tokens"])
def test_the_term_is_a_mean_over_the_tokens_that_were_drawn(tiny_llama, target):
    method, model = begun(tiny_llama, target=target, weight=2.5)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    order = torch.randperm(9, generator=dream.generator("dreamt batch", 7, 0, 0))[:5].tolist()
    terms = []
    for example in (method._dreams[i] for i in order):
        ids = torch.tensor(example.prompt + example.answer)
        places = slice(len(example.prompt) - 1, len(ids) - 1)
        before, now = log_chances(plain, ids)[places], log_chances(model, ids)[places]
        kl = functional.kl_div(now, before, log_target=True, reduction="none").sum(1)
        ce = functional.nll_loss(now, ids[len(example.prompt) :], reduction="none")
        terms.append(kl if target == "kl" else ce)
    found = method.penalty(model)["dream"]
    expected = 2.5 * torch.cat(terms).mean()
    assert expected > 1e-3
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_over_two_processes_it_is_the_same(tiny_llama, monkeypatch):
    """The trainer takes the mean over processes: of a whole batch and of one that is smaller than they are
    many."""
    for batch in (5, 1):
        method, model = begun(tiny_llama)
        method.config = method.config.model_copy(update={"batch": batch})
        whole, parts = method.penalty(model)["dream"], []
        for rank in range(2):
            process = SimpleNamespace(process_index=rank, num_processes=2)
            monkeypatch.setattr(dream, "PartialState", lambda process=process: process)
            parts.append(method.penalty(model)["dream"] / 2)
        monkeypatch.undo()
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("turns", [(), ((2, 4),)], ids=["plain", "chat"])
def test_learnt_inputs_are_prompts_weighted_as_their_examples(tiny_llama, packed, turns):
    """Against each example alone, in float64, by its share of the loss; a filler and BOS have none."""
    method, model = begun(tiny_llama, inputs="learnt", input_weight=0.5)
    examples = [
        Encoded([1, 30, 40, 50, 60], [70, 2], False, turns),
        Encoded([1, 80, 90], [33, 44, 55, 2], False),
        Encoded([1, 21], [22], False),
        Encoded([1], [23, 2], False),
    ]
    weights = [0.1, 0.05, 0.0, 0.2]
    batch = collate(examples, range(4), weights, 0, packed)
    if packed:
        packed_attention.use(model)
    found = method.loss(model.train(), batch)
    model.set_attn_implementation("sdpa")
    expected = torch.zeros((), dtype=torch.float64)
    for example, weight in zip(examples[:2], weights, strict=False):
        ids = torch.tensor(example.prompt)
        own = functional.nll_loss(log_chances(model, ids)[:-1], ids[1:])
        expected += 0.5 * own * weight * len(example.labelled)
    torch.testing.assert_close(found["inputs"].double(), expected, rtol=1e-5, atol=1e-7)
    plain = collate(examples, range(4), weights, 0).cross_entropy(model)
    torch.testing.assert_close(found["loss"], plain, rtol=1e-5, atol=1e-7)
    assert found.keys() == {"loss", "inputs"}


def test_inputs_are_learnt_in_training_alone_and_where_that_is_set(tiny_llama):
    batch = collate([Encoded([1, 30, 40], [70, 2], False)], [0], [0.5], 0)
    for settings in ({}, {"inputs": "learnt", "input_weight": 0.0}):
        method, model = begun(tiny_llama, **settings)
        assert method.has_usual_loss and method.loss(model.train(), batch).keys() == {"loss"}
    method, model = begun(tiny_llama, inputs="learnt")
    assert not method.has_usual_loss and method.loss(model.eval(), batch).keys() == {"loss"}
    whole, half = method.loss(model.train(), batch), begun(tiny_llama, inputs="learnt", input_weight=0.125)
    torch.testing.assert_close(half[0].loss(half[1].train(), batch)["inputs"], whole["inputs"] / 2)


def test_before_the_first_step_there_is_nothing_to_hold_back(tiny_llama):
    method, model = begun(tiny_llama)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.lora_B.zero_()
    assert method.penalty(model)["dream"].abs() < 1e-6


def test_dreams_begin_as_earlier_tasks_do(tiny_llama):
    state = {
        "prefix.0": torch.tensor([1, 5, 9]),
        "ends.0": torch.tensor([2]),
        "prefix.1": torch.tensor([1, 8]),
        "ends.1": torch.tensor([2]),
    }
    method, model = begun(tiny_llama, state, prompted=0.5)
    begins = [example.prompt for example in method._dreams]
    assert begins[:4] == [[1, 5, 9]] * 2 + [[1, 8]] * 2 and len(begins) == 9
    assert all(len(begin) == 2 and begin[0] == first_token(model) for begin in begins[4:])
    again, _ = begun(tiny_llama, state, prompted=0.5)
    assert again._dreams == method._dreams


def test_a_dream_ends_with_eos(tiny_llama):
    """With a head that says EOS as often as not, most do before their time."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    (end,) = end_tokens(model)
    vocabulary = model.config.vocab_size
    likely = torch.full((vocabulary,), 0.5 / (vocabulary - 1))
    likely[end] = 0.5
    model.lm_head = torch.nn.Linear(model.config.hidden_size, vocabulary)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(likely.log())
    found = continued(model, [3, 4], 40, 8, {end}, "key")
    lengths = torch.tensor([len(example.answer) for example in found])
    assert all(example.prompt == [3, 4] and end not in example.answer[:-1] for example in found)
    assert all(example.answer[-1] == end for example in found if len(example.answer) < 8)
    assert 10 <= (lengths == 1).sum() <= 30 and lengths.max() <= 8


def test_a_dream_ends_at_the_encoders_ends_too(tiny_llama):
    """Those that begin as a task's prompts do: an end of turn ends a text as EOS does."""
    state = {"prefix.0": torch.tensor([1, 5, 9]), "ends.0": torch.tensor([2])}
    free, _ = begun(tiny_llama, state, prompted=1.0)
    drawn = [example.answer for example in free._dreams]
    end = next(token for token in drawn[0][1:-1] if token not in drawn[0][:1])
    ended, _ = begun(tiny_llama, state | {"ends.0": torch.tensor([2, end])}, prompted=1.0)
    for before, after in zip(drawn, ended._dreams, strict=True):
        assert after.answer == (before[: before.index(end) + 1] if end in before else before)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [([[1, 5, 6], [1, 5, 7]], [2, 4, 8]), ([[1, 5, 8], [1, 5, 8, 9]], [2, 4]), ([[2, 4], [8]], [])],
    ids=["plain", "chats", "all"],
)
def test_what_ends_a_dream_of_a_task(tiny_llama, prompts, expected):
    """An end of turn in the prompts doesn't: the answer comes after it."""
    method, model = begun(tiny_llama)
    examples = [Encoded(prompt, [3, 2], False) for prompt in prompts]
    ends = frozenset([2, 4, 8])
    task = SimpleNamespace(index=0, state={}, ends=ends, records=list, encode=lambda records: examples)
    state = method.end_task(model, task, None)
    assert state["ends.0"].tolist() == expected and state["ends.0"].dtype == torch.long


@pytest.mark.parametrize(
    ("cut", "expected"),
    [((False, False, True), [1, 5, 6]), ((True, True, True), [1])],
    ids=["one", "all"],
)
def test_a_task_begins_as_its_whole_prompts_do(tiny_llama, cut, expected):
    """A prompt that lost its beginning to max_prompt_tokens says nothing of it; where all did, it is what the
    model reads."""
    method, model = begun(tiny_llama)
    prompts = [1, 5, 6, 7], [1, 5, 6, 8], [1, 9, 9, 9]
    examples = [Encoded(prompt, [3, 2], own) for prompt, own in zip(prompts, cut, strict=True)]
    task = SimpleNamespace(index=0, state={}, ends=frozenset(), records=list, encode=lambda _: examples)
    assert method.end_task(model, task, None)["prefix.0"].tolist() == expected


def test_the_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 9]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2, 3]]) == [1, 2] and common_prefix([[4], [5]]) == []

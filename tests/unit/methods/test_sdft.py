"""SDFT: what the student draws, the loss against full distributions in float64, the teacher, the measured
refusal."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.core.tensors import generator
from codyra_llm.data.batches import collate
from codyra_llm.data.encoding import Encoded
from codyra_llm.data.rendering import ByTemplate, plain
from codyra_llm.lora.layer import sites, stand_in
from codyra_llm.lora.shared import share_inputs
from codyra_llm.methods.parts.samples import _inverse_cdf, answered, end_tokens
from codyra_llm.methods.regularised import sdft
from codyra_llm.models.tokenizer import load_tokenizer

TOKENS = {"a": [5, 6, 7], "b": [8, 9, 10], "c": [3, 4, 11, 12, 13]}


def encode(records):
    """A letter is its tokens, and a demonstration, as "a|b", the tokens of both."""
    found = []
    for record in records:
        prompt = [token for letter in record["prompt"].split("|") for token in TOKENS[letter]]
        found.append(Encoded(prompt, TOKENS[record["answer"]] + [2], cut=False))
    return found


RECORDS = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "a"}]


def begun(path, ends=(), records=RECORDS, render=plain, **settings):
    """The method at the start of the first task, in float64, with an adapter that is not zero."""
    kind = METHODS["sdft"]
    settings = {"probe": 0, "answer_tokens": 4, "demonstration": "{prompt}|{answer}", **settings}
    method = kind(kind.Config(rank=2, **settings), 7)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).requires_grad_(False)
    method.attach(model)
    share_inputs(model)
    stream = SimpleNamespace(tasks=["ONE"], render=render)
    task = SimpleNamespace(
        index=0, archive=None, records=lambda: records, encode=encode, stream=stream, ends=frozenset(ends)
    )
    method.begin_task(model, task)
    moved(model, 1)
    return method, model.train()


@torch.no_grad()
def moved(model, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for layer in sites(model).values():
        layer.lora_B += 0.5 * torch.randn(layer.lora_B.shape, generator=draw, dtype=torch.float64)


def chances(model, ids: list[int], count: int) -> torch.Tensor:
    """log p of the last `count` tokens' places, [count, V]."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return logits[-count - 1 : -1].log_softmax(1)


def test_answers_are_drawn_one_by_one(tiny_llama):
    """Against one prompt at a time, without cache or padding: the same draws take the same tokens."""
    _, model = begun(tiny_llama)
    prompts, draws = [[5, 6, 7], [8], [3, 4, 11, 12, 13]], [generator("one", i) for i in range(3)]
    found = answered(model, prompts, 9, (), draws)
    for i, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
        ids = list(prompt)
        uniform = torch.rand(9, generator=generator("one", i)).double()
        for place, token in enumerate(answer):
            p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(0).cumsum(0)
            assert token == int((p <= uniform[place] * p[-1]).sum())
            ids.append(token)
        ended = answer[-1] in end_tokens(model)
        assert (len(answer) == 9 or ended) and not end_tokens(model) & set(answer[:-1])


def test_an_answer_ends_at_each_of_the_encoders_ends_too(tiny_llama):
    """As a chat model's does at its end of turn, which is not its EOS: the same draws, up to an end."""
    _, model = begun(tiny_llama)

    def asked(ends):
        return answered(model, [[5, 6, 7], [8]], 9, ends, [generator("one", i) for i in range(2)])

    free = asked(())
    end = next(token for place, token in enumerate(free[0]) if place >= 2 and token not in free[0][:place])
    for before, after in zip(free, asked({end}), strict=True):
        assert after == (before[: before.index(end) + 1] if end in before else before)
    assert asked({end})[0] != free[0] and asked({end})[0][-1] == end


def test_the_student_answers_up_to_the_encoders_ends(tiny_llama, monkeypatch):
    """Where every token ends an answer, each has one."""
    method, model = begun(tiny_llama, ends=range(320))
    drawn, states = [], sdft._states

    def seen(model, prompts, answers):
        drawn.extend(answers)
        return states(model, prompts, answers)

    monkeypatch.setattr(sdft, "_states", seen)
    method.loss(model, collate(encode(RECORDS), [0, 1], [0.1, 0.1], 0))
    assert [len(answer) for answer in drawn] == [1] * 4  # of the student, and the same of the teacher


def test_answers_follow_the_distribution(tiny_llama):
    _, model = begun(tiny_llama)
    expected = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].softmax(0)
    drawn = answered(model, [[5, 6]] * 4000, 1, (), [generator("many", i) for i in range(4000)])
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(expected))
    spread = (4000 * expected * (1 - expected)).sqrt()
    assert ((counts - 4000 * expected).abs() < 5 * spread + 1).all()


def test_no_token_is_drawn_that_has_no_probability():
    """Not by the least and the largest random numbers, nor by one at the border of two tokens: a token owns
    [what is before it, what is up to it)."""
    never = -torch.inf
    logits = torch.tensor([[never, 0.0, never, 0.0, never]])
    for chance, token in ((0.0, 1), (0.49, 1), (0.5, 3), (1 - 2**-24, 3)):
        assert _inverse_cdf(logits, torch.tensor([[chance]])).tolist() == [[token]]


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
@pytest.mark.parametrize("skip", [0, 2])
def test_the_loss_is_the_divergence_on_own_answers(tiny_llama, divergence, skip):
    """Value and gradient against full distributions: student after the prompt, teacher after the
    demonstration with the adapter that the task began with."""
    method, model = begun(tiny_llama, divergence=divergence, skip=skip)
    shares = [0.75, 0.25]
    counts = [4, 4]  # tokens of the gold answers, with EOS
    weights = [share / count for share, count in zip(shares, counts, strict=True)]
    batch = collate(encode(RECORDS), [0, 1], weights, 0)
    found = method.loss(model, batch)["loss"]
    draws = [generator("sdft", 7, 0, 0, i) for i in range(2)]
    answers = answered(model, [TOKENS["a"], TOKENS["c"]], 4, (), draws)
    expected = 0.0
    for record, share, answer in zip(RECORDS, shares, answers, strict=True):
        asked, gold = TOKENS[record["prompt"]], TOKENS[record["answer"]]
        student = chances(model, asked + answer, len(answer))[skip:]
        with torch.no_grad(), stand_in(model, method._teacher):
            teacher = chances(model, asked + gold + answer, len(answer))[skip:]
        given, aim = (teacher, student) if divergence == "reverse" else (student, teacher)
        kl = functional.kl_div(given, aim, log_target=True, reduction="none").sum(1)
        expected = expected + share * (kl.mean() if len(kl) else 0.0)
    assert expected > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    factors = [layer.lora_A for layer in sites(model).values()]
    own = torch.autograd.grad(found, factors)
    exact = torch.autograd.grad(expected, factors)
    torch.testing.assert_close(own, exact, rtol=1e-7, atol=1e-12)


def test_validation_is_on_the_eval_splits_own_answers(tiny_llama):
    """Which are not the training examples of the same numbers, and there may be more of them: the cross
    entropy of the gold answers."""
    method, model = begun(tiny_llama)
    records = [*RECORDS, {"prompt": "b", "answer": "c"}, {"prompt": "b", "answer": "a"}]
    examples = encode(records[::-1])
    total = sum(example.targets for example in examples)
    with torch.no_grad():
        found = method.loss(model.eval(), collate(examples, range(4), [1 / total] * 4, 0))
        expected = 0.0
        for example in examples:
            labels = torch.tensor(example.answer)[:, None]
            log_p = chances(model, example.prompt + example.answer, len(labels))
            expected -= log_p.gather(1, labels).sum() / total
    torch.testing.assert_close(found["loss"], expected, rtol=1e-7, atol=0)


def test_the_teacher_is_an_average_of_the_student(tiny_llama):
    """φ moves by α once for each step, on from where a checkpoint has it."""
    method, model = begun(tiny_llama, teacher_rate=0.25)
    site, layer = next(iter(sites(model).items()))
    start = method._teacher[site][2].clone()
    batch = collate(encode(RECORDS), [0, 1], [0.1, 0.1], 0)
    method.before_step([], 0, 4, "constant")
    method.loss(model, batch)
    assert torch.equal(method._teacher[site][2], start)
    method.before_step([], 1, 4, "constant")
    method.loss(model, batch)
    method.loss(model, batch)  # the step's second micro-batch
    once = 0.25 * layer.lora_B + 0.75 * start
    torch.testing.assert_close(method._teacher[site][2], once)
    saved = {name: tensor.clone() for name, tensor in method.progress().items()}
    again, other = begun(tiny_llama, teacher_rate=0.25)
    again.resume(saved)
    moved(other, 2)
    again.before_step([], 2, 4, "constant")
    again.loss(other, batch)
    twice = 0.25 * sites(other)[site].lora_B + 0.75 * once
    torch.testing.assert_close(again._teacher[site][2], twice)


def test_a_demonstration_leaves_texts_as_they_are():
    kind = METHODS["sdft"]
    method = kind(kind.Config(demonstration="{prompt} so {answer}; {prompt}"), 0)
    record = {"prompt": "a {answer} {x}", "answer": "{prompt}", "more": 1}
    assert method._with_demonstration(record, "") == {
        "prompt": "a {answer} {x} so {prompt}; a {answer} {x}",
        "answer": "{prompt}",
        "more": 1,
    }


def test_a_chat_is_shown_the_answer_in_its_user_s_turn(tiny_llama):
    """Before what the template writes after it; where that does not end the prompt, at its end."""
    chats = [
        {"prompt": "a|c", "answer": "b", "learnt": [(0, 1)]},
        {"prompt": "c|a", "answer": "b", "learnt": []},
        {"prompt": "a|c", "answer": "b"},  # no chat
    ]
    method, _ = begun(tiny_llama, records=chats, render=SimpleNamespace(closing="|c"))
    shown = [example.prompt for example in method._demonstrated]
    a, b, c = TOKENS.values()
    assert shown == [a + b + c, c + a + b, a + c + b]


def test_what_a_template_writes_after_a_user_s_text(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    assert ByTemplate(tokenizer).closing == plain.closing == ""
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert ByTemplate(tokenizer).closing == "<eos>[assistant]"


@pytest.mark.parametrize("text", ["no names", "{prompt}", "{answer}"])
def test_a_demonstration_shows_prompt_and_answer(text):
    with pytest.raises(Fault, match="a demonstration shows"):
        METHODS["sdft"].Config(demonstration=text)


def test_a_base_without_use_for_demonstrations_is_refused(tiny_llama):
    """Random weights make nothing of what they are shown."""
    with pytest.raises(Fault, match=r"makes use of a demonstration .* 2 answers of ONE .* nats per token"):
        begun(tiny_llama, probe=5)


def test_a_base_that_copies_is_taken(tiny_llama, monkeypatch):
    """The cross entropy is measured after the prompt and after the demonstration, in nats per token."""
    measured = []
    real = sdft._cross_entropy

    def copying(model, prompts, answers):
        measured.append((prompts, real(model, prompts, answers)))
        return 0.1 if len(measured) == 2 else 1.0

    monkeypatch.setattr(sdft, "_cross_entropy", copying)
    method, model = begun(tiny_llama, probe=5)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.lora_B.zero_()
    expected = [TOKENS["a"], TOKENS["c"]], [TOKENS["a"] + TOKENS["b"], TOKENS["c"] + TOKENS["a"]]
    answers = [TOKENS["b"] + [2], TOKENS["a"] + [2]]
    for (prompts, found), wanted in zip(measured, expected, strict=True):
        assert prompts == wanted
        losses = [
            -chances(model, prompt + answer, len(answer)).gather(1, torch.tensor(answer)[:, None]).sum()
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        assert found == pytest.approx(float(sum(losses).detach()) / 8, rel=1e-6)

"""Prompt methods: gradients, the query, what is applied at test, prefixes in attention, restart, stages."""

import pytest
import torch
from adapters import SECTIONS
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from codyra_llm.config.registry import METHODS
from codyra_llm.data.batches import collate
from codyra_llm.data.encoding import Encoded
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.methods.base import Condition, Task
from codyra_llm.methods.parts.features import cosine, row_weights
from codyra_llm.methods.prompts.pool import query
from codyra_llm.models import loading
from codyra_llm.models.attention import prefix_attention

FAMILIES = ["tiny_llama", "tiny_gemma2", "tiny_gemma3"]
every_method = pytest.mark.parametrize("name", SECTIONS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def method(name, **changes):
    return METHODS[name](METHODS[name].Config(**SECTIONS[name] | changes), 0)


def prompts(lengths, low=4, high=300, seed=2):
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (n,), generator=drawn).tolist() for n in lengths]


def encoded(rows):
    return [Encoded(row, [*row[:2], 2], False) for row in rows]


def task(index, examples, state):
    """A task of these examples."""

    class Stream:
        def records(self, *args):
            return examples

    def batches(found):
        yield collate(found, range(len(found)), [0.0] * len(found), 0)

    return Task(index, None, Stream(), lambda records: records, batches, state)


def ready(model, name, rows, state=None, index=0, **changes):
    made = method(name, **changes)
    made.attach(model)
    made.begin_task(model, task(index, encoded(rows), state or {}))
    return made


def learnt(folder, name, tasks=2, **changes):
    """A model and a method after tasks that moved everything a little, as it stands at inference."""
    state = {}
    for index in range(tasks):
        model = loading.load(folder, torch.float32)
        rows = prompts([5, 9, 12], seed=index)
        made = ready(model, name, rows, state, index, **changes)
        now = task(index, encoded(rows), state)
        drawn = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for p in model.prompts.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=drawn))
        state = {k: v.detach().clone() for k, v in made.end_task(model, now, None).items()}
    model = loading.load(folder, torch.float32).eval()
    made.install(model, task(tasks - 1, [], state))
    return model, made


@every_method
@every_family
def test_gradients_reach_the_prompts_alone(name, family, request):
    model = loading.load(request.getfixturevalue(family), torch.float32).train()
    made = ready(model, name, prompts([6, 9, 7]))
    examples = encoded(prompts([5, 11]))
    if name == "pp":  # with a last layer of zero the layers before it start without a gradient
        torch.nn.init.normal_(model.prompts.mlp[-1].weight)
    terms = made.loss(model, collate(examples, [0, 1], [0.2, 0.1], 0))
    sum(terms.values()).backward()
    trained = {id(p) for group in made.param_groups(model, 1e-3) for p in group["params"]}
    for key, p in model.named_parameters():
        assert (id(p) in trained) == key.startswith("prompts.") == p.requires_grad == (p.grad is not None), (
            key
        )
        assert not key.startswith("prompts.") or p.grad.any(), key
    if name == "l2p":  # only what was chosen
        near = cosine(query(model, [e.prompt for e in examples]), model.prompts["match"]).topk(2, 1).indices
        moved = {i for i in range(4) if model.prompts["match"].grad[i].any()}
        assert (
            moved
            == {i for i in range(4) if model.prompts["prompts"].grad[i].any()}
            == set(near.flatten().tolist())
        )


@every_family
def test_query_at_training_is_the_query_at_test(family, request):
    model = loading.load(request.getfixturevalue(family), torch.float32)
    rows = prompts([3, 20, 11])
    batch = collate(encoded(rows), [2, 0, 1], [1.0] * 3, 0)
    assert batch.prompts == [rows[2], rows[0], rows[1]]
    for name, changes in (("l2p", {}), ("dualprompt", {}), ("dualprompt", {"key_init": "uniform"})):
        made = ready(model, name, rows, **changes)
        made.loss(model.train(), collate(encoded(rows), [0], [1.0], 0))  # leaves a prefix in the layers
        made.loss(model, batch)
        assert sorted(made.queries.known) == sorted(map(tuple, rows))
        for row, known in made.queries.known.items():
            bare = loading.load(request.getfixturevalue(family), torch.float32).eval()
            expected = bare.model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0)
            torch.testing.assert_close(known, expected, rtol=1e-4, atol=1e-5)
        prefix_attention.use(model)
        torch.testing.assert_close(
            query(model, rows), torch.stack([made.queries.known[tuple(r)] for r in rows])
        )
        assert model.training


def test_a_term_per_example_is_weighted_as_the_loss(tiny_llama):
    """The same global batch in one piece and in three gives the same pull; a filler of weight 0 gives
    none.
    """
    model, rows = loading.load(tiny_llama, torch.float32), prompts([4, 9, 6])
    made, examples = ready(model, "l2p", rows), encoded(rows)
    weights = [0.5 / 3, 0.25 / 3, 0.25 / 3]
    whole = made.loss(model, collate(examples, [0, 1, 2], weights, 0))
    parts = [made.loss(model, collate(examples, [i], [w], 0)) for i, w in [*enumerate(weights), (1, 0.0)]]
    for key in whole:
        assert sum(p[key] for p in parts).item() == pytest.approx(whole[key].item(), rel=1e-5)
    torch.testing.assert_close(
        row_weights(collate(examples, [0, 1, 2], weights, 0)), torch.tensor([0.5, 0.25, 0.25])
    )
    near = cosine(query(model, rows), model.prompts["match"]).topk(2, 1).values.sum(1)
    assert whole["pull"].item() == pytest.approx(
        -0.5 * (near @ torch.tensor([0.5, 0.25, 0.25])).item(), rel=1e-5
    )


def recomputed(model, condition, prompt, new):
    """Greedy decoding of one prompt by a forward over the whole sequence at each step, without cache, pads or
    mask.
    """
    ids = list(prompt)
    for _ in range(new):
        embedded = model.get_input_embeddings()(torch.tensor([ids]))
        if condition.prefix is not None:
            embedded = torch.cat([condition.prefix, embedded], 1)
        with torch.no_grad():
            ids.append(model(inputs_embeds=embedded, use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@every_method
@every_family
def test_generation_in_a_batch_equals_one_at_a_time_and_full_recomputation(name, family, request):
    """Sliding windows of 16 lie inside of prompts and answers; rows that end early leave the batch."""
    model, made = learnt(request.getfixturevalue(family), name)
    batch, new = prompts([3, 7, 12, 30, 21, 9, 5, 16], seed=7), 12
    alone = [generate_ids(model, [p], new, -1, made.condition(model, [p], None))[0] for p in batch]
    assert alone == [recomputed(model, made.condition(model, [p], None), p, new) for p in batch]
    assert generate_ids(model, batch, new, -1, made.condition(model, batch, None)) == alone
    eos = next(t for row in alone for t in row[:4] if sum(t in r[:8] for r in alone) in (3, 4, 5, 2))
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in alone]
    assert generate_ids(model, batch, new, eos, made.condition(model, batch, None)) == ended
    assert len({len(row) for row in ended}) > 1


def tokenwise(model, condition, prompt):
    embedded = model.get_input_embeddings()(torch.tensor([prompt]))
    if condition.prefix is not None:
        embedded = torch.cat([condition.prefix, embedded], 1)
    with torch.no_grad():
        return model(inputs_embeds=embedded).logits[:, -1]


@every_method
def test_prompts_count_at_test(name, tiny_llama):
    """Other prompts, other logits; and what is trained on is what is asked: the loss is that of the logits at
    test.
    """
    model, made = learnt(tiny_llama, name)
    [prompt] = prompts([9])
    with_prompts = tokenwise(model, made.condition(model, [prompt], None), prompt)
    prefix_attention.use(model)
    assert not torch.allclose(with_prompts, tokenwise(model, Condition(), prompt), atol=1e-2)
    prompts_key = {"l2p": ["prompts"], "dualprompt": ["experts"], "pp": ["prompts"]}[name]
    for key in prompts_key:
        model.prompts[key].zero_()
    assert not torch.allclose(
        with_prompts, tokenwise(model, made.condition(model, [prompt], None), prompt), atol=1e-2
    )


@every_method
def test_what_trains_is_what_answers(name, tiny_llama):
    """Cross entropy in training equals that of the installed model's logits, in a batch with pads."""
    rows = prompts([5, 9, 12])
    model = loading.load(tiny_llama, torch.float32)
    made = ready(model, name, rows)
    with torch.no_grad():
        for p in model.prompts.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    examples = encoded(rows)
    trained = made.loss(model, collate(examples, [0, 1, 2], [1 / 9] * 3, 0))["loss"].item()
    state = {k: v.detach().clone() for k, v in made.end_task(model, task(0, examples, {}), None).items()}
    model = loading.load(tiny_llama, torch.float32).eval()
    made.install(model, task(0, examples, state))
    loss = 0.0
    for e in examples:
        logits = torch.cat([tokenwise_after(model, made, e.prompt, e.answer[:n]) for n in range(3)])
        loss += functional.cross_entropy(logits, torch.tensor(e.answer)).item() / 3
    assert trained == pytest.approx(loss, rel=1e-4)


def tokenwise_after(model, made, prompt, answer):
    """Logits after prompt and a part of the answer, under the condition of the prompt alone."""
    return tokenwise(model, made.condition(model, [prompt], None), [*prompt, *answer])


def test_the_right_prompt_is_chosen_at_test(tiny_llama):
    """Three tasks whose prompts share no token: training finds the keys, test prompts find their task, l2p's
    and dualprompt's, and an example's answers come from its own expert."""
    bands = [(4, 7), (100, 103), (220, 223)]
    state = {}
    for index, band in enumerate(bands):
        model = loading.load(tiny_llama, torch.float32)
        rows = prompts([8, 10, 12, 14], *band, seed=1)
        made = ready(model, "dualprompt", rows, state, index)
        state = {k: v.detach().clone() for k, v in made.end_task(model, task(index, [], state), None).items()}
    state["experts"] += torch.arange(3).view(3, 1, 1, 1, 1, 1)  # so that they differ
    model = loading.load(tiny_llama, torch.float32).eval()
    made.install(model, task(2, [], state))
    tests = [(index, row) for index, band in enumerate(bands) for row in prompts([7, 11, 15], *band, seed=9)]
    made.condition(model, [row for _, row in tests], None)
    shown = model.model.layers[1].self_attn.prefix
    for (index, _), prefix in zip(tests, shown, strict=True):
        assert torch.equal(prefix, state["experts"][index, 0])
    prefix_attention.select(model, torch.tensor([8, 0]))
    assert torch.equal(model.model.layers[1].self_attn.prefix, state["experts"][[2, 0], 0])

    model = loading.load(tiny_llama, torch.float32)
    made = ready(model, "l2p", rows, pool=3, chosen=1)
    optimizer = torch.optim.Adam([model.prompts["match"]], lr=0.05)
    with torch.no_grad():  # each key begins on the side of one task
        model.prompts["match"].copy_(
            torch.stack([query(model, prompts([9], *band, seed=1))[0] for band in bands])
        )
    for step in range(6):
        batch = encoded(prompts([8, 10], *bands[step % 3], seed=step))
        made.loss(model, collate(batch, [0, 1], [0.1, 0.1], 0))["pull"].backward()
        optimizer.step()
        optimizer.zero_grad()
    front = made.condition(model, [row for _, row in tests], None).prefix
    for (index, _), prefix in zip(tests, front, strict=True):
        assert torch.equal(prefix, model.prompts["prompts"][index])


def test_prefixed_attention_is_concatenation(tiny_llama):
    """Layer 0 of LLaMA in float64 with grouped heads: attention over [prefix; keys], by hand."""
    model = loading.load(tiny_llama, torch.float64)
    config, layer = model.config, model.model.layers[0]
    rows, n, size, drawn = 3, 11, config.head_dim, torch.Generator().manual_seed(0)
    prefix_attention.use(model)
    prefix = torch.randn(rows, 2, 2, 5, size, generator=drawn, dtype=torch.float64, requires_grad=True)
    prefix_attention.show(model, {0: prefix})
    x = torch.randn(rows, n, config.hidden_size, generator=drawn, dtype=torch.float64)
    rotation = model.model.rotary_emb(x, torch.arange(n)[None])
    made, _ = layer.self_attn(x, position_embeddings=rotation, attention_mask=None)
    q, k, v = (
        proj(x).view(rows, n, -1, size).transpose(1, 2)
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rotation)
    k, v = torch.cat([prefix[:, 0], k], 2), torch.cat([prefix[:, 1], v], 2)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ k.transpose(2, 3) / size**0.5
    later = torch.arange(n)[None, :] > torch.arange(n)[:, None]
    scores = scores.masked_fill(functional.pad(later, (5, 0)), -torch.inf)
    expected = layer.self_attn.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, n, -1))
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn(expected.shape, generator=drawn, dtype=torch.float64)
    grads = [
        torch.autograd.grad((out * weight).sum(), prefix, retain_graph=True)[0] for out in (made, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@every_family
def test_attention_without_a_prefix_is_the_family_s_own(family, request):
    """And a prefix made of the first tokens' keys and values stands for these tokens, windows and softcap
    included.
    """
    folder, batch = request.getfixturevalue(family), prompts([30, 30])
    ids = torch.tensor(batch)
    with torch.no_grad():
        own = loading.load(folder, torch.float64).eval()(input_ids=ids).logits
        model = loading.load(folder, torch.float64).eval()
        prefix_attention.use(model)
        torch.testing.assert_close(
            model(input_ids=ids).logits, own, rtol=1e-5, atol=1e-6
        )  # eager's softmax is float32
        short = ids[:, :14]  # inside the window of 16
        own = model(input_ids=short).logits[:, 5:]
        made = torch.stack([prefix_attention.made_by(model, row[:5], [0, 1]) for row in short])
        prefix_attention.show(model, dict(enumerate(made.unbind(1))))
        rest = model(input_ids=short[:, 5:], position_ids=torch.arange(5, 14)[None]).logits
        torch.testing.assert_close(rest, own, rtol=1e-9, atol=1e-9)

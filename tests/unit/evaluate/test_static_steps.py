"""Decoding with tensors that keep their places: the same tokens as the growing cache gives. On a CPU nothing
is recorded."""

import weakref
from copy import deepcopy

import pytest
import torch
from full_memory import ERRORS
from fused import CONFIGS
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.evaluate import generate, static_steps
from codyra_llm.evaluate.budget import Budget, Share
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.models import families
from codyra_llm.store import observer

NEW = 24
RECORDED = [name for name, config in CONFIGS.items() if families.of(config).recorded_steps]


def prompts(lengths, prefix=()):
    drawn = torch.Generator().manual_seed(2)
    return [[*prefix, *torch.randint(4, 60, (n,), generator=drawn).tolist()] for n in lengths]


@pytest.fixture(params=RECORDED)
def model(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    model.lm_head.weight.data = torch.randn_like(
        model.lm_head.weight
    )  # untied: tokens do not repeat themselves
    return model


@pytest.fixture
def counted(monkeypatch):
    """Static steps wherever their family allows, and the rows of each that is made."""
    plain, rows = static_steps.StaticSteps.next, []

    def spying(self, count):
        rows.extend([len(self.token)] * count)
        return plain(self, count)

    monkeypatch.setattr(static_steps.StaticSteps, "next", spying)
    return rows


def always(model, left):
    return left > 0


@pytest.mark.parametrize("prefix", [(), range(4, 40)])
def test_the_same_tokens_as_without(model, counted, prefix, monkeypatch):
    """Prompts of many lengths, with and without a shared prefix, that end at different steps."""
    batch = prompts([1, 2, 3, 5, 7, 9, 12, 12], prefix)
    free = generate_ids(model, batch, NEW, -1)
    assert not counted
    often = max(
        {t for row in free for t in row}, key=lambda t: len({row.index(t) for row in free if t in row})
    )
    expected = generate_ids(model, batch, NEW, often)
    monkeypatch.setattr(static_steps, "pays", always)
    assert generate_ids(model, batch, NEW, -1) == free
    assert counted == [8] * (NEW - generate.UNRECORDED)
    counted.clear()
    assert generate_ids(model, batch, NEW, often) == expected
    assert counted == sorted(counted, reverse=True)
    assert model.config._attn_implementation == "sdpa"


def test_rows_that_are_done_leave(model, counted, monkeypatch):
    monkeypatch.setattr(static_steps, "pays", always)
    batch = prompts([3, 5, 7, 9])
    free = generate_ids(model, batch, NEW, -1)

    def stop(ids):
        """All but the first prompt's answer end at their eighth token."""
        return len(ids) == 8 and ids != free[0][:8]

    counted.clear()
    assert generate_ids(model, batch, NEW, -1, None, stop) == [free[0], *(row[:8] for row in free[1:])]
    assert counted == [4] * 8 + [1] * (NEW - 12), "tokens are read eight steps at a time"


LENGTHS = [12, 12, 11, 10, *range(9, 15), *[8] * 20, 7, 7, 6, 5, 3]


def answered(model, given, rows, stop, held=None) -> dict[int, list[int]]:
    """The answers to all prompts in batches of so many rows, by their positions."""
    cut = [list(range(start, min(start + rows, len(given)))) for start in range(0, len(given), rows)]
    share, found = Share("prompts", given, cut, NEW, len(given)), {}

    def answer(chosen):
        return generate_ids(model, [given[i] for i in chosen], NEW, -1, None, stop, share)

    for chosen, ids in share.answered(held or Budget(10**9, 16), answer):
        found |= zip(chosen, ids, strict=True)
    assert not found.keys() & share.early.keys()
    return found | share.early


def ends_early(ids) -> bool:
    """Answers end after 2 to 24 tokens, as their first token says."""
    return len(ids) >= 2 + ids[0] * 7 % 23


@pytest.mark.parametrize("prefix", [(), range(4, 40)])
def test_prompts_of_later_batches_take_the_places_of_rows_that_are_done(model, prefix, monkeypatch):
    given = prompts(LENGTHS, prefix)
    expected = answered(model, given, 5, ends_early)
    monkeypatch.setattr(static_steps, "pays", always)
    plain = static_steps.StaticSteps.put
    places, slots = [], {}

    def spying(self, rows, *others):
        places.extend(rows.tolist())
        slots.setdefault(self, []).append(self.slot.item())
        return plain(self, rows, *others)

    monkeypatch.setattr(static_steps.StaticSteps, "put", spying)
    assert answered(model, given, 5, ends_early) == expected
    assert len(places) >= 10, "these began where others had ended"
    assert any(own != sorted(own) for own in slots.values()), "the ring came round"


@pytest.mark.parametrize("end, share_of_steps", [(6, 0.7), (4, 1.0)])
def test_no_more_steps_than_batch_after_batch(end, share_of_steps, counted, monkeypatch):
    """Every fourth answer goes on to the limit. The others end after 6 tokens, so that prompts take their
    places, or after 4, before steps are recorded: then the batch is too small for that."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    given = prompts([9] * 16)
    free = generate_ids(model, given, NEW, -1)
    long = [row[:end] for row in free[::4]]

    def stop(ids):
        return len(ids) == end and ids not in long

    monkeypatch.setattr(static_steps, "pays", always)
    found = answered(model, given, 4, stop)
    assert [found[i] for i in range(16)] == [row if row[:end] in long else row[:end] for row in free]
    taken = len(counted)
    counted.clear()
    monkeypatch.setattr(Share, "take", lambda *_: [])
    assert answered(model, given, 4, stop) == found
    assert len(counted) == 4 * (NEW - generate.UNRECORDED)
    assert taken <= share_of_steps * len(counted)


def test_a_short_prompt_does_not_take_the_place_of_a_long_one():
    share = Share("prompts", [[1] * n for n in (12, 9, 13, 6, 5, 8)], [[0], [1, 2], [3, 4, 5]], 8, 6)
    share.begun.add(0)
    assert share.take(2, 12) == [1, 3]
    assert share.take(2, 12) == [5]
    assert share.take(2, 12) == []


def test_a_batch_of_which_rows_are_done_is_filled_up():
    """The second batch has one of three rows left, and takes two that fit from the third."""
    share, asked = Share("prompts", [[1] * n for n in (9, 9, 9, 8, 8, 3)], [[0, 1], [2, 3], [4, 5]], 8, 6), []
    for part, _ in share.answered(Budget(10**9, 16), lambda chosen: chosen):
        asked.append(part)
        if len(asked) == 1:
            share.finished_early(2, [7])
    assert asked == [[0, 1], [3, 4], [5]]


def test_a_prompt_that_began_early_is_asked_again_if_its_batch_ran_out_of_memory(model, monkeypatch):
    given = prompts(LENGTHS)
    expected = answered(model, given, 4, ends_early)
    monkeypatch.setattr(static_steps, "pays", always)
    plain, calls = static_steps.StaticSteps.next, []

    def failing(self, count):
        calls.append(count)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, count)

    monkeypatch.setattr(static_steps.StaticSteps, "next", failing)
    held = Budget(10**9, 16)
    assert answered(model, given, 4, ends_early, held) == expected
    assert held.tokens < 10**9


@pytest.mark.parametrize("error", ERRORS)
def test_memory_that_runs_out_for_newcomers_leaves_the_batch_as_it_is(error, model, monkeypatch):
    """Also in batches of one row, which can't be halved."""
    given = prompts([9, 9, 8, 8, 7, 7])
    expected = answered(model, given, 6, ends_early)
    monkeypatch.setattr(static_steps, "pays", always)
    calls = []

    def failing(self, *others):
        calls.append(1)
        raise error()

    monkeypatch.setattr(static_steps.StaticSteps, "put", failing)
    for rows in (1, 2):
        held, before = Budget(10**9, 16), len(calls)
        assert answered(model, given, rows, ends_early, held) == expected
        assert held.tokens == 10**9 and len(calls) > before


def failing_at(number, plain, error, calls):
    """`plain`, which runs out of memory when it is called for the time of this `number`, and later."""

    def failing(*given):
        calls.append(1)
        if len(calls) > number:
            raise error()
        return plain(*given)

    return failing


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "owner, name, number",
    [
        (static_steps, "join", 1),
        (static_steps, "longer", 3),  # the second layer's values
        (static_steps.StaticSteps, "_step", 0),
        (static_steps.StaticSteps, "_step", 5),
    ],
)
def test_recorded_steps_that_do_not_fit_are_done_without(error, owner, name, number, monkeypatch, caplog):
    """In batches of one row too, which can't be halved; the first steps are done again."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    given, calls = prompts([9, 8, 7, 7]), []
    expected = answered(model, given, 1, ends_early)
    monkeypatch.setattr(static_steps, "pays", always)
    monkeypatch.setattr(owner, name, failing_at(number, getattr(owner, name), error, calls))
    share, held = Share("prompts", given, [[0, 1], [2], [3]], NEW, 4), Budget(10**9, 16)
    with caplog.at_level("INFO", "codyra_llm"):
        assert generate.generated(model, share, held, -1, None, ends_early) == expected
    assert len(calls) == number + 1, "tried once"
    assert [line for line in caplog.messages if "recorded decoding steps" in line] == caplog.messages[:1]
    assert held.tokens == 10**9


def test_a_cache_with_room_for_more_has_no_second_copy_beside_it():
    """Each layer's keys and values take the place of those before."""
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    rows = generate._Rows(model, prompts([9, 7]), NEW, None)
    before = [(layer.keys.clone(), weakref.ref(layer.keys)) for layer in rows.cache.layers]
    rings = rows.rings(40)
    for layer, (keys, _), (own, gone) in zip(rows.cache.layers, rings, before, strict=True):
        assert gone() is None and keys.shape[2] == 48
        assert layer.keys.data_ptr() == keys.data_ptr() and torch.equal(layer.keys, own)


def test_steps_of_fewer_rows_begin_when_the_memory_of_the_others_is_free(monkeypatch):
    """And their recording is gone, which takes memory from those made after it on its stream."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    monkeypatch.setattr(static_steps, "pays", always)
    select, plain, before = static_steps.StaticSteps.select, static_steps.StaticSteps.next, []

    def selecting(self, rows):
        before.extend([weakref.ref(self), weakref.ref(self.layers[0][0])])
        return select(self, rows)

    def stepping(self, count):
        assert all(gone() is None for gone in before)
        return plain(self, count)

    monkeypatch.setattr(static_steps.StaticSteps, "select", selecting)
    monkeypatch.setattr(static_steps.StaticSteps, "next", stepping)
    given = prompts([9, 9, 9, 9])
    keeps_on = generate_ids(model, given, NEW, -1)[0][:8]
    assert not before
    generate_ids(model, given, NEW, -1, None, lambda ids: len(ids) == 8 and ids != keeps_on)
    assert before


def test_weights_are_joined_once_for_all_batches(monkeypatch):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    monkeypatch.setattr(static_steps, "pays", always)
    plain, joined = static_steps.join, []

    def counting(module):
        joined.append(module)
        return plain(module)

    monkeypatch.setattr(static_steps, "join", counting)
    share = Share("prompts", prompts([3, 7, 15]), [[0], [1], [2]], NEW, 3)  # none fits where another was
    generate.generated(model, share, Budget(10**9, 16), -1)
    assert len(joined) == len(families.attentions(model))


def test_where_memory_is_short_nothing_is_joined(monkeypatch):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    share = Share("prompts", prompts([9, 8]), [[0, 1]], NEW, 2)
    expected = generate.generated(model, share, Budget(10**9, 16), -1)
    monkeypatch.setattr(static_steps, "pays", always)
    monkeypatch.setattr(generate, "joins", lambda model: False)
    monkeypatch.setattr(static_steps, "join", lambda module: 1 / 0)
    share = Share("prompts", prompts([9, 8]), [[0, 1]], NEW, 2)
    assert generate.generated(model, share, Budget(10**9, 16), -1) == expected


def test_a_row_begins_only_in_a_batch_of_its_own_group():
    rows = [[1] * 9, [2] * 9, [1] * 9, [2] * 9]
    share = Share("prompts", rows, [[0], [2], [1, 3]], 8, 4, {0: 0, 2: 0, 1: 1, 3: 1})
    found = []
    for part, _ in share.answered(Budget(10**9, 16), lambda chosen: chosen):
        found.append((part, share.take(4, 9)))
    assert found == [([0], [2]), ([2], []), ([1, 3], [])]


def test_progress_is_told_within_a_batch(model, monkeypatch):
    """By which the watch of a launch knows that it does not hang."""
    monkeypatch.setattr(static_steps, "pays", always)
    plain, done = static_steps.StaticSteps.put, []

    class Told(observer.Observer):
        def at(self, place):
            done.append(place)

    def counting(self, *others):
        done.append("put")
        return plain(self, *others)

    monkeypatch.setattr(static_steps.StaticSteps, "put", counting)
    with observer.observing([], Told()):
        answered(model, prompts(LENGTHS), 5, ends_early)
    puts = [i for i, what in enumerate(done) if what == "put"]
    assert puts and all(done[i - 1].startswith("prompts, ") for i in puts)


def test_no_new_tokens_are_no_tokens(model):
    assert generate_ids(model, prompts([3, 5]), 0, -1) == [[], []]


def test_where_it_is_used(monkeypatch):
    llama = AutoModelForCausalLM.from_config(deepcopy(CONFIGS["llama"]))
    assert not static_steps.pays(llama, 100)  # on a CPU
    monkeypatch.setattr(type(llama), "device", torch.device("cuda"))
    assert static_steps.pays(llama, 100)
    assert not static_steps.pays(llama, 3)
    llama.config.sliding_window = 16
    assert not static_steps.pays(llama, 100)
    llama.config.sliding_window = None
    assert static_steps.pays(llama, 100)
    llama.set_attn_implementation("eager")
    assert not static_steps.pays(llama, 100)


@pytest.mark.parametrize("heads, shared", [(4, 4), (8, 2), (8, 1)])
def test_grouped_attention_is_attention(heads, shared):
    torch.manual_seed(0)
    query = torch.randn(3, heads, 16, dtype=torch.float64)
    key, value = torch.randn(2, 3, shared, 9, 16, dtype=torch.float64)
    seen = torch.rand(3, 1, 1, 9) < 0.7
    seen[..., 0] = True
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf).repeat(1, shared, 1, 1)
    found = static_steps.grouped(query, key, value, mask, scaling=0.3)
    repeated = (t.repeat_interleave(heads // shared, 1) for t in (key, value))
    expected = functional.scaled_dot_product_attention(query[:, :, None], *repeated, seen, scale=0.3)
    torch.testing.assert_close(found, expected[:, :, 0], rtol=1e-12, atol=1e-12)


class Own(torch.nn.Linear):
    """A projection that may compute something else than its weight says, as adapted and packed ones do."""


def test_projections_that_are_no_plain_layers_are_called_one_by_one(model, monkeypatch):
    batch = prompts([3, 5, 9])
    free = generate_ids(model, batch, NEW, -1)
    for module in families.attentions(model):
        assert static_steps.join(module) is not None
        module.k_proj.__class__ = Own
        assert static_steps.join(module) is None
    monkeypatch.setattr(static_steps, "pays", always)
    assert generate_ids(model, batch, NEW, -1) == free


def test_modules_attend_as_before_once_the_steps_are_done(monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    monkeypatch.setattr(static_steps, "pays", always)
    generate_ids(model, prompts([3, 5]), NEW, -1)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.gpu
def test_recorded_steps_give_the_same_tokens():
    """float32, so that no near-tie is decided otherwise."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    batch = prompts([1, 2, 3, 5, 7, 9, 12, 12])
    expected = generate_ids(model, batch, NEW, -1)
    model.to("cuda")
    assert static_steps.pays(model, NEW - generate.UNRECORDED)
    assert generate_ids(model, batch, NEW, -1) == expected

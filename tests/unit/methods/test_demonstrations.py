"""Dreams after demonstrations: who writes inputs and who answers, what is kept and what is selected."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.core.tensors import save_tensors
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.methods.parts.features import kmeans, nearest_to_centroids
from codyra_llm.methods.parts.samples import answered
from codyra_llm.methods.regularised import dream
from codyra_llm.methods.regularised.demonstrations import (
    Demonstrations,
    chosen,
    common_closing,
    diverse,
    new_inputs,
)
from codyra_llm.methods.regularised.dream import Dream

MARK, LINE = 7, 30  # a token that ends every prompt, and a line break
EXAMPLES = [
    Encoded([1, 5, 9, 11, MARK], [20, 2], False),
    Encoded([1, 5, 9, 12, 13, MARK], [21, 2], False),
    Encoded([1, 5, 9, 14, MARK], [22, 2], False),
]
KEPT = Demonstrations(EXAMPLES[:2], [1, 5, 9], [MARK], frozenset([2]))


def base(path) -> torch.nn.Module:
    """A model that often writes MARK, and the line break."""
    model = AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)
    weight = model.lm_head.weight.detach()
    model.lm_head = torch.nn.Linear(*weight.T.shape)
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
        model.lm_head.bias.zero_()
        model.lm_head.bias[[MARK, LINE]] = 5.0
    return model.requires_grad_(False)


def at_task(index: int, state: dict, examples=EXAMPLES) -> SimpleNamespace:
    return SimpleNamespace(
        index=index,
        state=state,
        ends=frozenset([2]),
        newline=(LINE,),
        records=list,
        encode=lambda records: examples,
        archive=None,
        stream=SimpleNamespace(tasks=["ONE", "TWO"]),
    )


def move(model) -> None:
    """Training, as far as dreams are concerned."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.lora_B += 0.5 * torch.randn(layer.lora_B.shape, generator=draw)


def after_a_task(path, monkeypatch, **settings):
    """The method, its model and the state after a first task, which a second one is to start from."""
    config = {"rank": 2, "inputs": "demonstrations", "sample_tokens": 4, "input_tokens": 12, **settings}
    method = Dream(Dream.Config(samples=10, prompted=0.8, **config), 7)
    model = base(path)
    method.attach(model)
    share_inputs(model)
    method.begin_task(model, at_task(0, {}))
    move(model)
    state = method.end_task(model, at_task(0, {}), None)
    monkeypatch.setattr(dream.SeqLora, "begin_task", lambda self, model, task: None)  # the adapter goes on
    return method, model, state


@torch.no_grad()
def merged(path, model) -> torch.nn.Module:
    """A plain model that is the base with the adapter's update."""
    plain = base(path)
    for name, layer in sites(model).items():
        plain.get_submodule(name).weight += layer.spec.scale * layer.lora_B @ layer.lora_A
    return plain


def test_the_base_writes_inputs_and_the_latest_model_answers(tiny_llama, monkeypatch):
    method, model, state = after_a_task(tiny_llama, monkeypatch)
    method.begin_task(model, at_task(1, state))
    dreams = [example for example in method._dreams if example.prompt[:3] == [1, 5, 9]]
    kept, now = Demonstrations.load(state, 0), merged(tiny_llama, model)
    inputs = new_inputs(base(tiny_llama), kept, 32, 12, [LINE, LINE], 7, 1, 0)
    prompts = diverse(now, inputs, 8, 7, 1, 0)
    assert [example.prompt for example in dreams] == prompts and len(prompts) == 8 < len(inputs)
    assert inputs != new_inputs(now, kept, 32, 12, [LINE, LINE], 7, 1, 0)

    def answers(model):
        draws = [dream.generator("dreamt answer", 7, 1, 0, i) for i in range(8)]
        return answered(model, prompts, 4, {2}, draws)

    assert [example.answer for example in dreams] == answers(now) != answers(base(tiny_llama))
    assert len(method._dreams) == 10  # the others start from BOS


def test_a_dream_is_new_and_ends_as_prompts_do(tiny_llama, monkeypatch):
    method, model, state = after_a_task(tiny_llama, monkeypatch)
    kept = Demonstrations.load(state, 0)
    inputs = new_inputs(model, kept, 300, 12, [LINE, LINE], "key")
    assert len(inputs) == len(set(map(tuple, inputs))) > 100
    assert not [prompt for prompt in inputs if prompt in [example.prompt for example in kept.examples]]
    for prompt in inputs:
        assert prompt[:3] == [1, 5, 9] and prompt.index(MARK) == len(prompt) - 1 >= 4 and 2 not in prompt


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([15, 16, MARK, 20], [1, 5, 9, 15, 16, MARK]),
        ([15, MARK, 16, MARK], [1, 5, 9, 15, MARK]),
        ([15, 16], None),
        ([MARK, 15, MARK], None),
        ([15, 2, 16, MARK], None),
        ([11, MARK], None),
        ([14, MARK], [1, 5, 9, 14, MARK]),
    ],
    ids=["whole", "first", "no end", "empty", "end of text", "demonstration", "not kept"],
)
def test_where_an_input_ends(written, expected):
    assert KEPT.completed(written, [LINE, LINE]) == expected


def test_without_a_closing_it_ends_at_a_blank_line():
    kept = Demonstrations(EXAMPLES[:2], [1, 5, 9], [], frozenset([2]))
    assert kept.completed([15, LINE, 16, LINE, LINE, 4], [LINE, LINE]) == [1, 5, 9, 15, LINE, 16]
    assert kept.completed([15, LINE, 16], [LINE, LINE]) is None
    assert kept.completed([11, MARK, LINE, LINE], [LINE, LINE]) is None
    shown = [1, 5, 9, 12, 13, MARK, LINE, 5, 9, 11, MARK, LINE, 5, 9]
    assert kept.context([1, 0], [LINE], 1) == shown


def test_what_the_base_reads():
    """BOS once, and no end of a text inside; where an answer ends as prompts' turns do, its end stays."""
    shown = [1, 5, 9, 11, MARK, 20, LINE, 5, 9, 12, 13, MARK, 21, LINE, 5, 9]
    assert KEPT.context([0, 1], [LINE], 1) == shown
    chats = Demonstrations([Encoded([5, 4, MARK], [20, 4], False)], [5], [4, MARK], frozenset([2]))
    assert chats.context([0], [LINE], 1) == [5, 4, MARK, 20, 4, LINE, 5]
    assert Demonstrations([], [], [], frozenset()).context([], [LINE], 1) == [1]
    turns = Demonstrations([Encoded([1, 5, 4, 1, MARK], [20, 4], False)] * 2, [1, 5], [MARK], frozenset([2]))
    turn = [1, 5, 4, 1, MARK, 20, 4, LINE]
    assert turns.context([0, 1], [LINE], 1) == [*turn, *turn, 1, 5]


def test_the_order_of_the_examples_is_drawn_for_each_input(tiny_llama, monkeypatch):
    read = []

    def begin(self, order, *given):
        read.append(tuple(order))
        return [1, *order]

    monkeypatch.setattr(Demonstrations, "context", begin)
    new_inputs(base(tiny_llama), KEPT, 40, 1, [LINE], "key")
    assert set(read[1:]) == {(0, 1), (1, 0)} and len(read) == 41


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[1, 5, 8, 3, 4], [1, 6, 3, 4]], [3, 4]),
        ([[1, 5, 4, 6, 4], [1, 7, 4]], []),
        ([[1, 5], [1, 6]], []),
        ([[1], [1, 5]], []),
    ],
    ids=["own", "full stop", "none", "no rest"],
)
def test_the_common_closing(prompts, expected):
    assert common_closing(prompts, [1]) == expected


def test_examples_are_drawn_as_far_as_there_is_room():
    examples = [Encoded([1] * n, [2], False) for n in (3, 50, 4, 5, 6)]
    lengths = {tuple(len(example) for example in chosen(examples, 2, 20, seed)) for seed in range(20)}
    assert all(len(pair) == 2 and sum(pair) <= 20 and 51 not in pair for pair in lengths)
    assert len(lengths) > 3 and chosen(examples, 2, 20, 1) == chosen(examples, 2, 20, 1)
    assert len(chosen(examples, 9, 12, 0)) < 4 and chosen(examples, 2, 3, 0) == []


def assert_nearest(found: list[int], x: torch.Tensor, *key) -> None:
    """One row of each cluster, and none is nearer to its centroid; up to rounding, since in a cluster of two
    both are as near."""
    members = {}
    for row in range(len(x)):
        distances = [(x[row] - centroid).norm().item() for centroid in kmeans(x, len(found), *key)]
        members.setdefault(distances.index(min(distances)), {})[row] = min(distances)
    most = max(max(rows.values()) for rows in members.values())
    assert len(members) == len(found) == len(set(found)) and found == sorted(found)
    for rows in members.values():
        (own,) = rows.keys() & set(found)
        assert rows[own] <= min(rows.values()) + 1e-4 * most


def test_the_rows_nearest_to_the_centroids_are_kept():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(3)).double()
    assert_nearest(nearest_to_centroids(x, 8, "key"), x, "key")
    noise = 1e-7 * torch.randn(60, 5, generator=torch.Generator().manual_seed(4)).double()
    assert nearest_to_centroids(x + noise, 25, "key") == nearest_to_centroids(x, 25, "key")
    assert nearest_to_centroids(x, 60, "key") == list(range(60))


def test_where_rows_coincide_there_are_as_many_as_wanted():
    x = torch.tensor([[0.0, 1.0], [4.0, 5.0]]).repeat(4, 1)
    found = nearest_to_centroids(x, 5, "key")
    assert len(set(found)) == 5 and {0, 1} == {row % 2 for row in found}


def test_inputs_are_clustered_by_their_mean_states(tiny_llama):
    """Of one prompt at a time, without padding; a state's length does not count."""
    model = base(tiny_llama)
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 300, (3 + i % 5,), generator=draw).tolist() for i in range(40)]
    states = []
    for prompt in prompts:
        made = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        mean = made.hidden_states[-1][0].double().mean(0)
        states.append(mean / mean.norm())
    found = [prompts.index(prompt) for prompt in diverse(model, prompts, 6, "key")]
    assert_nearest(found, torch.stack(states), "diverse inputs", "key")
    assert diverse(model, prompts, 40, "key") == prompts


def test_a_restart_dreams_the_same(tiny_llama, monkeypatch, tmp_path):
    method, model, state = after_a_task(tiny_llama, monkeypatch)
    method.begin_task(model, at_task(1, state))
    save_tensors(state, tmp_path / "state.safetensors")
    again = Dream(method.config, 7)
    again.begin_task(model, at_task(1, load_file(tmp_path / "state.safetensors")))
    assert again._dreams == method._dreams
    third = method.end_task(model, at_task(1, state), None)
    assert Demonstrations.load(third, 0) == Demonstrations.load(state, 0)
    assert Demonstrations.load(third, 1).state(1).keys() == third.keys() - state.keys() - {"prefix.1"}


def test_what_is_kept_of_a_task(tiny_llama, monkeypatch):
    """Only examples that are whole, and that leave room for an input in the model's 256 positions."""
    method, model, state = after_a_task(tiny_llama, monkeypatch)
    kept = Demonstrations.load(state, 0)
    assert len(kept.examples) == 2 and all(example in EXAMPLES for example in kept.examples)
    assert (kept.opening, kept.closing, kept.ends) == ([1, 5, 9], [MARK], frozenset([2]))
    long = Encoded([1, 5, 9, *[15] * 240, MARK], [20, 2], False)
    cut = Encoded([1, 5, MARK], [20, 2], True)
    found = method.end_task(model, at_task(0, {}, [long, cut, EXAMPLES[0]]), None)
    assert Demonstrations.load(found, 0).examples == [EXAMPLES[0]]


def test_too_few_inputs_are_told(tiny_llama, monkeypatch, caplog):
    """In one token no input comes to its end; sequences from BOS take their place."""
    method, model, state = after_a_task(tiny_llama, monkeypatch)
    method.begin_task(model, at_task(1, state))
    assert not caplog.messages
    method.config = method.config.model_copy(update={"input_tokens": 1})
    method.begin_task(model, at_task(1, state))
    assert "how many of those wanted: ONE 0 of 8)" in caplog.text and len(caplog.messages) == 1
    assert len(method._dreams) == 10 and all(len(example.prompt) == 2 for example in method._dreams)


def test_a_task_of_which_no_example_fits_is_dreamt_from_its_opening(tiny_llama, monkeypatch):
    method, model, state = after_a_task(tiny_llama, monkeypatch)
    long = [Encoded([1, 5, 9, token, *[15] * 240, MARK], [20, 2], False) for token in (11, 12)]
    state = method.end_task(model, at_task(0, {}, long), None)
    assert Demonstrations.load(state, 0).examples == []
    method.begin_task(model, at_task(1, state))
    assert len(method._dreams) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": "demonstrations", "fresh": True}, "set 'fresh' to false, or 'inputs' to beginnings"),
        ({"demonstrations": 3}, "'demonstrations' has no effect with inputs 'beginnings'; remove it"),
        ({"input_tokens": 9}, "'input_tokens' has no effect with inputs 'beginnings'; remove it"),
        ({"input_weight": 0.5}, "'input_weight' has no effect .* set inputs to learnt"),
        ({"inputs": "learnt", "input_tokens": 9}, "'input_tokens' has no effect with inputs 'learnt'"),
        ({"inputs": "shots"}, "inputs: 'shots' is not valid; .*'learnt' or 'demonstrations'"),
        ({"inputs": "demonstrations", "demonstrations": 0}, "demonstrations: 0 is not valid"),
    ],
    ids=["fresh", "demonstrations", "tokens", "weight", "learnt", "unknown", "none"],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(Fault, match=message):
        METHODS["dream"].Config(**settings)


def test_an_input_must_leave_room_for_demonstrations(tiny_llama):
    """In 256 positions, with a beginning of up to 64 tokens and an answer of up to 48."""
    config = AutoConfig.from_pretrained(tiny_llama)
    for tokens, faults in ((143, 0), (144, 1)):
        method = Dream(Dream.Config(inputs="demonstrations", input_tokens=tokens), 0)
        found = method.check(config, None)
        assert len(found) == faults and all("256 positions; lower input_tokens" in text for text in found)
    assert Dream(Dream.Config(sample_tokens=1000), 0).check(config, None) == []

"""Methods against what their authors' code does."""

from types import SimpleNamespace

import pytest
import torch
from adapters import a_task, attached, drawn
from hypothesis import given
from hypothesis import strategies as st

from codyra_llm.config.methods.experts import ExpertConfig
from codyra_llm.config.registry import METHODS
from codyra_llm.data.batches import Batch
from codyra_llm.lora.layer import sites
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.experts import hidelora
from codyra_llm.methods.experts.hidelora import mean_adapter
from codyra_llm.methods.projection.gem import multipliers
from codyra_llm.methods.regularised.treelora_repo import first_split


def groups_of_the_tree(saved):
    """The root's children by the rule of the released tree: at or above torch's median to the left, below it
    to the right, halves where one side is empty."""
    vectors = torch.cat([saved[:1], saved.diff(dim=0)])[:, 0]
    similarity = [float(v @ vectors.mean(0)) for v in vectors]
    median = sorted(similarity)[(len(similarity) - 1) // 2]
    left = [k for k, s in enumerate(similarity) if s >= median]
    right = [k for k, s in enumerate(similarity) if s < median]
    half = len(similarity) // 2
    return [left, right] if left and right else [list(range(half)), list(range(half, len(similarity)))]


@given(st.integers(2, 8), st.integers(0, 2**31))
def test_the_first_split_is_that_of_the_released_tree(tasks, seed):
    saved = torch.randn(tasks, 3, 5, generator=torch.Generator().manual_seed(seed))
    assert [part for part, _ in first_split(saved)] == groups_of_the_tree(saved)


def test_the_first_split_of_equal_tasks_is_by_halves():
    """Differences that are all alike: nothing lies below the median."""
    saved = torch.ones(5, 1, 2).cumsum(0)
    assert [part for part, _ in first_split(saved)] == [[0, 1], [2, 3, 4]]


def test_the_authors_energy_for_language_models_is_the_default():
    assert METHODS["inflora"].Config().energy_first == METHODS["duallora"].Config().energy_first == 0.995


def test_methods_with_an_adapter_per_task_have_its_published_size():
    """Rank 8 and alpha 32 on TRACE, and in GainLoRA's scripts for the long stream: a scale of 4."""
    found = [kind.Config() for kind in METHODS.values() if issubclass(kind.Config, ExpertConfig)]
    names = {config.name for config in found}
    assert names == {"single", "hidelora", "color", "sapt", "duallora", "gainlora"}
    assert {(config.rank, config.alpha) for config in found} == {(8, 32.0)}


def test_sdft_s_divergence_is_that_of_its_authors_results():
    """KL(teacher ‖ student) on the student's answers, `alpha` 0 in their trainer."""
    assert METHODS["sdft"].Config().divergence == "forward"


def test_hidelora_s_momentum():
    """After each task A ← 0.9 A + 0.1 (mean of the earlier tasks' A), B alike, as archived."""
    method = METHODS["hidelora"](METHODS["hidelora"].Config(), 0)
    assert method.config.momentum == 0.1
    adapters = [Adapter(torch.full((2, 3), v), torch.full((4, 2), -v), None) for v in (1.0, 3.0, 10.0)]
    method._past = {"site": mean_adapter(adapters[:2])}
    found = method.consolidate({"site": adapters[2]}, 2).adapters["site"]
    torch.testing.assert_close(found.a, torch.full((2, 3), 9.2))
    torch.testing.assert_close(found.b, torch.full((4, 2), -9.2))


def test_hidelora_s_features_are_those_of_the_adapter_that_is_archived(monkeypatch):
    """Momentum comes before the pass over the prompts, and once."""
    method, model = attached("hidelora")
    drawn(model, 1)
    trained, past = {}, {}
    for site, layer in sites(model).items():
        trained[site] = Adapter(layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), None)
        past[site] = Adapter(torch.ones_like(layer.lora_A), torch.ones_like(layer.lora_B), None)
    method._past, method._old, method._examples = past, torch.ones(1, 2), []
    method._gaussians, read = SimpleNamespace(state=lambda: {}), {}

    def reading(*_):
        for site, layer in sites(model).items():
            read[site] = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        return torch.tensor([[2.0, 4.0], [4.0, 8.0]])

    monkeypatch.setattr(hidelora, "over_prompts", reading)
    state = method.end_task(model, a_task(1), None)
    assert state["adapted"].tolist() == [[1.0, 1.0], [3.0, 6.0]]
    for site, archived in method.consolidate(trained, 1).adapters.items():
        for factor, own, seen in zip(archived[:2], trained[site][:2], read[site], strict=True):
            torch.testing.assert_close(factor, 0.9 * own + 0.1)
            torch.testing.assert_close(seen, factor)


def test_gem_without_margin_leaves_alone_what_is_not_in_conflict():
    """The control that tells gem from replay at half weight: with γ = 0.5 a conflict with one earlier task
    has every earlier gradient enter with at least a half."""
    gradients = torch.eye(3).double().numpy()
    products = -torch.tensor([1.0, -2.0, -3.0]).double().numpy()  # only the first is in conflict: below 0
    assert multipliers(gradients @ gradients.T, products, 0.0, 1e-9) == pytest.approx([1, 0, 0])
    assert multipliers(gradients @ gradients.T, products, 0.5, 1e-9) == pytest.approx([1, 0.5, 0.5])


def test_olora_s_weight_means_the_same_at_any_size():
    """Twice the sites, or twice the rank with rows as alike: the same penalty."""
    found = []
    for names, rank in ((["q_proj"], 2), (["q_proj", "v_proj"], 2), (["q_proj"], 4)):
        method = METHODS["olora"](METHODS["olora"].Config(rank=rank, targets=names, lambda_orthogonal=3.0), 0)
        model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in names})
        method.attach(model)
        with torch.no_grad():
            for name in names:
                model[name].lora_A.fill_(0.5)
        past = {name: Adapter(torch.full((rank, 4), 0.25), torch.zeros(4, rank), None) for name in names}
        archive = SimpleNamespace(load=lambda k, past=past: SimpleNamespace(adapters=past))
        method._pairs, task = None, SimpleNamespace(index=1, archive=archive)
        begun(method, model, task)
        found.append(method.penalty(model)["orthogonal"].item())
    assert found == pytest.approx([3.0 * 4 * 0.5 * 0.25] * 3)


def begun(method, model, task):
    """`begin_task` with the adapters left as they are."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    method.begin_task(model, task)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(kept[name])


def test_ilora_s_reservoir_is_uniform():
    """Each example of the earlier tasks is as likely to be kept."""
    counts = torch.zeros(30)
    task = SimpleNamespace(index=2, records=lambda past: list(range(past * 10, past * 10 + (10, 20)[past])))
    for seed in range(600):
        method = METHODS["ilora"](METHODS["ilora"].Config(memory=6), seed)
        kept = method._reservoir(task)
        assert len(set(kept)) == 6
        counts[kept] += 1
    assert (counts / 600 - 0.2).abs().max() < 0.08


class States:
    """A stand-in for a model: hidden states that are given, and no layer with an adapter."""

    training = False
    config = SimpleNamespace(model_type="llama")

    def __init__(self, states):
        self.states = states

    def get_submodule(self, name):
        return getattr(self, name)

    def modules(self):
        return []

    def named_modules(self):
        return []

    def model(self, input_ids, use_cache, output_hidden_states):
        return SimpleNamespace(hidden_states=self.states.pop(0))


def test_ilora_draws_states_up_to_the_slow_ones_only():
    """mean over layers, positions without pads and dimensions of (h - max(h, g))², g the slow ones'."""
    draw = torch.Generator().manual_seed(0)
    fast, slow = ([torch.randn(2, 4, 3, generator=draw) for _ in range(5)] for _ in range(2))
    method = METHODS["ilora"](METHODS["ilora"].Config(weight=2.0), 0)
    method._slow = {}
    lengths = [4, 2]
    ids = torch.zeros(2, 4, dtype=torch.long)
    none = torch.zeros(0)
    batch = Batch(ids, None, none, none, none, [0, 1], [[], []], [0, 0])
    found = method._distance(States([fast, slow]), batch, lengths, 6)
    terms = [
        (h[row, :n] - torch.maximum(h[row, :n], g[row, :n])).square().flatten()
        for h, g in zip(fast, slow, strict=True)
        for row, n in enumerate(lengths)
    ]
    torch.testing.assert_close(found, torch.cat(terms).mean())


def test_ilora_s_step_is_the_mean_of_the_two_losses():
    """½ (CE of the batch + CE of memory): the step's gradient halved, plus that of memory's half."""
    method = METHODS["ilora"](METHODS["ilora"].Config(batch=3, weight=0.0), 0)
    method._buffer, method._index, method._step = list("abcdef"), 1, 5
    asked = []
    gradients = SimpleNamespace(
        step=[torch.tensor([2.0, 4.0])],
        mean=lambda examples, loss: asked.append(examples) or [torch.tensor([10.0, 20.0])],
    )
    method.edit_gradients(gradients)
    torch.testing.assert_close(gradients.step[0], torch.tensor([11.0, 22.0]))
    method.edit_gradients(gradients)
    assert len(set(asked[0])) == 3 and asked[0] == asked[1]
    method._step = 6
    method.edit_gradients(gradients)
    assert asked[2] != asked[0], "another batch in every step"

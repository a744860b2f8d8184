"""What of a task's steps has a schedule of its own, and what the schedules of the threshold come to."""

import pytest

from codyra_llm.config.methods.sequential import CodyraConfig, SeqLoraConfig
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.lora.proximal import lr_factor
from codyra_llm.methods.sequential.codyra import PUBLISHED_TOTAL, shrink
from codyra_llm.train.task_data import TaskData


class Stream:
    """Two tasks of 20 and 16 records, three epochs each, and two records that belong to neither."""

    epochs, tasks = [3, 3], ["ONE", "TWO"]

    def records(self, index, split):
        return [{"prompt": f"{index} {i}", "answer": "x"} for i in range((20, 16)[index])]

    def extra(self, name):
        if name == "gone":
            raise Fault("x/gone doesn't exist; add it.")
        return [{"prompt": name, "answer": "x"}] * 2


def data(**config):
    method = METHODS["replay"](METHODS["replay"].Config(ratio=0.5, **config), 0)
    records, epochs = method.train_data(Stream(), 1)
    return TaskData("TWO", 1, records, epochs, [], method.epochs_apart(Stream(), 1))


def test_the_memory_epoch_has_a_schedule_of_its_own():
    """At the tail of the task's cosine its rate would be next to none: replay would be off."""
    task = data(when="after", general="Lima")
    steps = task.steps(4)
    assert steps == 3 * 4 + 3 and task.apart == 1
    factors = [lr_factor("cosine", *task.phase(step, 4)) for step in range(steps)]
    assert factors[:12] == [lr_factor("cosine", step, 12) for step in range(12)]
    assert factors[12:] == [lr_factor("cosine", step, 3) for step in range(3)] and factors[12] == 1


@pytest.mark.parametrize("config", [{"when": "mixed"}, {"when": "after", "ratio": 0.0, "general": None}])
def test_without_an_epoch_apart_there_is_one_schedule(config):
    method = METHODS["replay"](METHODS["replay"].Config(**config), 0)
    records, epochs = method.train_data(Stream(), 1)
    task = TaskData("TWO", 1, records, epochs, [], method.epochs_apart(Stream(), 1))
    assert task.apart == 0
    assert [task.phase(step, 4) for step in (0, 7)] == [(0, task.steps(4)), (7, task.steps(4))]


def test_a_general_set_is_replayed_by_name():
    found = {name: data(general=name).examples for name in ("Lima", "mine", None)}
    assert [row["prompt"] for row in found["mine"][-2:]] == ["mine"] * 2
    assert found["Lima"][:-2] == found["mine"][:-2] == found[None]
    for name, told in (
        ("ONE", "'ONE' is one of data.tasks; give a set"),
        ("gone", "x/gone doesn't exist; add it; give"),
    ):
        with pytest.raises(Fault, match=f"^method.general: {told}.* or null"):
            data(general=name)


def test_replay_mixes_by_default():
    assert METHODS["replay"].Config().when == "mixed"


@pytest.mark.parametrize("steps", [6, 39, 500])
def test_the_published_total_at_any_length(steps):
    threshold = CodyraConfig(threshold={"schedule": "published-ramp"}).threshold
    kappas = [shrink(threshold, step, steps, "cosine") for step in range(steps)]
    sparse = kappas[steps // 2 :]
    assert sum(kappas) == pytest.approx(PUBLISHED_TOTAL) and not any(kappas[: steps // 2])
    assert all(b - a == pytest.approx(sparse[0]) for a, b in zip(sparse, sparse[1:], strict=False))


def foreseen(steps, **threshold):
    config = CodyraConfig(align=False, importance_init="normal", threshold=threshold)
    method = METHODS["codyra"](config, 0)
    return method.remarks(None, steps, "cosine")


def test_what_is_pruned_is_foreseen():
    literal = {"schedule": "published", "operator": "released"}
    nothing = ["the threshold will prune nothing in 39 steps: all its κ are 0"]
    assert foreseen([39, 39, 500], **literal) == nothing
    (sentence,) = foreseen([500, 6000], **literal)
    assert sentence.startswith("the threshold will prune everything in 6000 steps that training does not")
    assert foreseen([39], schedule="published-ramp") == []
    assert foreseen([39], budget=0.0) == nothing
    plain = METHODS["codyra"](CodyraConfig(selection="none"), 0)
    assert plain.remarks(None, [39], "cosine") == []


@pytest.mark.parametrize("align, told", [(True, 1), (False, 0)])
def test_the_largest_weight_is_1_after_alignment_whatever_it_starts_at(align, told):
    config = CodyraConfig(align=align, importance_value=3.0, threshold={"budget": 2.0})
    assert len(METHODS["codyra"](config, 0).remarks(None, [39], "cosine")) == told


def test_merge_scale_goes_with_merging():
    with pytest.raises(Fault, match="'merge_scale' is 0.8, but with 'fresh' false"):
        SeqLoraConfig(merge_scale=0.8)
    assert SeqLoraConfig(merge_scale=0.8, fresh=True).merge_scale == 0.8


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("seqlora", {"fresh": True, "alpha": 32.0}),
        ("olora", {"alpha": 32.0}),
        ("inflora", {"alpha": 32.0}),
        ("codyra", {"scale": 2.0, "selection": "none"}),
        ("codyra_drift", {"scale": 2.0, "merge_weight": 0.0}),
    ],
)
def test_merge_scale_is_a_factor_on_the_update(name, config):
    kind = METHODS[name]
    method = kind(kind.Config(rank=16, merge_scale=0.75, **config), 0)
    method._old = {}
    assert method.consolidate({}, 0).scale == 1.5


@pytest.mark.parametrize(
    "count, size, expected",
    [
        (8, 4, [4, 4]),
        (7, 4, [4, 3]),
        (6, 4, [4, 2]),  # half a batch
        (5, 4, [2, 3]),  # not a step for one example
        (3, 4, [3]),
        (513, 128, [102, 103, 102, 103, 103]),
        (500, 128, [128, 128, 128, 116]),
    ],
)
def test_no_step_is_made_for_a_few_examples_left_over(count, size, expected):
    data = TaskData("T", 0, [None] * count, [range(count)] * 2, [])
    batches = list(data.batches(0, size))
    assert [len(batch) for batch in batches] == expected * 2 and data.steps(size) == len(batches)
    for epoch in (batches[: len(expected)], batches[len(expected) :]):
        assert sorted(i for batch in epoch for i in batch) == list(range(count))

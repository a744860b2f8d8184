"""Recorded micro-batches: pads change neither loss nor gradients, all micro-batches of a step are summed, and
what can't be recorded runs as usual."""

from contextlib import contextmanager
from types import SimpleNamespace

import pretended_graph
import pytest
import torch
from full_memory import ERRORS
from packed import batch, examples, loaded

from codyra_llm.config.registry import METHODS
from codyra_llm.config.sections import OptimSection
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.lora.shared import share_inputs, shared_inputs
from codyra_llm.lora.together import deferred, finish_gradients
from codyra_llm.methods.base import Method
from codyra_llm.models.attention import packed_attention
from codyra_llm.runtime.launch import accelerator
from codyra_llm.train import recorded
from codyra_llm.train.recorded import Recorder, can_record, padded, shape_of
from codyra_llm.train.task_data import TaskData
from codyra_llm.train.trainer import Trainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def model(tiny_llama):
    made = loaded(tiny_llama).requires_grad_(False)
    attach(made, TARGETS, AdapterSpec(3, importance="normal"))
    torch.manual_seed(0)
    for name, layer in sites(made).items():
        layer.reset(0, name)
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    share_inputs(made)
    packed_attention.use(made)
    return made.double()


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients, which are then dropped."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def usual(model, batches) -> tuple[list, dict]:
    losses = [given.cross_entropy(model) for given in batches]
    sum(losses).backward()
    return [loss.detach() for loss in losses], gradients(model)


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lengths", [[(3, 2)], [(60, 3)], [(37, 4), (1, 2), (20, 3)], [(300, 9), (200, 2)]])
def test_pads_change_nothing(model, lengths):
    given = batch(examples(lengths), packed=True)
    shape = shape_of(given)
    filled = padded(given, shape)
    assert filled.ids.shape == filled.positions.shape == (1, shape.tokens)
    assert len(filled.ends) == shape.segments + 1 and int(filled.ends.diff().max()) <= shape.longest
    assert len(filled.targets) == len(filled.predictors) == len(filled.weights) == shape.labelled
    (loss,), expected = usual(model, [given])
    (found,), own = usual(model, [filled])
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    same(own, expected)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000, 1024, 1025, 1500, 5000, 8192])
def test_pads_are_few(count):
    given = batch(examples([(count - 1, 1)]), packed=True)
    shape = shape_of(given)
    assert 0 <= shape.tokens - count <= max(255, count / 8)
    if count in (256, 1024, 8192):
        assert shape.tokens == count


def test_steps_of_recorded_and_other_micro_batches_have_the_same_gradients(model, monkeypatch):
    """`again` stands for a CUDA graph: it runs when it is replayed, from the tensors of the first batch. On a
    CPU attention reads the segments' lengths on the host, so here they are the same for each shape."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    replayed = []

    def again(work):
        return lambda: (replayed.append(1), work())

    shared = shared_inputs(model)
    recorder = Recorder(shared, lambda given: given.cross_entropy(model), torch.device("cpu"), lambda: again)
    pairs = [(37, 4), (37, 4), (290, 3), (37, 4), (550, 7)]
    for step in range(6):
        batches = [batch(examples([pair], seed=step), packed=True) for pair in pairs]
        losses, expected = usual(model, batches)
        recorder.begin_step()
        found = []
        with deferred(shared):
            for given in batches:
                loss = recorder.run(given)
                if loss is None:
                    loss = given.cross_entropy(model)
                    loss.backward()
                found.append(loss.detach())
        finish_gradients(shared)
        torch.testing.assert_close(found, losses, rtol=1e-12, atol=0)
        same(gradients(model), expected)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.mul_(1.01)  # an optimizer writes in place
    assert len(recorder.recordings) == 3 and len(replayed) > 20
    assert recorder.free() and recorder.made == 3 and not recorder.recordings


def test_a_shape_runs_as_usual_until_it_was_seen_often_enough(model):
    recorder = Recorder(shared_inputs(model), lambda given: 1 / 0, torch.device("cpu"), lambda: None)
    given = batch(examples(), packed=True)
    assert [recorder.run(given) for _ in range(recorded.SEEN)] == [None] * recorded.SEEN
    assert recorder.run(batch(examples(), packed=False)) is None
    recorder.stop()
    assert recorder.run(given) is None


def test_where_memory_is_short_nothing_more_is_recorded(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (49, 100))
    recorder = Recorder(shared_inputs(model), lambda given: 1 / 0, torch.device("cpu"), lambda: None)
    given = batch(examples(), packed=True)
    assert [recorder.run(given) for _ in range(recorded.SEEN + 3)] == [None] * (recorded.SEEN + 3)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs that are not there."""
    for name, own in pretended_graph.NAMES.items():
        monkeypatch.setattr(torch.cuda, name, own)


def test_memory_that_was_given_back_is_not_asked_for_again(graphs):
    recorder = Recorder([], lambda given: given, torch.device("cuda"))
    replay = recorder.record(list)
    replay()
    del replay
    recorder.free()
    recorder.record(list)()


def test_recordings_of_others_may_go(graphs):
    """With any of them goes memory of all that were recorded on its stream."""
    one, other = (Recorder([], lambda given: given, torch.device("cuda")) for _ in range(2))
    replay, others = one.record(list), other.record(list)
    others()
    del others
    replay()


def test_a_recording_that_fails_leaves_the_stream_as_it_was(graphs, monkeypatch):
    """torch.cuda.graph leaves its own the current one."""
    now = ["usual"]

    class Failing(pretended_graph.Recording):
        def __enter__(self):
            now.append("capture")

        def __exit__(self, *raised):
            raise torch.AcceleratorError("CUDA error: out of memory")

    @contextmanager
    def put_back(stream):
        before = now[-1]
        try:
            yield
        finally:
            now.append(before)

    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "stream", put_back)
    with pytest.raises(torch.AcceleratorError):
        Recorder([], lambda given: given, torch.device("cuda")).record(list)
    assert now == ["usual", "capture", "usual"]


class Full:
    """Stands for a recorder whose recordings leave no memory to anything else."""

    def __init__(self, made):
        self.stopped, self.made = False, made

    def begin_step(self):
        pass

    def run(self, given):
        if not self.stopped:
            raise self.made()

    def stop(self):
        had, self.stopped = not self.stopped, True
        return had

    def free(self):
        return False


def trainer(model, method) -> Trainer:
    optim = OptimSection(
        lr=1e-3,
        schedule="constant",
        batch_size=5,
        betas=(0.9, 0.99),
        loss_average="token",
        micro_batch_tokens=200,
    )
    return Trainer(accelerator(), method, model, optim, pad=0, batching="packed")


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_frees_recordings_before_micro_batches_are_cut(error, model):
    method = METHODS["codyra"](METHODS["codyra"].Config(), 0)
    made = trainer(model, method)
    made.engine.recorder = Full(error)
    rows = list(made.fit(TaskData("T", 0, examples(), [range(5)] * 2, []), 1))
    assert made.engine.recorder.stopped and {row.micro_batch_tokens for row in rows} == {200}
    made.free()


def test_a_penalty_without_a_gradient_adds_nothing_to_a_replayed_micro_batch(model):
    class Penalised(METHODS["codyra"]):
        def penalty(self, model):
            return {"none": torch.zeros(())}

    made = trainer(model, Penalised(METHODS["codyra"].Config(), 0))
    made.engine.recorder = SimpleNamespace(begin_step=list, run=lambda given: torch.ones(()), free=list)
    terms = made.engine.accumulate(batch(examples(), packed=True), first=True, last=True)
    assert list(terms) == ["loss", "none"] and float(terms["loss"]) == 1
    made.free()


def test_what_can_be_recorded(model, tiny_llama, monkeypatch):
    method = METHODS["codyra"](METHODS["codyra"].Config(), 0)
    shared = shared_inputs(model)
    assert not can_record(model, method), "without the kernel, lengths are read on the host"
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda *given: True)
    assert can_record(model, method)
    other = type("Other", (Method,), {"loss": lambda self, model, batch: {}})
    assert not can_record(model, other(METHODS["codyra"].Config(), 0))
    model.model.norm.weight.requires_grad_()
    assert not can_record(model, method)
    model.model.norm.weight.requires_grad_(False)
    spec = shared[0].layers[0].spec
    shared[0].layers[0].spec = SimpleNamespace(scale=1.0, dropout=0.1)
    assert not can_record(model, method)
    shared[0].layers[0].spec = spec
    model.gradient_checkpointing_enable()
    assert not can_record(model, method)
    assert not can_record(loaded(tiny_llama), method), "its rows are padded"

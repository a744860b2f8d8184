"""The benchmark's levels, its gate and its meter; the estimates of `plan` against what a step takes."""

import json
from types import SimpleNamespace

import outlived
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from codyra_llm.bench import arms, head, layers, measured, options, step
from codyra_llm.cli import main
from codyra_llm.config.methods.base import PROJECTIONS
from codyra_llm.data.batches import collate, example_weights
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.models import families
from codyra_llm.models.loading import checkpoint_layers
from codyra_llm.runtime.memory import Meter, ProcessPeak, peak_bytes, saved_bytes
from codyra_llm.train import estimate
from codyra_llm.train.estimate import (
    Depth,
    Timed,
    activation_bytes,
    depth,
    matmul_speed,
    step_flops,
    step_seconds,
    total_seconds,
)

CPU = torch.device("cpu")
ALL = ["frozen", "peft", "peft-strong", "eager", "ours"]


def bench(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *map(str, args)])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


@pytest.fixture
def levels(tiny_llama, toy_stream):
    return {
        "linear": ["--shape", "12,8,20,3"],
        "block": ["--shape", "2,6,3", "--model", tiny_llama],
        "head": ["--shape", "48,8,40,16"],
        "step": [
            "--model",
            tiny_llama,
            "--data",
            toy_stream,
            "--tasks",
            "ONE,THREE",
            "--batch",
            "3",
            "--examples",
            "5",
        ],
    }


@pytest.mark.parametrize(
    "level, expected", [("linear", ALL), ("block", ALL), ("head", list(head.ARMS)), ("step", ALL)]
)
def test_a_level_measures_every_arm(level, expected, levels, capsys):
    code, out, _ = bench(capsys, level, *levels[level], "--rounds", 2, "--device", "cpu", "--json")
    result = json.loads(out)
    assert code == 0 and list(result["arms"]) == expected and result["machine"]["threads"]
    for row in result["arms"].values():
        spread = row["milliseconds"]
        assert (
            0 < spread["p20"] <= spread["median"] <= spread["p80"]
            and row["peak_bytes"] > 0
            and row["error"] < 1e-4
        )
        assert row["over_floor"] is None or row["over_floor"] > 0
    assert result["arms"][result["arms"][expected[-1]]["over"]]["speedup"]["median"] == 1
    if level == "step":  # 2 tasks of 5 examples in batches of 3: four steps a round, twice
        rates = [row["tokens_per_second"] * row["seconds"] for row in result["arms"].values()]
        assert "4 batches of 3" in result["shape"] and rates == pytest.approx([rates[0]] * 5)


def test_the_table_and_other_families_and_dtypes(tiny_gemma3, capsys):
    code, out, _ = bench(
        capsys,
        "block",
        "--shape",
        "2,6,3",
        "--model",
        tiny_gemma3,
        "--rounds",
        2,
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--arms",
        "peft,ours",
    )
    assert code == 0 and "speed over" in out and "floor" not in out and "ours" in out and "measured on" in out


@pytest.mark.parametrize("level", ["linear", "block", "step"])
def test_a_wrong_arm_is_told_and_not_timed(level, levels, capsys, monkeypatch):
    def without_w(base, numbers):
        return arms.weighted(
            base, {site: (a, torch.ones_like(w), b) for site, (a, w, b) in numbers.items()}, True
        )

    monkeypatch.setitem(arms.ARMS, "ours", without_w)
    code, out, err = bench(capsys, level, *levels[level], "--rounds", 1, "--json")
    assert code != 0 and not out and "arm ours" in err and "arm peft" not in err


def test_an_arm_that_forgets_a_gradient_is_told(capsys, monkeypatch, levels):
    def cut(base, numbers):
        arm = arms.weighted(base, numbers, True)
        next(iter(sites(arm.model).values())).lora_w.requires_grad_(False)
        return arm

    monkeypatch.setitem(arms.ARMS, "ours", cut)
    code, _, err = bench(capsys, "linear", *levels["linear"], "--rounds", 1)
    assert code != 0 and "dw is 1 away" in err


def test_a_loss_that_counts_the_prompt_is_told(capsys, monkeypatch, levels):
    monkeypatch.setitem(
        head.ARMS, "labelled", lambda model, batch, labels: head.full(model, batch, batch.ids)
    )
    code, _, err = bench(capsys, "head", *levels["head"], "--rounds", 1)
    assert code != 0 and "arm labelled" in err


@pytest.mark.parametrize(
    "args, message",
    [
        (["liner"], "Did you mean 'linear'?"),
        (["linear", "--shape", "3,4"], "N,in,out,r"),
        (["linear", "--shape", "x"], "whole"),
        (["head", "--shape", "8,4,9,8"], "labelled"),
        (["linear", "--arms", "our"], "choose from"),
        (["linear", "--dtype", "bf16"], "bfloat16"),
        (["linear", "--device", "tpu"], "--device: 'tpu'"),
    ],
)
def test_mistakes_are_one_sentence(args, message, capsys):
    code, _, err = bench(capsys, *args)
    assert code == 2 and message in err and "Traceback" not in err


def test_no_graph_is_alive_where_the_next_piece_may_be_recorded():
    """CUDA would refuse to record it."""
    p, left = nn.Parameter(torch.ones(2)), []

    def pieces(arm, batch):
        for _ in range(3):
            left.append(outlived.is_left(p))
            losses = [(2 * p).sum()]
            outlived.mark(p)
            yield losses.pop()

    total = step._forward_backward(arms.Arm(nn.Module()), pieces, [], CPU)
    assert left == [False] * 3 and total == 12 and p.grad.tolist() == [6, 6]


def test_the_meter_counts_storages_while_they_live():
    before = torch.ones(100)
    with Meter() as meter:
        view = before.view(10, 10).T
        before.mul_(2)
        assert (meter.live, meter.peak) == (
            0,
            0,
        )  # a view of what was there before, and an operation in place
        a = view + 1  # 400 bytes
        b = a[:5].double()  # 50 doubles: 400 bytes
        assert meter.live == 800
        c = a.T
        del a, view
        assert meter.live == 800  # c holds it
        del c
        assert meter.live == 400
        del b
    assert (meter.live, meter.peak) == (0, 800)


@pytest.mark.skipif(not ProcessPeak.STATUS.is_file(), reason="only Linux tells a process's memory")
def test_the_peak_of_the_process_starts_anew():
    peak = ProcessPeak(torch.device("cpu"))
    size = 200 << 20
    peak.restart()
    torch.ones(size // 4).sum()
    first = peak.read()
    peak.restart()
    assert size * 0.9 < first < size * 1.3 and peak.read() < first - size * 0.9


def test_a_peak_that_is_not_told_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(ProcessPeak, "STATUS", tmp_path / "none")
    peak = ProcessPeak(torch.device("cpu"))
    peak.restart()
    assert peak.read() is None


def test_the_meter_sees_what_autograd_keeps_and_backward():
    x = torch.ones(50, requires_grad=True)  # 200 bytes

    def action():
        y = x.exp()  # kept for backward
        z = y.sin()  # keeps y; only the sum reads z
        total = z.sum()  # 4 bytes
        del y, z
        assert meter.live == 204 and meter.peak == 404
        total.backward()

    with Meter() as meter:
        action()
    # backward: 1's [], y, cos(y) and its product with the expanded 1, all 50 wide, is the most at once.
    assert meter.peak >= 604 and meter.live == 200 and x.grad.shape == (50,)
    assert saved_bytes(lambda: x.exp().sin().sum(), [x]) == 200
    assert peak_bytes(lambda: torch.ones(7), CPU) == 28


def training_model(folder, kind, layers=2, checkpointing=False, fused=True, attention=None, adapted=None):
    """The model of `folder` with adapters, on `kind` of tensors, as it trains; `adapted`: in these layers."""
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    with torch.device(kind):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).requires_grad_(False)
    attach(model, list(PROJECTIONS), AdapterSpec(4, importance="constant"), layers=adapted)
    for name, layer in sites(model).items() if kind == "cpu" else ():
        layer.reset(0, name)
    share_inputs(model, fused)
    if checkpointing:
        checkpoint_layers(model)
    return model.train()


def batch(rows=3, prompt=50, answer=10):
    encoded = [Encoded(list(range(3, 3 + prompt)), list(range(3, 3 + answer)), False)] * rows
    return collate(encoded, range(rows), example_weights(encoded, range(rows), "token"), 0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"checkpointing": True},
        {"fused": False},
        {"attention": "eager"},
        {"layers": 9},
        {"layers": 9, "checkpointing": True},
        {"layers": 9, "adapted": [5, 8]},
        {"layers": 9, "adapted": [5, 8], "checkpointing": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gemma2", "tiny_gemma3"])
def test_estimated_memory_is_what_a_step_takes(family, settings, request):
    """Gemma 3 here has windows shorter than the rows, and then transformers gives fake tensors masks in all
    layers.
    """
    folder, one = request.getfixturevalue(family), batch()
    estimate = activation_bytes(training_model(folder, "meta", **settings), one, CPU)
    model = training_model(folder, "cpu", **settings)
    allowed = 0.15 if family == "tiny_gemma3" else 0.01
    assert estimate == pytest.approx(
        peak_bytes(lambda: one.cross_entropy(model).backward(), CPU), rel=allowed
    )


@pytest.mark.parametrize("layers", [2, 9])
def test_estimated_memory_counts_the_prompts_in_front(layers, tiny_llama):
    """More positions than tokens, so that leaving them out would halve the estimate."""
    one, model = batch(), training_model(tiny_llama, "cpu", layers=layers)
    shape = 3, 70, model.config.hidden_size

    def step():
        one.cross_entropy(model, torch.zeros(shape, requires_grad=True)).backward()

    skeleton = training_model(tiny_llama, "meta", layers=layers)
    estimate = activation_bytes(skeleton, one, CPU, front=70)
    assert estimate == pytest.approx(peak_bytes(step, CPU), rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gemma3"])
def test_counted_operations_are_those_that_run(family, checkpointing, request):
    """Against PyTorch's own counter. Input gradients run down to the embeddings here, which the count
    assumes; a checkpoint's second forward stops where nothing more is saved, which it does not."""
    model = training_model(
        request.getfixturevalue(family), "cpu", checkpointing=checkpointing, fused=False, attention="eager"
    )
    model.enable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        batch(3, 50, 10).cross_entropy(model).backward()
    assert step_flops(model, 3 * 60, 3 * 60**2, 30) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("adapted", [[0], [5], [2, 4], [5, 0]], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_ends_at_the_first_layer_with_adapters(checkpointing, adapted, tiny_llama):
    """Against PyTorch's own counter; and how far it goes, against the layers whose input gets a gradient."""
    model = training_model(
        tiny_llama, "cpu", 6, checkpointing, fused=False, attention="eager", adapted=adapted
    )
    reached = set()
    for number, block in enumerate(families.blocks(model)):
        block.mlp.gate_proj.register_full_backward_hook(lambda *_, number=number: reached.add(number))
    with FlopCounterMode(display=False) as counter:
        batch(3, 50, 10).cross_entropy(model).backward()
    counted = counter.get_total_flops()
    assert step_flops(model, 3 * 60, 3 * 60**2, 30) == pytest.approx(counted, rel=0.05)
    first = min(adapted)
    assert depth(model) == (len(adapted), 6 - first - len(adapted), first)
    assert reached == set(range(first, 6))
    model.enable_input_require_grads()  # as where what trains stands in front of the layers
    assert depth(model) == (len(adapted), 6 - len(adapted), 0)


def test_the_probe_gives_the_speed_of_a_product():
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=64, intermediate_size=128))
    assert 1e7 < matmul_speed(model, 32, torch.float32, CPU) < 1e14


def test_two_timed_micro_batches_say_how_long_all_take():
    """Each takes 0.02 s, and 1e-9 s for an operation; two of one size, or noise, are taken in proportion."""

    def timed(operations, start=0.02):
        return Timed(operations, start + 1e-9 * operations)

    assert total_seconds(timed(8e8), timed(1e8), 50, 1e10) == pytest.approx(50 * 0.02 + 10)
    assert total_seconds(timed(8e8), timed(8e8), 10, 8e9) == pytest.approx(10 * 0.82)
    assert total_seconds(Timed(8e8, 0.5), Timed(1e8, 0.6), 10, 8e9) == pytest.approx(5)
    assert total_seconds(timed(8e8, -0.1), timed(1e8, -0.05), 10, 8e9) == pytest.approx(7)


@pytest.mark.parametrize(("each", "passes"), [(0.01, 4), (0.3, 3), (2.0, 2)])
def test_long_passes_are_timed_less_often(each, passes, monkeypatch):
    """One pass allocates; the others take half a second together, or there are three."""
    now, ran = [0.0], []

    class Slow:
        def to(self, device):
            return self

        def cross_entropy(self, model):
            now[0] += each
            ran.append(1)
            return model.weight.sum()

    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])
    assert estimate._seconds(torch.nn.Linear(2, 2), Slow()) == pytest.approx(each)
    assert len(ran) == passes


def test_seconds_of_many_layers_follow_from_a_few(tiny_llama, monkeypatch):
    """0.3 s in front of them; 0.1 s in each with adapters, 0.06 in one that backward goes through, 0.02 in
    one before."""
    asked = []

    def make(count, adapted):
        asked.append(count)
        own = range(count) if adapted is None else adapted
        return 0.3 + 0.1 * len(own) + 0.02 * own.start + 0.06 * (count - own.stop)

    monkeypatch.setattr(estimate, "_seconds", lambda seconds, *others: seconds)
    assert step_seconds(make, None, Depth(32, 0, 0)) == pytest.approx(3.5) and asked == [2, 4]
    assert step_seconds(make, None, Depth(3, 0, 0)) == pytest.approx(0.6) and asked == [2, 4, 3]
    assert step_seconds(make, None, Depth(0, 32, 0)) == pytest.approx(3.5)  # made alike by prompt methods
    for some in (Depth(1, 9, 0), Depth(1, 0, 9), Depth(3, 7, 10), Depth(30, 1, 1)):
        expected = 0.3 + 0.1 * some.adapted + 0.06 * some.passed + 0.02 * some.ended
        assert step_seconds(make, None, some) == pytest.approx(expected)
    monkeypatch.undo()
    model = training_model(tiny_llama, "cpu")
    assert 0 < step_seconds(lambda count, adapted: model, batch(3, 50, 10), Depth(2, 0, 0)) < 60


def test_options_take_the_device_there_is():
    made = options("cpu", None, "4,5", "peft,ours", None)
    assert made.dtype == torch.float32 and made.shape == (4, 5) and made.chosen(ALL) == ["peft", "ours"]
    assert arms.targets(layers.Linear(4, 5)) == ["q_proj"] and callable(measured)

"""Methods that constrain a LoRA adapter: each against its definition, against seqlora."""

import math

import pytest
import torch
from helpers import learnt
from safetensors.torch import load_file

from codyra_llm.config.registry import METHODS
from codyra_llm.core.files import read_jsonl
from codyra_llm.lora.update import Adapter
from codyra_llm.runtime import signals
from codyra_llm.store.folder import RunFolder

METHOD_SETTINGS = {
    "olora": {},
    "sora": {},
    "inflora": {"inputs_at_once": 3},
    "treelora": {"weight": 0.5},
    "treelora_repo": {"weight": 5.0},
    "hidelora_treelora_repo": {},
    "clora": {},
}


def baseline(name):
    """The seqlora that `name` is an addition to: with a fresh adapter per task, or with one for all."""
    return {"name": "seqlora", "fresh": True} if METHODS[name].Config().fresh else {"name": "seqlora"}


def tensors(folder):
    return {
        f"{f.name} {key}": value
        for f in sorted((folder.path / "updates").glob("*.safetensors"))
        for key, value in load_file(f).items()
    }


def losses(folder):
    return [row["loss"] for row in read_jsonl(folder.path / "log.jsonl")]


def assert_equal(one, two):
    assert losses(one) == losses(two) and len(losses(one)) == 18
    a, b = tensors(one), tensors(two)
    for key, value in a.items():
        assert key.endswith(".w") or torch.equal(value, b[key]), key


@pytest.mark.parametrize("name", METHOD_SETTINGS)
def test_it_is_not_seqlora(name, run):
    """With its weight on, what later tasks leave is not what seqlora leaves."""
    plain = run(baseline(name))
    own = run({"name": name, **METHOD_SETTINGS[name]})
    assert losses(own)[8:12] != losses(plain)[8:12]
    assert all(math.isfinite(x) for x in losses(own)) and losses(own)[11] < losses(own)[6]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "olora", "lambda_orthogonal": 0.0},
        {"name": "olora", "lambda_orthogonal": 0.0, "fresh": False},
        {"name": "treelora", "weight": 0.0},
        {"name": "sora", "kappa": 0.0, "gate_init": "constant", "gate_lr": 0.0},
        {"name": "treelora_repo", "weight": 0.0},
        {"name": "hidelora_treelora_repo", "weight": 0.0},
    ],
    ids=lambda m: m["name"],
)
def test_without_its_weight_it_is_seqlora_step_by_step(method, run):
    same = baseline(method["name"]) if method.get("fresh", True) else {"name": "seqlora"}
    assert_equal(run(same), run(method))


def test_sora_trains_on_from_all_ranks_and_archives_those_not_zero(run):
    folder = run({"name": "sora", "kappa": 0.05})
    for index in range(3):
        state, update = load_file(folder.state(index)), folder.archive().load(index)
        kept = [len(x.a) for x in update.adapters.values()]
        assert update.mode == "replace" and 0 < sum(kept) < 4 * len(kept)
        for site, pruned in update.adapters.items():
            whole = Adapter(*(state[f"{site}.lora_{key}"] for key in "ABw"))
            assert len(whole.a) == 4 and len(pruned.a) == whole.w.count_nonzero()
            torch.testing.assert_close(pruned.delta(1.0), whole.delta(1.0))


def test_gates_that_the_threshold_alone_moves_are_where_they_were_after_a_restart(
    tiny_llama, toy_stream, tmp_path, monkeypatch
):
    """They have no gradient, but the optimizer's step shrinks them all the same."""
    method = {"name": "sora", "rank": 4, "kappa": 0.05, "gate_lr": 0.0}

    def sora(out):
        return learnt(tiny_llama, toy_stream, tmp_path / out, method)

    straight = sora("straight")
    log = RunFolder.log

    def asking(folder, row):
        log(folder, row)
        if (row.task, row.step) == ("TWO", 4):
            signals.ask("a test")

    with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
        patch.setattr(signals, "_asked", [])
        patch.setattr(RunFolder, "log", asking)
        sora("stopped")
    again = sora("stopped")
    assert losses(straight) == losses(again)
    assert_same_gates(*(load_file(folder.state(1)) for folder in (straight, again)))


def assert_same_gates(one, two):
    gates = [key for key in one if key.endswith("lora_w")]
    assert gates and all(torch.equal(one[key], two[key]) for key in gates)


def test_clora_freezes_the_shared_factors_after_the_first_task(run):
    folder = run({"name": "clora"})
    first, last = (load_file(folder.state(i)) for i in (0, 2))
    same = {key: torch.equal(first[key], last[key]) for key in first}
    assert all(equal == (not key.endswith("w")) for key, equal in same.items())

"""GainLoRA: the gates written out, and that no step opens them on what earlier tasks' prompts were."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from codyra_llm.config.registry import METHODS
from codyra_llm.methods.experts.gainlora import PromptGates, covariance
from codyra_llm.methods.parts.subspace import Subspace

SIZE, HIDDEN = 12, 9


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gates(tasks: int = 2) -> PromptGates:
    found = PromptGates(SIZE, HIDDEN, torch.device("cpu"))
    u, v = drawn(tasks, HIDDEN, SIZE, seed=1), drawn(tasks, SIZE, HIDDEN, seed=2)
    found.load({"u": u, "v": v, "keys": drawn(tasks, SIZE, seed=3)})
    return found


def test_the_gates_written_out():
    of_two, pooled = gates(), drawn(5, SIZE, seed=4)
    found = of_two(pooled)
    state = of_two.state()
    assert found.shape == (5, 2) and of_two.u.requires_grad and not of_two.old_u.requires_grad
    for k in range(2):
        for i in range(5):
            said = functional.silu(state["v"][k] @ functional.silu(state["u"][k] @ pooled[i]))
            key = state["keys"][k]
            cosine = (said @ key / (said.norm() * key.norm())).item()
            expected = abs(2 / (1 + torch.tensor(-4 * cosine).exp().item()) - 1)
            assert found[i, k].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_task_more_goes_on_from_the_last():
    old = gates().state()
    found = PromptGates(SIZE, HIDDEN, torch.device("cpu"))
    found.reset(old, 7, 2)
    state = found.state()
    for name, values in old.items():
        assert torch.equal(state[name][:2], values)
    assert torch.equal(state["u"][2], old["u"][1]) and torch.equal(state["v"][2], old["v"][1])
    assert not torch.equal(state["keys"][2], old["keys"][1]) and state["keys"][2].abs().max() <= 1


def test_steps_leave_what_was_said_to_old_prompts_and_the_gate_shut_on_them():
    """Old prompts of three directions, all held: whatever the optimizer does, f says the same to them and the
    key stays orthogonal to it, so the gate is 0; to others it is not."""
    one = gates(1)
    old = drawn(40, 3, seed=5) @ drawn(3, SIZE, seed=6)
    read = dict(zip(("gate.u", "gate.v", "gate.key"), (old, *one.inner(old)), strict=True))
    few = {name: x.detach().double()[:4] for name, x in read.items()}  # of four prompts, so that much is free
    spaces = {name: Subspace.nothing(x.shape[1]).grown(covariance(x), 1.0) for name, x in few.items()}
    kind = METHODS["gainlora"]
    method = kind(kind.Config(), 7)
    two = PromptGates(SIZE, HIDDEN, torch.device("cpu"))
    two.reset(one.state(), 7, 1)
    method._spaces = spaces
    with torch.no_grad():
        two.key.copy_(spaces["gate.key"].free(two.key.double()[:, None])[:, 0])
    method._steps = method._projected(two)
    said = two.inner(old[:4])[1].detach()
    for step in range(3):
        method.before_step([], step, 3, "constant")
        with torch.no_grad():
            for p in two.parameters():
                p += drawn(*p.shape, seed=step)
        method.after_step(SimpleNamespace())
    torch.testing.assert_close(two.inner(old[:4])[1], said, rtol=0, atol=1e-4)
    now = two(old[:4])
    assert (now[:, 1] < 1e-4).all() and (now[:, 0] > 1e-3).all()
    assert two(drawn(20, SIZE, seed=8))[:, 1].max() > 0.1

"""InfLoRA: subspaces by DualGPM, covariances of the inputs, and that old inputs see no change."""

import dataclasses

import pytest
import torch
from adapters import recipe
from full_memory import ERRORS

from codyra_llm.core.errors import Fault
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.layer import sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.methods.parts import subspace
from codyra_llm.methods.parts.inputs import covariances
from codyra_llm.methods.parts.subspace import Subspace, eigen
from codyra_llm.models.attention import packed_attention
from codyra_llm.store.archive import Archive


def normal(rows, columns, seed):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def planted(*directions, size=12, seed=0):
    """A covariance with the given variances along the first unit vectors, turned by a fixed rotation."""
    turn = torch.linalg.qr(normal(size, size, seed))[0]
    variances = torch.zeros(size, dtype=torch.float64)
    for place, variance in directions:
        variances[place] = variance
    return turn * variances @ turn.T, turn


def test_dualgpm_takes_the_fewest_directions_that_hold_the_energy():
    covariance, turn = planted((0, 3.0), (1, 2.0), (2, 1.0))  # squares 9, 4, 1 of 14
    for energy, count in ((0.6, 1), (9 / 14, 1), (0.65, 2), (0.93, 3), (1.0, 3)):
        found = Subspace.nothing(12).grown(covariance, energy)
        assert found.basis.shape[1] == count and not found.complement
        torch.testing.assert_close(found.basis @ found.basis.T, turn[:, :count] @ turn[:, :count].T)
    old = Subspace.nothing(12).grown(covariance, 0.65)
    assert old.grown(covariance, 0.65) is old, "what is held already counts"
    more, _ = planted((1, 3.0), (5, 2.0), (6, 1.0))
    found = old.grown(more, 0.9)  # 9 of 14 held, 4 more needed
    expected = turn[:, [0, 1, 5]]
    torch.testing.assert_close(found.basis @ found.basis.T, expected @ expected.T)
    torch.testing.assert_close(old.leading(more, 2).abs(), turn[:, 5:7].abs())


def test_dualgpm_keeps_the_complement_beyond_half_of_the_space():
    """The complement must say the same as the basis would have said."""
    first, turn = planted(*((i, 10.0 - i) for i in range(8)))
    kept = Subspace.nothing(12).grown(first, 0.9999)
    assert kept.complement and kept.basis.shape[1] == 4
    used = Subspace(turn[:, :8])
    mixed = normal(12, 40, 3)
    torch.testing.assert_close(kept.free(mixed), used.free(mixed))
    covariance = mixed @ mixed.T
    torch.testing.assert_close(kept.leading(covariance, 3).abs(), used.leading(covariance, 3).abs())
    for energy in (0.5, 0.9, 0.97, 0.995):
        one, two = kept.grown(covariance, energy), used._replace(complement=False).grown(covariance, energy)
        torch.testing.assert_close(one.free(mixed), two.free(mixed))
        held = 1 - one.free(covariance).square().sum() / covariance.square().sum()
        assert held >= energy - 1e-12
    nothing_left = kept.grown(covariance, 1.0)
    assert not nothing_left.basis.shape[1] and not nothing_left.leading(covariance, 3).any()


def test_left_singular_vectors_of_a_product_that_is_not_symmetric():
    covariance, old = torch.cov(normal(12, 30, 4)), Subspace(torch.linalg.qr(normal(12, 4, 5))[0])
    u = torch.linalg.svd(covariance - old.basis @ old.basis.T @ covariance)[0][:, :3]
    torch.testing.assert_close(old.leading(covariance, 3).abs(), u.abs())


def test_old_inputs_see_no_change():
    seen, fresh = normal(200, 4, 6) @ normal(4, 12, 7) + 1e-3 * normal(200, 12, 8), normal(200, 12, 9)
    old = Subspace.nothing(12).grown(seen.T @ seen, 0.9999)
    delta = normal(5, 3, 10) @ old.leading(fresh.T @ fresh, 3).T
    assert (
        (seen @ delta.T).norm() / seen.norm()
        < 2e-3 * delta.norm()
        < 0.01 * (fresh @ delta.T).norm() / fresh.norm()
    )


@pytest.fixture
def on_llama(tiny_llama, toy_stream, tmp_path):
    """(method, adapted model, plain model, function from a state to the third task)."""
    setup = prepare(recipe(tiny_llama, toy_stream, tmp_path / "run", {"name": "inflora"}))
    archive = Archive(tmp_path / "updates", "base")
    model, plain = setup.model(archive, -1), setup.model(archive, -1)
    setup.method.attach(model)
    share_inputs(model)
    for layer in sites(model).values():
        layer.reset(0)
    return setup.method, model, plain, lambda state: setup.task(model, archive, 2, state)


@pytest.mark.parametrize("packed", [False, True])
def test_covariances_are_those_of_prompt_and_answer_without_bos(packed, on_llama):
    _, model, plain, make = on_llama
    if packed:
        packed_attention.use(model)
    task = make({})
    examples = task.encode(task.records())
    block, rows = model.model.layers[1], [[], [], []]
    fused = block.mlp.forward
    layers = [block.self_attn.q_proj, block.mlp.gate_proj, block.mlp.down_proj]
    found = covariances(model.train(), layers, task, examples)
    assert block.mlp.forward is fused and model.training and not block.mlp.down_proj._forward_pre_hooks
    other = plain.model.layers[1]
    for i, module in enumerate((other.self_attn.q_proj, other.mlp.gate_proj, other.mlp.down_proj)):
        module.register_forward_pre_hook(lambda _, args, i=i: rows[i].append(args[0][0, 1:].double()))
    with torch.no_grad():
        for example in examples:  # one by one: no pads
            plain(input_ids=torch.tensor([example.prompt + example.answer]))
    for own, parts in zip(found, rows, strict=True):
        x = torch.cat(parts)
        torch.testing.assert_close(own, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_a_task_that_finds_no_free_direction_is_refused(on_llama):
    method, model, _, make = on_llama
    full = {f"{site}.free": torch.zeros(layer.in_features, 0) for site, layer in sites(model).items()}
    with pytest.raises(
        Fault, match="q_proj: earlier tasks' inputs leave no direction free for task 1.*energy_first"
    ):
        method.begin_task(model, dataclasses.replace(make(full), index=0))


# --- TreeLoRA
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS)
def test_an_eigenproblem_that_does_not_fit_on_the_gpu_is_solved_on_the_cpu(error, monkeypatch):
    matrix, _ = planted((0, 3.0), (1, 2.0), (2, 1.0))
    eigh, asked = torch.linalg.eigh, []

    def full(given):
        asked.append(given.device.type)
        if given.device.type != "cpu":
            raise error()
        return eigh(given)

    monkeypatch.setattr(torch.linalg, "eigh", full)
    monkeypatch.setattr(subspace, "own_device", lambda: torch.device("meta"))
    values, vectors = eigen(matrix)
    assert asked == ["meta", "cpu"]
    torch.testing.assert_close(vectors * values @ vectors.T, matrix)

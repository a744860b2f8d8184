"""EWC, GEM, A-GEM, OGD, LwF: each against its closed form, against seqlora where it has nothing to do."""

import pytest
import torch
from helpers import tiny_recipe, weights
from safetensors.torch import load_file

from codyra_llm.experiment import run as runs

OFF = {
    "ewc": {"weight": 0},
    "gem": {"memory": 0},
    "agem": {"memory": 0},
    "ogd": {"examples": 0},
    "lwf": {"weight": 0},
}


ON = {
    "ewc": {"weight": 1e4},
    "gem": {"memory": 6},
    "agem": {"memory": 6},
    "ogd": {"examples": 6},
    "lwf": {"weight": 5},
}


def whole(model, stream, out, name, **changes):
    """The recipe of a run over three tasks, with dropout, so that each random draw must be where it was."""
    return tiny_recipe(
        model,
        stream,
        out,
        method=name,
        data__tasks=["ONE", "TWO", "THREE"],
        checkpoint=False,
        eval__max_examples=1,
        eval__max_new_tokens=1,
        method__rank=4,
        method__dropout=0.1,
        **changes,
    )


@pytest.fixture(scope="module")
def run_of(tiny_llama, toy_stream, tmp_path_factory):
    """Function from a method and its settings to its finished run, each made once."""
    made = {}

    def finished(name, **config):
        key = name, *config.items()
        if key not in made:
            changes = {f"method__{field}": value for field, value in config.items()}
            made[key] = runs.run(
                whole(tiny_llama, toy_stream, tmp_path_factory.mktemp("runs") / name, name, **changes)
            )
        return made[key]

    return finished


def moved(folder, task):
    """θ after `task` minus θ before it, in the order of the model's parameters."""
    before, after = (folder.archive().load(i).adapters for i in (task - 1, task))
    return torch.cat(
        [(getattr(after[s], f) - getattr(before[s], f)).flatten() for s in after for f in ("a", "b")]
    )


@pytest.mark.parametrize("name", OFF)
def test_with_nothing_to_do_it_is_seqlora(name, run_of):
    plain, off = weights(run_of("seqlora")), weights(run_of(name, **OFF[name]))
    assert list(plain) == list(off) and len(plain) == 3
    assert all(torch.equal(plain[file][key], off[file][key]) for file in plain for key in plain[file])


@pytest.mark.parametrize("name", ON)
def test_it_changes_the_second_task_and_not_the_first(name, run_of):
    plain, on = weights(run_of("seqlora")), weights(run_of(name, **ON[name]))
    first, second, _ = plain
    assert all(torch.equal(plain[first][key], on[first][key]) for key in plain[first])
    assert any((plain[second][key] - on[second][key]).abs().max() > 1e-3 for key in plain[second])
    assert run_of(name, **ON[name]).state(2).is_file() == (name in ("ewc", "ogd"))


def test_a_large_weight_holds_what_the_first_task_needs(tiny_llama, toy_stream, tmp_path):
    """Σ F δ² of the second task; λ large makes it small, where F is small the adapter may go on moving."""
    drift = {}
    for weight in (0, 1e5):
        run = runs.run(
            tiny_recipe(
                tiny_llama,
                toy_stream,
                tmp_path / str(weight),
                method="ewc",
                method__weight=weight,
                method__rank=4,
                data__epochs=8,
                optim__schedule="cosine",
                eval__max_examples=1,
                checkpoint=False,
            )
        )
        fisher = load_file(run.state(0))
        ordered = [fisher[f"{s}.lora_{x}"].flatten() for s in run.archive().load(1).adapters for x in "AB"]
        drift[weight] = (torch.cat(ordered) * moved(run, 1) ** 2).sum()
    assert 0 < drift[1e5] < 0.05 * drift[0]


def test_a_run_stays_orthogonal_and_its_basis_grows(run_of):
    folder = run_of("ogd", **ON["ogd"])
    bases = [load_file(folder.state(i))["basis"] for i in range(3)]
    assert [len(b) for b in bases] == sorted({len(b) for b in bases}) and len(bases[2]) <= 18
    assert torch.equal(bases[2][: len(bases[0])], bases[0])
    for task in (1, 2):
        gone, basis = moved(folder, task), bases[task - 1]
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), rtol=0, atol=1e-5)
        assert gone.norm() > 0.1 and (basis @ gone).abs().max() < 1e-5 * gone.norm()
    plain = moved(run_of("seqlora"), 1)
    assert (bases[0] @ plain).abs().max() > 1e-2 * plain.norm(), "seqlora does move along the basis"

"""InfLoRA and others that choose A before a task: subspaces by DualGPM, covariances of the inputs, that old
inputs see no change, and restarts."""

import pytest
import torch
from helpers import learnt, weights
from safetensors.torch import load_file

from codyra_llm.core.files import read_jsonl
from codyra_llm.methods.parts.inputs import loaded
from codyra_llm.methods.parts.subspace import Subspace
from codyra_llm.runtime import signals
from codyra_llm.store.folder import RunFolder


def test_inflora_run_stays_off_the_old_inputs(run):
    folder = run({"name": "inflora", "inputs_at_once": 3})
    for index in (1, 2):
        spaces, adapters = loaded(load_file(folder.state(index - 1))), folder.archive().load(index).adapters
        assert len(spaces) == 2 * 4 and len(adapters) == 14
        for site, space in spaces.items():
            a = adapters[site].a
            assert 0 < space.basis.shape[1] <= len(space.basis) / 2
            torch.testing.assert_close(space.free(a.T.double()), a.T.double(), rtol=0, atol=1e-5)
        block = "model.layers.1."
        assert torch.equal(adapters[f"{block}self_attn.q_proj"].a, adapters[f"{block}self_attn.v_proj"].a)
        assert torch.equal(adapters[f"{block}mlp.gate_proj"].a, adapters[f"{block}mlp.up_proj"].a)
    torch.testing.assert_close((a @ a.T).diagonal(), torch.full((4,), 1 / 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["inflora", "keeplora", "gainlora"])
def test_a_restart_goes_on_with_the_rows_that_b_was_trained_with(
    name, tiny_llama, toy_stream, tmp_path, monkeypatch
):
    """Rounding, as on another device, decides the signs of singular vectors."""
    method = {"name": name, "rank": 3}

    def run(out):
        return learnt(tiny_llama, toy_stream, tmp_path / out, method)

    def losses(folder):
        return [row["loss"] for row in read_jsonl(folder.path / "log.jsonl")]

    straight = run("straight")
    log, leading = RunFolder.log, Subspace.leading

    def asking(folder, row):
        log(folder, row)
        if (row.task, row.step) == ("TWO", 5):
            signals.ask("a test")

    with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
        patch.setattr(signals, "_asked", [])
        patch.setattr(RunFolder, "log", asking)
        run("stopped")
    monkeypatch.setattr(Subspace, "leading", lambda *args: -leading(*args))
    again = run("stopped")
    assert losses(straight) == losses(again)
    for file, tensors in weights(straight).items():
        assert all(torch.equal(tensor, weights(again)[file][key]) for key, tensor in tensors.items())

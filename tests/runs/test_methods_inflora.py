"""InfLoRA: subspaces by DualGPM, covariances of the inputs, and that old inputs see no change."""

import torch
from safetensors.torch import load_file

from codyra_llm.methods.parts.inputs import loaded


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

"""Packed rows equal padded ones, to the gradient; examples of a pack do not see one another; no T x T mask is
built.
"""

import pytest
import torch
from helpers import tiny_recipe
from safetensors.torch import load_file

from codyra_llm.core.files import read_jsonl
from codyra_llm.experiment import run
from codyra_llm.models.attention import packed_attention


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma2"])
def test_a_packed_run_is_the_padded_run(name, request, toy_stream, tmp_path, monkeypatch):
    """Training, validation, the archived update and the answers. 150 tokens hold four examples or fewer."""
    model, logs, tensors, scores, calls = request.getfixturevalue(name), [], [], [], []
    packed = packed_attention.packed

    def counting(*args, **kwargs):
        calls.append(kwargs["segments"])
        return packed(*args, **kwargs)

    monkeypatch.setattr(packed_attention, "packed", counting)
    for kind in ("buckets", "packed"):
        assert not calls
        folder = run.run(
            tiny_recipe(
                model,
                toy_stream,
                tmp_path / kind,
                data__tasks=["THREE"],
                data__batching=kind,
                optim__micro_batch_tokens=150,
                optim__validate_every=3,
                checkpoint=False,
            )
        )
        logs.append(read_jsonl(folder.path / "log.jsonl"))
        tensors.append(load_file(folder.path / "updates" / "00-THREE.safetensors"))
        scores.append([row.score for row in folder.scores])
    assert max(map(len, calls)) > 1 and all(sum(segments) <= 150 for segments in calls)
    for key, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][key], tensor, rtol=2e-3, atol=2e-4)
    for key in ("loss", "grad_norm", "eval_loss"):
        one, two = ([row[key] for row in log if key in row] for log in logs)
        assert two == pytest.approx(one, rel=1e-4) and len(one) in (2, 6)
    assert scores[0] == scores[1]

"""Files of tensors are the same bytes wherever and however often they are written."""

import torch
from safetensors import safe_open

from codyra_llm.core.tensors import save_tensors

METADATA = {
    "task": "C-STANCE",
    "words": 'quote " backslash \\ 判断 \x01 \n',
    "scale": "1.0",
    "base": "0",
    "parent": "1",
}


def test_equal_contents_are_equal_bytes(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    orders = [list(METADATA.items()), list(METADATA.items())[::-1]]
    for number in range(8):  # the writer's own order is drawn again in each call
        save_tensors(tensors, tmp_path / str(number), dict(orders[number % 2]))
    assert len({(tmp_path / str(number)).read_bytes() for number in range(8)}) == 1


def test_they_read_back(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    for metadata in (METADATA, None):
        save_tensors(tensors, tmp_path / "file", metadata)
        with safe_open(tmp_path / "file", "pt") as file:
            assert file.metadata() == metadata
            assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())

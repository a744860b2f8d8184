"""A batch goes to a GPU in one copy, whatever its tensors are."""

import torch

from codyra_llm.data.batches import collate, in_one_copy, through_pinned
from codyra_llm.data.encoding import Encoded


def test_the_tensors_are_what_they_were():
    examples = [Encoded([3, 4, 5], [6, 7], False), Encoded([8], [9, 2, 1], False)]
    for packed in (False, True):
        batch = collate(examples, [0, 1], [0.25, 0.5], 0, packed)
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == (6 if packed else 4)
        moved = through_pinned(tensors, torch.device("cpu"))
        for there, here in zip(moved, tensors, strict=True):
            assert there.dtype == here.dtype and torch.equal(there, here)
        assert len({there.untyped_storage().data_ptr() for there in moved}) == 1
    odd = [torch.tensor([True, False, True]), torch.zeros(0), torch.arange(5, dtype=torch.int16)]
    moved = through_pinned(odd, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(moved, odd, strict=True))


def test_on_the_host_nothing_is_copied():
    tensors = [torch.arange(3), torch.zeros(2)]
    moved = in_one_copy(tensors, torch.device("cpu"))
    assert all(there is here for there, here in zip(moved, tensors, strict=True))

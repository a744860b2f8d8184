"""Which tokens of a training batch are its prompts: those that are there when the answer is asked for."""

import torch

from codyra_llm.data.batches import collate
from codyra_llm.data.encoding import Encoded
from codyra_llm.methods.parts.features import prompt_mask


def test_a_training_prompt_is_the_prompt_at_the_test():
    """Of a chat with its earlier turns, which are learnt too; an answer without a prompt has its first
    token."""
    examples = [
        Encoded([5, 6, 7], [8, 9], cut=False),
        Encoded([5, 6, 7, 8, 9, 10], [11], cut=False, turns=((2, 4),)),
        Encoded([], [8, 9], cut=False),
    ]
    batch = collate(examples, [1, 0, 2], [0.1] * 3, pad=0)
    expected = torch.arange(7) < torch.tensor([[6], [3], [1]])
    assert torch.equal(prompt_mask(batch), expected)

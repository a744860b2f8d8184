"""Recorded micro-batches on a GPU: the losses and adapters of training as it is without them."""

import pytest
import torch
from recorded_training import assert_the_same


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_is_what_it_is_without_recordings(tiny_llama):
    assert_the_same(tiny_llama, steps=12)

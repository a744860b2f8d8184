"""What a process sets once for all that it runs."""

import pytest
import torch

from codyra_llm.bench import measured, options
from codyra_llm.runtime import launch


@pytest.fixture
def cudnn_attention():
    """cuDNN's attention allowed, as PyTorch starts; put back afterwards."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_launch_leaves_cudnn_attention_out(cudnn_attention):
    launch.accelerator()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_benchmark_leaves_cudnn_attention_out(cudnn_attention):
    measured("linear", options("cpu", None, "8,4,6,2", "ours", None, rounds=1))
    assert not torch.backends.cuda.cudnn_sdp_enabled()

"""What a process sets once for all that it runs, and what it says of its device."""

import logging
import os

import pytest
import torch

from codyra_llm.bench import LEVELS, measured, options
from codyra_llm.bench.measure import Options
from codyra_llm.core import gpus
from codyra_llm.core.errors import Fault
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


def test_a_benchmark_is_timed_on_the_device_that_is_asked_for(monkeypatch):
    """CUDA events are of the current device: those of another GPU would time nothing."""
    chosen, asked = [], Options(torch.device("cuda", 1), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setitem(LEVELS, "linear", lambda options: {"level": "linear"})
    measured("linear", asked)
    assert chosen == [asked.device]


def test_only_tests_for_a_gpu_see_one():
    """On a machine with GPUs all others would else train there, and compare with the bits of a CPU."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.fixture
def devices(monkeypatch, tmp_path):
    """A machine on which PyTorch finds no GPU; the folder of its device files."""
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def said_at_launch(caplog) -> str:
    with caplog.at_level(logging.INFO, logger="codyra_llm"):
        launch.accelerator()
    return caplog.text


@pytest.mark.parametrize("built, told", [(None, "install a build with CUDA"), ("13.0", "update the driver")])
def test_a_gpu_that_is_not_used_is_told(devices, monkeypatch, caplog, built, told):
    """Neither a build without CUDA nor a driver too old for it may train on the CPU without a word."""
    (devices / "nvidia3").touch()
    monkeypatch.setattr(torch.version, "cuda", built)
    assert told in said_at_launch(caplog)


@pytest.mark.parametrize(
    "file, visible", [("nvidia0", ""), ("nvidia0", "-1"), ("nvidiactl", None), ("null", None)]
)
def test_a_cpu_that_is_asked_for_or_alone_needs_no_word(devices, monkeypatch, caplog, file, visible):
    (devices / file).touch()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "NVIDIA" not in said_at_launch(caplog)


@pytest.mark.parametrize("processes, refused", [("4", True), ("2", False)])
def test_processes_do_not_share_a_gpu(monkeypatch, processes, refused):
    """NCCL would end in a traceback, after the time that it takes to start."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "Accelerator", lambda **_: "made")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, processes)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    if not refused:
        assert launch.accelerator() == "made"
        return
    with pytest.raises(Fault, match="4 processes .* finds 2 of its GPUs.* start 2 "):
        launch.accelerator()

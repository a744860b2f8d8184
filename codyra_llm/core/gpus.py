"""Whether this machine has an NVIDIA GPU, found without importing torch."""

from pathlib import Path

DEVICES = Path("/dev")


def has_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver has made the device file of a GPU; a container may have that of one GPU alone,
    such as nvidia3."""
    return any(DEVICES.glob("nvidia[0-9]*"))

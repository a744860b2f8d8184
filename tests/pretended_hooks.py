"""The library that lets autograd believe in a device that is not there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HOOKS = Path(__file__).parent / "pretend" / "hooks.cpp"


def environment(folder: Path) -> dict[str, str]:
    """The variables of a process that believes in the device: the library must be there before torch is
    imported, which looks for devices. Skips where it can't be made."""
    return os.environ | {"LD_PRELOAD": str(compiled(folder)), "DS_ACCELERATOR": "cpu"}


def compiled(folder: Path) -> Path:
    """The library, made in `folder`."""
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch is built for CUDA and has a device's hooks already; tests/gpu is for it")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler (c++, g++, clang++ or $CXX)")
    root = Path(torch.__file__).parent
    if not (root / "include/ATen/detail/CUDAHooksInterface.h").is_file():
        pytest.skip(f"PyTorch's C++ headers are not in {root / 'include'}")
    library = folder / "hooks.so"
    command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", HOOKS, "-o", library]
    linked = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
    done = subprocess.run([*command, *linked], capture_output=True, text=True)
    if "fatal error" in done.stderr and "No such file" in done.stderr:
        pytest.skip(f"a header is missing: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return library

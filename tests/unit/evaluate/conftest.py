"""What the tests of general ability share."""

import pytest
import torch

from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer


@pytest.fixture
def live():
    """Function from a model's folder to (model, tokenizer, the harness's view of it)."""
    from codyra_llm.evaluate.harness import InMemoryLM
    from codyra_llm.runtime.launch import accelerator

    def opened(folder, **settings):
        model, tokenizer = loading.load(folder, torch.float32).eval(), load_tokenizer(folder)
        return model, tokenizer, InMemoryLM(accelerator(), model, tokenizer, **settings)

    return opened

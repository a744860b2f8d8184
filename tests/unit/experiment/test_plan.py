"""What a plan counts: micro-batches as they reach the model."""

from io import StringIO

import pytest
from helpers import tiny_recipe

from codyra_llm.core.terminal import Terminal
from codyra_llm.experiment.plan import _work, plan, skeleton
from codyra_llm.experiment.setup import prepare


@pytest.mark.parametrize(
    "method, front",
    [
        ({"name": "l2p", "pool": 5, "length": 4, "chosen": 3}, 12),
        ({"name": "pp", "length": 30, "mlp": False}, 60),
    ],
)
def test_prompts_before_a_text_count(method, front, tiny_llama, toy_stream, tmp_path):
    """Those of pp grow with the tasks, so the largest micro-batch is one of the last."""
    recipe = tiny_recipe(tiny_llama, toy_stream, tmp_path, method=method)
    setup = prepare(recipe)
    work = _work(setup, skeleton(setup))
    largest = work.pieces[-1]
    assert largest.front == front
    assert largest.tokens == work.biggest.ids.numel() + len(work.biggest.ids) * front
    text = StringIO()
    plan(recipe, Terminal(file=text, width=200))
    assert (
        f"prompts and Adam's moments 0.00, forward and backward of {largest.tokens} tokens" in text.getvalue()
    )


@pytest.mark.parametrize("method", ["seqft", "seqlora"])
def test_the_size_of_the_base_does_not_depend_on_what_trains(method, toy_stream, tmp_path):
    """The small LLaMA that is shipped has 0.41 million weights, whether they train or not."""
    text = StringIO()
    recipe = tiny_recipe("mini", toy_stream, tmp_path, method={"name": method})
    plan(recipe, Terminal(file=text, width=200))
    assert "mini (llama, 0.4 M parameters, " in text.getvalue()

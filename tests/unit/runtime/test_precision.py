"""`model.dtype: auto`: what the hardware multiplies faster, unless the base or the run says otherwise."""

import pytest
import torch
from helpers import tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from codyra_llm.experiment import run as runs
from codyra_llm.experiment.setup import prepare
from codyra_llm.runtime import precision


@pytest.fixture(scope="module")
def low_llama(tiny_llama, tmp_path_factory):
    """The tiny LLaMA, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "low"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture
def machine(monkeypatch):
    """Sets what this machine has: instructions, and how many times as fast the probe finds bfloat16."""
    if torch.cuda.is_available():
        pytest.skip("a GPU decides, and no probe of the CPU")

    def set_to(instructions: list[str], faster: float) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
        monkeypatch.setattr(precision, "_probe", lambda: faster)
        precision.multiplies_bfloat16.cache_clear()

    yield set_to
    precision.multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize(
    "instructions, faster, fast",
    [
        (["avx2", "avx512_f"], 9.0, False),  # converts to float32 and back
        (["avx512_bf16"], 2.0, True),
        (["amx_bf16"], 12.0, True),
        (["bf16"], 3.0, True),  # Arm
        (["amx_bf16"], 1.1, False),  # a library that does not use them
    ],
)
def test_instructions_and_a_probe_decide(machine, instructions, faster, fast):
    machine(instructions, faster)
    assert precision.multiplies_bfloat16() == fast


def test_the_probe_compares_two_speeds():
    assert 0.01 < precision._probe() < 1000


@pytest.mark.parametrize("asked, low", [("auto", True), ("float32", False), ("bfloat16", True)])
def test_auto_is_bfloat16_where_it_is_fast_and_the_base_is_not_float32(
    machine, low_llama, tiny_llama, toy_stream, tmp_path, asked, low
):
    machine(["avx512_bf16"], 2.0)
    chosen = prepare(tiny_recipe(low_llama, toy_stream, tmp_path / "run", model__dtype=asked))
    assert chosen.recipe.model.dtype == ("bfloat16" if low else "float32")
    assert chosen.dtype == (torch.bfloat16 if low else torch.float32)
    if asked == "auto":
        assert prepare(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run")).dtype == torch.float32


def test_a_run_keeps_what_it_began_in_on_another_machine(machine, low_llama, toy_stream, tmp_path):
    recipe = tiny_recipe(low_llama, toy_stream, tmp_path / "run", eval__max_examples=1)
    machine(["amx_bf16"], 10.0)
    began = runs.run(recipe)
    assert began.recipe.model.dtype == "bfloat16"
    scores = began.scores
    machine([], 1.0)
    assert prepare(recipe).dtype == torch.bfloat16
    assert prepare(replace_output(recipe, tmp_path / "other")).dtype == torch.float32
    assert runs.run(recipe).scores == scores


def replace_output(recipe, folder):
    return recipe.model_copy(update={"output": str(folder)})

"""`model.dtype: auto`: what the hardware has instructions for, unless the base or the run says otherwise."""

import time

import pytest
import torch
from helpers import tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from codyra_llm.checkpoints.generate import dtype_on
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.setup import prepare
from codyra_llm.runtime import precision
from codyra_llm.store.folder import _other_launch


@pytest.fixture(scope="module")
def low_llama(tiny_llama, tmp_path_factory):
    """The tiny LLaMA, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "low"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture
def machine(monkeypatch):
    """Sets what this machine has: instructions, and whether PyTorch has oneDNN, which uses them."""
    if torch.cuda.is_available():
        pytest.skip("a GPU decides, and no instructions of the CPU")

    def set_to(instructions: list[str], library: bool = True) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)

    return set_to


@pytest.mark.parametrize(
    "instructions, library, fast",
    [
        (["avx2", "avx512_f"], True, False),  # converts to float32 and back
        (["avx512_bf16"], True, True),
        (["amx_bf16"], True, True),
        (["bf16"], True, True),  # Arm
        (["bf16"], False, False),  # a build that does not use them
    ],
)
def test_instructions_decide(machine, instructions, library, fast):
    machine(instructions, library)
    assert precision.multiplies_bfloat16() == fast


def test_no_clock_decides(machine, monkeypatch):
    """A busy machine must choose as an idle one does."""
    machine(["avx512_bf16"])
    for name in ("perf_counter", "monotonic", "time", "process_time", "thread_time"):
        monkeypatch.setattr(time, name, lambda: pytest.fail("the clock was asked"))
    assert precision.multiplies_bfloat16()


def test_other_threads_or_instructions_are_told_to_a_run_that_goes_on():
    was = {"cpu": "AVX2", "threads": 2, "device": "cpu"}
    assert _other_launch(was, dict(was)) == ""
    told = _other_launch(was, was | {"cpu": "AVX512", "threads": 1})
    assert "rounding only: cpu was AVX2, now AVX512, threads was 2, now 1" in told
    assert precision.arithmetic() == {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("asked, low", [("auto", True), ("float32", False), ("bfloat16", True)])
def test_auto_is_bfloat16_where_it_is_fast_and_the_base_is_not_float32(
    machine, low_llama, tiny_llama, toy_stream, tmp_path, asked, low
):
    machine(["avx512_bf16"])
    chosen = prepare(tiny_recipe(low_llama, toy_stream, tmp_path / "run", model__dtype=asked))
    assert chosen.recipe.model.dtype == ("bfloat16" if low else "float32")
    assert chosen.dtype == (torch.bfloat16 if low else torch.float32)
    if asked == "auto":
        assert prepare(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run")).dtype == torch.float32


def test_a_run_keeps_what_it_began_in_on_another_machine(machine, low_llama, toy_stream, tmp_path):
    recipe = tiny_recipe(low_llama, toy_stream, tmp_path / "run", eval__max_examples=1)
    machine(["amx_bf16"])
    began = runs.run(recipe)
    assert began.recipe.model.dtype == "bfloat16"
    scores = began.scores
    machine([])
    assert prepare(recipe).dtype == torch.bfloat16
    assert prepare(replace_output(recipe, tmp_path / "other")).dtype == torch.float32
    assert runs.run(recipe).scores == scores


def replace_output(recipe, folder):
    return recipe.model_copy(update={"output": str(folder)})


@pytest.mark.parametrize("supported, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_model_without_a_run_is_asked_in_the_dtype_of_its_device(monkeypatch, supported, expected):
    """In float32 an export of 8B would not fit into a card of 24 GB, on which its run was made."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    assert dtype_on(torch.device("cuda")) == expected
    assert dtype_on(torch.device("cpu")) == torch.float32

"""Which errors mean that a GPU's memory ran out."""

import pytest
import torch
from full_memory import ERRORS

from codyra_llm.core.errors import Fault, is_out_of_memory
from codyra_llm.runtime.memory import if_it_fits

OTHERS = (
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    ValueError("CUDA error: out of memory"),
    Fault("CUDA error: out of memory"),
)


def raising(error: Exception):
    raise error


@pytest.mark.parametrize("made", ERRORS)
def test_memory_that_runs_out_is_known_by_any_of_its_errors(made):
    assert is_out_of_memory(made())
    assert if_it_fits(lambda: raising(made())) is None


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)):
        if_it_fits(lambda: raising(error))


def test_an_error_after_which_all_went_on_does_not_count():
    assert if_it_fits(lambda: raising(ERRORS[0]())) is None
    with pytest.raises(RuntimeError, match="later") as caught:
        if_it_fits(lambda: raising(RuntimeError("later")))
    assert not is_out_of_memory(caught.value)


def test_nothing_refers_to_what_a_failed_computation_had_made():
    import weakref

    seen = []

    def fails():
        made = torch.zeros(3)
        seen.append(weakref.ref(made))
        raise ERRORS[0]()

    assert if_it_fits(fails) is None and seen[0]() is None
    assert if_it_fits(lambda: 7) == 7

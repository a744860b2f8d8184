"""Fixtures of the tests that run recipes. They import inside, as `tests/conftest.py` says why."""

import pytest


@pytest.fixture(scope="module")
def impatient():
    """Code of others gets half a second of computing in place of two."""
    from helpers import TESTS

    from codyra_llm.core import foreign, foreign_worker

    def begin_anew():
        foreign._worker.close()
        foreign._worker.stopped.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign_worker, "SECONDS", 0.5)
        patch.setattr(foreign_worker, "__file__", str(TESTS / "quick_foreign_worker.py"))
        begin_anew()
        yield
        begin_anew()

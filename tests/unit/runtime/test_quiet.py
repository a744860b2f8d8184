"""Bars and logs of other libraries are off where they would say nothing, and afterwards as they were."""

import csv
import logging
import warnings

import datasets
import pytest
from huggingface_hub.utils import are_progress_bars_disabled as hub_hidden
from huggingface_hub.utils import disable_progress_bars as hide_hub
from transformers.utils import logging as transformers_logging

from codyra_llm.data.readers import rows
from codyra_llm.runtime.quiet import (
    log_level,
    without_chatter,
    without_data_bars,
    without_messages,
    without_weight_bars,
)


@pytest.fixture(autouse=True)
def shown():
    """Everything is shown, before and after."""
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()
    yield
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()


def bars() -> list[bool]:
    return [
        transformers_logging.is_progress_bar_enabled(),
        not hub_hidden(),
        not datasets.are_progress_bars_disabled(),
    ]


def test_bars_come_back():
    with without_weight_bars():
        assert bars() == [False, False, True]
    with without_data_bars():
        assert bars() == [True, True, False]
    assert bars() == [True, True, True]


def test_bars_that_were_off_stay_off():
    hide_hub()
    datasets.disable_progress_bars()
    with without_weight_bars(), without_data_bars():
        pass
    assert bars() == [True, False, False]
    transformers_logging.disable_progress_bar()
    with without_weight_bars():
        pass
    assert bars() == [False, False, False]


def test_an_error_leaves_no_trace():
    with pytest.raises(ZeroDivisionError), without_weight_bars(), without_data_bars():
        raise ZeroDivisionError
    assert bars() == [True, True, True]


def test_messages_are_told_by_their_words(caplog):
    logger = logging.getLogger("a test")
    with without_messages("a test", "REPORT"):
        logger.warning("a %s of it", "REPORT")
        logger.warning("something else")
    logger.warning("a REPORT again")
    assert caplog.messages == ["something else", "a REPORT again"]


def test_a_logger_gets_its_level_back():
    logger = logging.getLogger("a test")
    with log_level("a test", logging.ERROR):
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.level == logging.NOTSET


def test_a_long_field_is_read_and_the_limit_is_as_it_was(tmp_path):
    before = csv.field_size_limit()
    text = "a" * (before + 1)
    (tmp_path / "long.csv").write_text(f"prompt,answer\n{text},b\n", encoding="utf-8")
    assert rows(tmp_path / "long.csv", "records") == [{"prompt": text, "answer": "b"}]
    assert csv.field_size_limit() == before


def test_a_command_hides_what_is_for_developers_and_nothing_else(caplog, recwarn):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    missed = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please ..."
    filters = list(warnings.filters)
    with without_chatter():
        logger.warning(missed, "No module named 'kernels'")
        logger.warning("something else")
        warnings.warn("a name will change", FutureWarning, stacklevel=1)
        warnings.warn("mind this", UserWarning, stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert [str(found.message) for found in recwarn] == ["mind this"]
    assert warnings.filters == filters
    logger.warning(missed, "again")
    assert len(caplog.records) == 2


def test_whoever_asks_python_to_warn_is_warned(monkeypatch, recwarn):
    monkeypatch.setattr("sys.warnoptions", ["default"])
    with without_chatter():
        warnings.warn("a name will change", FutureWarning, stacklevel=1)
    assert len(recwarn) == 1

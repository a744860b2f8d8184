"""Other libraries' progress bars, logs and warnings: switched off where they are useless, and restored
afterwards."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OPTIONAL = "Failed to load CPU gemm_4bit_forward"  # bitsandbytes' kernel for what is not done here: decoding


@contextmanager
def without_chatter() -> Iterator[None]:
    """For a whole command: no FutureWarning that a library means for its developers, unless the user asks for
    warnings (-W, PYTHONWARNINGS), and no line about a bitsandbytes kernel that is missing and not used
    here."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_is_news)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(OPTIONAL)


@contextmanager
def without_weight_bars() -> Iterator[None]:
    """Within this block transformers shows no progress bar: every task loads its model again."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as bars

    shown, hub_hidden = bars.is_progress_bar_enabled(), are_progress_bars_disabled()
    bars.disable_progress_bar()  # the hub's too
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
        if hub_hidden:
            disable_progress_bars()


@contextmanager
def without_data_bars() -> Iterator[None]:
    """Within this block `datasets` shows no progress bar."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


@contextmanager
def log_level(name: str, level: int) -> Iterator[None]:
    """Within this block the logger of this name writes nothing below `level`."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def without_messages(name: str, words: str) -> Iterator[None]:
    """Within this block the logger of this name writes no message that contains these words."""

    def passes(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    logger = logging.getLogger(name)
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)

"""Other libraries' progress bars, logs and warnings, off while they would say nothing, and afterwards as they
were.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OPTIONAL = "Failed to load CPU gemm_4bit_forward"  # bitsandbytes' kernel for what is not done here: decoding


@contextmanager
def without_chatter() -> Iterator[None]:
    """Within it, for a whole command: no FutureWarning of a library to its own developers, unless Python was
    told to warn (-W, PYTHONWARNINGS), and no line on a kernel that bitsandbytes misses and nothing here
    uses."""
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
    """Within it transformers shows no bar: every task loads its model anew."""
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
    """Within it `datasets` shows no bar."""
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
    """Within it the logger of this name tells nothing below `level`."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def without_messages(name: str, words: str) -> Iterator[None]:
    """Within it the logger of this name tells nothing that has these words in it."""

    def tells(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    logger = logging.getLogger(name)
    logger.addFilter(tells)
    try:
        yield
    finally:
        logger.removeFilter(tells)

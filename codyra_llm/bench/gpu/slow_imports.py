"""Packages that stages import and that take seconds, for the server that they are forked from. Only where
there is no GPU: bitsandbytes, which peft imports, would initialise CUDA in it, and no fork could use it."""

from contextlib import suppress

from codyra_llm.runtime.quiet import without_chatter

with without_chatter(), suppress(ImportError):  # the stages say what is not installed
    import peft as _peft  # noqa: F401

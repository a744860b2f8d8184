"""Continual fine-tuning of causal language models with rank-selective LoRA (CoDyRA) on TRACE-like task
streams.
"""

from codyra_llm.core.version import __version__ as __version__

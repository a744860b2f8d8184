"""Continual fine-tuning of causal language models with rank-selective LoRA (CoDyRA) on TRACE-like task streams."""

__version__ = "0.1.0"

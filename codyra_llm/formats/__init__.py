"""Formats of other tools: PEFT adapters (read), GGUF files (written), and models that PyPI packages carry."""

"""Models in the layouts of other tools: PEFT adapters that are read, GGUF files that are written."""

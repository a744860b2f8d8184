"""Rank-selective LoRA: the layer and its function, the archive of updates, and what is built from it."""

"""Checkpoints outside a run: what one is, its evaluation, its answers, its upload."""

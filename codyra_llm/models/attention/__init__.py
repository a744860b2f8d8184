"""Attention in other ways than transformers has it: packed rows, prefixes, plain products on a CPU."""

"""The continual-learning methods, one file each, by family; config/registry.py lists them by name."""

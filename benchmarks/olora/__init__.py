"""The continual learning streams of O-LoRA: benchmark.yaml; the data is its authors'."""

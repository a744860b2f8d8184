"""What a user writes: recipes, benchmarks and their sections, checked. Nothing here imports torch."""

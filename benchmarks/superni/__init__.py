"""Fifteen tasks of Super-NaturalInstructions in SAPT's orders: benchmark.yaml; the data is its authors'."""

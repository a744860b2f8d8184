"""The TRACE benchmark: benchmark.yaml, which `codyra_llm.benchmark` reads; the metrics; mini-TRACE;
results.
"""

"""mini-TRACE: eight small synthetic tasks of TRACE's shapes and a small LLaMA to learn them in minutes on a
CPU.
"""

from codyra_llm.benchmarks.trace.mini.make import make_mini, mini_data, mini_model

__all__ = ["make_mini", "mini_data", "mini_model"]

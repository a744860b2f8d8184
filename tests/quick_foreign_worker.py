"""core/foreign_worker.py with a quarter of its bound on computing, for tests of much that never ends."""

from codyra_llm.core import foreign_worker

foreign_worker.SECONDS = 0.5
foreign_worker.main()

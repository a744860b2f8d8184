"""`codyra-llm bench gpu`: everything that only a GPU can show, in stages, each in its own process."""

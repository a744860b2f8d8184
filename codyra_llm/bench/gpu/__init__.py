"""`codyra-llm bench gpu`: what a machine with a GPU is to settle, in stages, each in a process of its own."""

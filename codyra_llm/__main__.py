"""`python -m codyra_llm` is `codyra-llm`."""

from codyra_llm.cli import main

main()

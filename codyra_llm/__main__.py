from codyra_llm.cli import main

main()

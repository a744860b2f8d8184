"""The commands of `codyra-llm`, by what they are about. Heavy packages load inside of them, so that --help is quick."""

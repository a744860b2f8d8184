"""Zero-shot: the frozen model, evaluated as it is."""

from codyra_llm.config.methods.baselines import NoneConfig
from codyra_llm.methods.base import Method


class NoMethod(Method):
    """The frozen base on every task: the anchor of OP. Nothing is trained, nothing can be forgotten."""

    name, summary, Config, trains = "none", "the frozen model, zero-shot", NoneConfig, ""

"""Zero-shot: the frozen model, evaluated as it is."""

from typing import Literal

from .base import Method, MethodConfig


class NoneConfig(MethodConfig):
    name: Literal["none"] = "none"


class NoMethod(Method):
    """The frozen base on every task: the anchor of OP. Nothing is trained, nothing can be forgotten."""

    name, summary, Config, trains = "none", "the frozen model, zero-shot", NoneConfig, ""

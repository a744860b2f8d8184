"""What every method's section of a recipe has: its name, and for LoRA methods the adapter."""

import re
from typing import Annotated, Any

from pydantic import Field, field_validator

from codyra_llm.core.parsing import shown
from codyra_llm.core.schema import Fraction, Strict

# Ranks, widths, examples in memory: a larger number is a slip, and would exhaust memory.
Count = Annotated[int, Field(le=1 << 16)]
Layer = Annotated[int, Field(ge=0, le=9999)]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class MethodConfig(Strict, frozen=True):
    """What every method has: its name."""

    name: str


class TargetsConfig(MethodConfig, frozen=True):
    """Which projections train."""

    targets: list[str] = Field(
        default=list(PROJECTIONS), min_length=1, description="projections that get an adapter"
    )
    layers: list[Layer] | None = Field(
        default=None,
        min_length=1,
        description="blocks that get an adapter, counted from 0: a list such as [0, 1, 8], or ranges such as "
        "'4-11' or '0-3,8', both ends included; null: all",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        """Ranges expanded to their numbers."""
        if isinstance(value, int) and not isinstance(value, bool):
            return [value]
        return _numbers(value) if isinstance(value, str) else value

    @field_validator("layers")
    @classmethod
    def _each_once(cls, value: list[int] | None) -> list[int] | None:
        if value and len(set(value)) < len(value):
            raise ValueError("a layer is named twice")
        return value if value is None else sorted(value)

    @field_validator("targets")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        unknown = [name for name in value if name not in PROJECTIONS]
        if unknown:
            raise ValueError(f"unknown projections {unknown}; choose from {', '.join(PROJECTIONS)}")
        if len(set(value)) < len(value):
            raise ValueError("a projection is named twice")
        return value


def _numbers(text: str) -> list[int]:
    """The layers of '0-3,8'. Raises ValueError for other texts."""
    found = []
    for part in text.replace(" ", "").split(","):
        ends = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise ValueError(
                f"{shown(text)} names no layers; write a list such as [0, 1, 8], or ranges such as '0-3,8'"
            )
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return found


class LoraConfig(TargetsConfig, frozen=True):
    """The adapter of a LoRA method."""

    rank: Count = Field(default=16, ge=1, description="rank r of every adapter")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")


class InputsConfig(LoraConfig, frozen=True):
    """How the basis of old inputs grows, and what it is made from."""

    energy_first: Fraction = Field(
        default=0.995,
        description="ε at the first task: share of ‖C‖_F², C the inputs' covariance, that the basis of old "
        "inputs must hold (`lamb` in InfLoRA's released code); its authors use 0.995 for language models "
        "and 0.95 for vision",
    )
    energy_last: Fraction = Field(
        default=1.0,
        description="ε that a task after the last would have; tasks in between get linear steps (`lame`)",
    )
    max_examples: int = Field(
        default=512, ge=1, description="how many drawn training examples of a task its inputs are taken from"
    )
    inputs_at_once: Count | None = Field(
        default=None,
        ge=1,
        description="how many distinct inputs have their covariances in memory at a time; each such group "
        "takes a pass over the examples. null: as many as fit into 2 GB",
    )

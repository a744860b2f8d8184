"""Settings of methods that project gradients or updates away from old tasks."""

from typing import Literal

from pydantic import Field

from codyra_llm.config.methods.base import Count, InputsConfig, TargetsConfig
from codyra_llm.config.methods.sequential import SequentialConfig
from codyra_llm.core.schema import Fraction, NotNegative, Positive


class MemoryConfig(SequentialConfig, frozen=True):
    """Stored examples."""

    memory: int = Field(default=100, ge=0, description="training examples kept of each earlier task")
    batch: Count = Field(
        default=16,
        ge=1,
        description="how many of them a reference gradient uses, redrawn at each step; all of them if this "
        "is at least `memory`",
    )


class AGemConfig(MemoryConfig, frozen=True):
    """Settings of `AGem` in methods/projection/agem.py, which explains them."""

    name: Literal["agem"] = "agem"


class GemConfig(MemoryConfig, frozen=True):
    """Settings of `Gem` in methods/projection/gem.py, which explains them."""

    name: Literal["gem"] = "gem"
    margin: NotNegative = Field(
        default=0.5, description="γ: lowest multiplier of every earlier gradient, once one is in conflict"
    )
    epsilon: Positive = Field(
        default=1e-3, description="ridge of the dual, relative to the mean squared norm of the g_k"
    )


class InfLoraConfig(InputsConfig, SequentialConfig, frozen=True):
    """Settings of `InfLora` in methods/projection/inflora.py, which explains them."""

    name: Literal["inflora"] = "inflora"
    fresh: Literal[True] = Field(default=True, description="must stay true: every task has an A of its own")


class KeepLoraConfig(SequentialConfig, frozen=True):
    """Settings of `KeepLora` in methods/projection/keeplora.py, which explains them."""

    name: Literal["keeplora"] = "keeplora"
    fresh: Literal[True] = Field(default=True, description="must stay true: every task has an A of its own")
    energy_weights: Fraction = Field(
        default=0.6, lt=1, description="share of ‖W₀‖_F² whose leading input directions no task may use"
    )
    energy_old: Fraction = Field(
        default=0.99,
        description="share of a finished task's inputs (or gradient) that lies in the directions which later "
        "tasks must not use",
    )
    old: Literal["inputs", "gradients"] = Field(
        default="inputs",
        description="which directions are protected after a task: inputs: those of the sites' inputs, as in "
        "the paper; gradients: those of the gradient of the loss by W, as in its code for LLaVA",
    )
    max_examples: int = Field(
        default=512,
        ge=1,
        description="how many training examples of a task are drawn for its gradient and its inputs",
    )
    inputs_at_once: Count | None = Field(
        default=None,
        ge=1,
        description="how many distinct inputs have their covariances, or their sites' gradients, in memory "
        "at a time; each such group takes a pass over the examples. null: as many as fit into 2 GB",
    )


class OgdConfig(SequentialConfig, frozen=True):
    """Settings of `Ogd` in methods/projection/ogd.py, which explains them."""

    name: Literal["ogd"] = "ogd"
    fresh: Literal[False] = Field(
        default=False, description="must stay false: directions belong to one adapter for all tasks"
    )
    examples: int = Field(
        default=20,
        ge=0,
        description="how many training examples of each finished task give directions; "
        "each costs as much memory as the adapter in float32",
    )
    max_gigabytes: Positive = Field(
        default=16.0, description="the most memory that the directions of all tasks may take"
    )


class OsftConfig(TargetsConfig, frozen=True):
    """Settings of `Osft` in methods/projection/osft.py, which explains them."""

    name: Literal["osft"] = "osft"
    preserved: Fraction = Field(
        default=0.5, lt=1, description="share of W's singular directions, the leading ones, that are frozen"
    )


class OsftLoraConfig(SequentialConfig, frozen=True):
    """Settings of `OsftLora` in methods/projection/osft_lora.py, which explains them."""

    name: Literal["osft_lora"] = "osft_lora"
    fresh: Literal[True] = Field(
        default=True, description="must stay true: the directions are those of the merged W"
    )
    preserved: Fraction = Field(
        default=0.5, lt=1, description="share of W's singular directions, the leading ones, that are frozen"
    )

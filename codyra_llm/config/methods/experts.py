"""Settings of methods that keep a module per task."""

from typing import Literal

from pydantic import Field

from codyra_llm.config.methods.base import Count, InputsConfig, LoraConfig
from codyra_llm.core.schema import Fraction, NotNegative, Positive


class ExpertConfig(LoraConfig, frozen=True):
    """Settings of methods with an adapter per task."""

    rank: Count = Field(default=8, ge=1, description="rank r of every task's adapter")
    alpha: Positive = Field(default=32.0, description="scale s = alpha / rank")


class ColorConfig(ExpertConfig, frozen=True):
    """Settings of `Color` in methods/experts/color.py, which explains them."""

    name: Literal["color"] = "color"
    centroids: Count = Field(default=5, ge=1, description="k-means centroids per task")


class DualLoraConfig(InputsConfig, ExpertConfig, frozen=True):
    """Settings of `DualLora` in methods/experts/duallora.py, which explains them."""

    name: Literal["duallora"] = "duallora"
    rank: Count = Field(
        default=8,
        ge=2,
        description="ranks of a task's two adapters together: ⌊rank/2⌋ for O, the others for R",
    )


class GainLoraConfig(ExpertConfig, InputsConfig, frozen=True):
    """Settings of `GainLora` in methods/experts/gainlora.py, which explains them."""

    name: Literal["gainlora"] = "gainlora"
    hidden: Count = Field(default=100, ge=1, description="inner width of a gate")


class HideLoraConfig(ExpertConfig, frozen=True):
    """Settings of `HideLora` in methods/experts/hidelora.py, which explains them."""

    name: Literal["hidelora"] = "hidelora"
    weight: NotNegative = Field(default=0.01, description="weight of the contrastive term")
    temperature: Positive = Field(default=0.8, description="τ, divisor of the cosines in it")
    momentum: Fraction = Field(
        default=0.1,
        description="m of A ← (1-m)·A + m·(mean of the earlier tasks' A), and of B, when a task ends",
    )
    shrinkage: Fraction = Field(
        default=0.1, gt=0, description="γ in (1 - γ)·Σ + γ·tr(Σ)/h·I, the covariance that is used"
    )


class SaptConfig(ExpertConfig, frozen=True):
    """Settings of `Sapt` in methods/experts/sapt.py, which explains them."""

    name: Literal["sapt"] = "sapt"
    hidden: Count = Field(default=100, ge=1, description="inner width of the query net")
    kl_ratio: NotNegative = Field(
        default=1.0, description="weight of each old task's KL(its stored attention ‖ attention now)"
    )
    replay_examples: int = Field(
        default=512, ge=1, description="how many training prompts of each old task are drawn for that term"
    )
    replay_batch: Count = Field(default=16, ge=1, description="prompts of each old task per optimizer step")


class SingleConfig(ExpertConfig, frozen=True):
    """Settings of `Single` in methods/experts/single.py, which explains them."""

    name: Literal["single"] = "single"

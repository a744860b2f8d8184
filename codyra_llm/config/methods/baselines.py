"""Settings of what other methods are compared with."""

from typing import Literal

from pydantic import Field

from codyra_llm.config.methods.base import Count, LoraConfig, MethodConfig
from codyra_llm.core.schema import Positive


class NoneConfig(MethodConfig, frozen=True):
    """Settings of `NoMethod` in methods/baselines/none.py, which explains them."""

    name: Literal["none"] = "none"


class IclConfig(MethodConfig, frozen=True):
    """Settings of `Icl` in methods/baselines/icl.py, which explains them."""

    name: Literal["icl"] = "icl"
    shots: Count = Field(
        default=6, ge=0, description="demonstrations before each test prompt; 0: the same as none"
    )


class MtlConfig(LoraConfig, frozen=True):
    """Settings of `Mtl` in methods/baselines/mtl.py, which explains them."""

    name: Literal["mtl"] = "mtl"
    alpha: Positive | None = Field(
        default=None, description="scale s = alpha / rank; null: alpha = rank, so s = 1"
    )


class SeqFtConfig(MethodConfig, frozen=True):
    """Settings of `SeqFt` in methods/baselines/seqft.py, which explains them."""

    name: Literal["seqft"] = "seqft"
    carry_optimizer: bool = Field(
        default=False, description="keep Adam's moments from task to task, as the published runs did"
    )

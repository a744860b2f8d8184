"""Settings of what other methods are compared with."""

from typing import Literal

from pydantic import Field

from codyra_llm.config.methods.base import Count, LoraConfig, MethodConfig
from codyra_llm.core.schema import Positive


class NoneConfig(MethodConfig):
    name: Literal["none"] = "none"


class IclConfig(NoneConfig):
    name: Literal["icl"] = "icl"
    shots: Count = Field(6, ge=0, description="demonstrations before each test prompt; 0: the same as none")


class MtlConfig(LoraConfig):
    name: Literal["mtl"] = "mtl"
    alpha: Positive | None = Field(None, description="scale s = alpha / rank; null: alpha = rank, so s = 1")


class SeqFtConfig(MethodConfig):
    name: Literal["seqft"] = "seqft"
    carry_optimizer: bool = Field(
        False, description="keep Adam's moments from task to task, as the published runs did"
    )

"""Settings of methods that train prompts."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from codyra_llm.config.methods.base import Count, MethodConfig
from codyra_llm.core.schema import NotNegative, Positive


class PromptConfig(MethodConfig, frozen=True):
    """The learning rate of the prompts; rates that suit LoRA are too small for them. Published:
    0.03·batch/256 for L2P on a vision transformer, 0.3 for Progressive Prompts on T5, 1e-5 on TRACE, where
    prompts hardly change. The default is ours."""

    prompt_lr: Positive = Field(default=0.01, description="learning rate of prompts and keys")


Layer = Annotated[int, Field(ge=0)]


class DualPromptConfig(PromptConfig, frozen=True):
    """Settings of `DualPrompt` in methods/prompts/dualprompt.py, which explains them."""

    name: Literal["dualprompt"] = "dualprompt"
    general_layers: list[Layer] = Field(
        default=[0, 1], min_length=1, description="layers of the general prefix, from 0"
    )
    general_length: Count = Field(default=5, ge=1, description="keys and values of the general prefix")
    expert_layers: list[Layer] = Field(
        default=[2, 3, 4], min_length=1, description="layers of the experts' prefixes"
    )
    expert_length: Count = Field(default=20, ge=1, description="keys and values of an expert's prefix")
    pull: NotNegative = Field(
        default=1.0, description="c, how strongly a task's key is pulled to its queries"
    )
    key_init: Literal["mean", "uniform"] = Field(
        default="mean",
        description="mean: a task's key starts as the mean direction of "
        "its queries; uniform: U(-1, 1), as published",
    )

    @model_validator(mode="after")
    def _apart(self) -> "DualPromptConfig":
        both = self.general_layers + self.expert_layers
        if len(set(both)) < len(both):
            raise ValueError(
                "'general_layers' and 'expert_layers' name a layer twice; a layer has one prefix"
            )
        return self


class L2pConfig(PromptConfig, frozen=True):
    """Settings of `L2p` in methods/prompts/l2p.py, which explains them."""

    name: Literal["l2p"] = "l2p"
    pool: Count = Field(default=10, ge=1, description="M, prompts in the pool")
    length: Count = Field(default=5, ge=1, description="tokens of each prompt")
    chosen: Count = Field(
        default=3, ge=1, description="N, prompts for an example; 3 on TRACE, 5 in the original"
    )
    pull: NotNegative = Field(
        default=0.5,
        description="c, how strongly chosen keys are pulled to the queries; 0.5 on TRACE, 0.1 "
        "in the original's code",
    )

    @model_validator(mode="after")
    def _enough(self) -> "L2pConfig":
        if self.chosen > self.pool:
            raise ValueError(
                f"'chosen' is {self.chosen}, but the pool has {self.pool} prompts; choose at most as many"
            )
        return self


class PpConfig(PromptConfig, frozen=True):
    """Settings of `ProgressivePrompts` in methods/prompts/pp.py, which explains them."""

    name: Literal["pp"] = "pp"
    length: Count = Field(default=20, ge=1, description="tokens of each task's prompt")
    mlp: bool = Field(
        default=True, description="train the prompt through a residual MLP, which is dropped after its task"
    )
    mlp_width: Count = Field(
        default=800, ge=1, description="its hidden width; 800 in the original, twice the model's on TRACE"
    )

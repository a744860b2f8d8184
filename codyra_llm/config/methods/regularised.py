"""Settings of methods that add a penalty to the loss."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from codyra_llm.config.methods.base import Count
from codyra_llm.config.methods.sequential import SequentialConfig, StartConfig
from codyra_llm.core.schema import Fraction, NotNegative, Positive


class CLoraConfig(SequentialConfig, frozen=True):
    """Settings of `CLora` in methods/regularised/clora.py, which explains them."""

    name: Literal["clora"] = "clora"
    fresh: Literal[False] = Field(
        default=False, description="must stay false: the factors are shared by all tasks"
    )
    carry_optimizer: Literal[False] = Field(
        default=False, description="must stay false: fewer parameters train later"
    )
    weight: NotNegative = Field(default=1.0, description="λ of ‖R_oldᵀ R_δ‖_F², per optimizer step")
    factor_lr: NotNegative = Field(
        default=0.0,
        description="learning rate of A and B from the second task on, as a share of "
        "the optimizer's; 0: frozen",
    )


class DreamConfig(StartConfig, frozen=True):
    """Settings of `Dream` in methods/regularised/dream.py, which explains them."""

    name: Literal["dream"] = "dream"
    weight: NotNegative = Field(
        default=1.0, description="β of the dreamt batch's term, once per optimizer step"
    )
    target: Literal["kl", "tokens"] = Field(
        default="kl",
        description="kl: stay close to the distribution of the model before the task; tokens: cross entropy "
        "on the tokens that it drew, as for LAMOL's pseudo-examples",
    )
    samples: int = Field(
        default=256,
        ge=0,
        le=1 << 16,
        description="sequences that the model generates before every task; 0: none",
    )
    sample_tokens: Count = Field(default=48, ge=1, description="most tokens that it draws for each")
    prompted: Fraction = Field(
        default=0.5,
        description="share of them that begin like the earlier tasks' prompts, the same number for each "
        "task; the others begin with BOS and a random token",
    )
    prefix_tokens: Count = Field(
        default=64,
        ge=1,
        description="most tokens that are kept of the common beginning of a task's prompts",
    )
    batch: Count = Field(default=16, ge=1, description="sequences per optimizer step, redrawn each time")
    inputs: Literal["beginnings", "learnt", "demonstrations"] = Field(
        default="beginnings",
        description="what dreams of earlier tasks are made from: beginnings: the common beginning of a "
        "task's prompts; learnt: the same, and the model is trained to write prompts (LAMOL, with target "
        "tokens); demonstrations: training examples of each task, which are kept, and after which the base "
        "writes inputs (SSR); needs `fresh` false",
    )
    input_weight: NotNegative | None = Field(
        default=None,
        description="learnt only: λ of the cross entropy of the prompts' tokens in every step; default 0.25",
    )
    demonstrations: Count | None = Field(
        default=None,
        ge=1,
        description="demonstrations only: how many training examples of each task are kept for it, if the "
        "model's positions have room for them; default 2",
    )
    input_tokens: Count | None = Field(
        default=None,
        ge=1,
        description="demonstrations only: most tokens that the base writes for an input; a longer one is "
        "dropped; default 256",
    )

    @model_validator(mode="after")
    def _base_is_within_reach(self) -> "DreamConfig":
        if self.inputs == "demonstrations" and self.fresh:
            raise ValueError(
                "'inputs' is demonstrations, after which the base writes inputs, but with 'fresh' true every "
                "update is merged into the base; set 'fresh' to false, or 'inputs' to beginnings"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_inputs(self) -> "DreamConfig":
        used_by = {
            "input_weight": "learnt",
            "demonstrations": "demonstrations",
            "input_tokens": "demonstrations",
        }
        for key, inputs in used_by.items():
            if getattr(self, key) is not None and self.inputs != inputs:
                raise ValueError(
                    f"'{key}' has no effect with inputs '{self.inputs}'; remove it, or set inputs to {inputs}"
                )
        return self


class SdftConfig(StartConfig, frozen=True):
    """Settings of `Sdft` in methods/regularised/sdft.py, which explains them."""

    name: Literal["sdft"] = "sdft"
    demonstration: str = Field(
        default="{prompt}\n\nThis is an example for a response to the question:\n{answer}\n\nNow answer with "
        "a response of your own:\n",
        description="the prompt that the teacher gets; {prompt} and {answer} are replaced by the example's",
    )
    divergence: Literal["reverse", "forward"] = Field(
        default="forward",
        description="forward: KL(teacher ‖ student), with which the paper's results were made; reverse: "
        "KL(student ‖ teacher), which the paper writes",
    )
    answer_tokens: Count = Field(default=64, ge=1, description="most tokens that the student draws")
    skip: int = Field(
        default=0,
        ge=0,
        le=1 << 16,
        description="how many first tokens of an answer the loss leaves out, since teachers tend to begin "
        "with words about the demonstration",
    )
    teacher_rate: Fraction = Field(
        default=0.02,
        description="α of the teacher, an average of the student: φ ← α θ + (1 - α) φ after every step",
    )
    probe: int = Field(
        default=32,
        ge=0,
        le=1 << 16,
        description="on how many examples of the first task to check, before training, that the base makes "
        "use of a demonstration; 0: no check",
    )
    gain: Fraction = Field(
        default=0.5,
        description="the least share by which the demonstration must lower the answers' cross entropy there",
    )

    @field_validator("demonstration")
    @classmethod
    def _shows_both(cls, text: str) -> str:
        missing = [name for name in ("{prompt}", "{answer}") if name not in text]
        if missing:
            raise ValueError(f"a demonstration shows the prompt and the answer; add {' and '.join(missing)}")
        return text


class EwcConfig(StartConfig, frozen=True):
    """Settings of `Ewc` in methods/regularised/ewc.py, which explains them."""

    name: Literal["ewc"] = "ewc"
    fresh: Literal[False] = Field(
        default=False, description="must stay false: F belongs to one adapter for all tasks"
    )
    weight: NotNegative = Field(
        default=400.0,
        description="λ of the penalty λ/2 Σ F (θ - θ*)²; F is as small as squared "
        "gradients, so tune it until `ewc` in the log is not negligible",
    )
    decay: Fraction = Field(default=1.0, description="γ in F ← γ F + F_new; 1 sums all tasks")
    examples: int = Field(
        default=500, ge=1, description="how many training examples of a finished task F_new is averaged over"
    )


class EwcLoraConfig(StartConfig, frozen=True):
    """Settings of `EwcLora` in methods/regularised/ewclora.py, which explains them."""

    name: Literal["ewclora"] = "ewclora"
    fresh: Literal[True] = Field(
        default=True, description="must stay true: the penalty is on a task's own update"
    )
    weight: NotNegative = Field(
        default=1e4,
        description="λ of the penalty λ/2 Σ F ΔW²; F is as small as squared gradients, so tune it until "
        "`ewc` in the log is not negligible",
    )
    decay: Fraction = Field(default=1.0, description="γ in F ← γ F + F_new; 1 sums all tasks")
    examples: int = Field(
        default=500, ge=1, description="how many training examples of a finished task F_new is averaged over"
    )


class HideLoraRepoConfig(SequentialConfig, frozen=True):
    """Settings of `HideLoraRepo` in methods/regularised/hidelora_treelora_repo.py, which explains them."""

    name: Literal["hidelora_treelora_repo"] = "hidelora_treelora_repo"
    weight: NotNegative = Field(default=0.5, description="weight of the contrastive term, per optimizer step")
    temperature: Positive = Field(default=0.8, description="divisor of the similarities")


class LwfConfig(StartConfig, frozen=True):
    """Settings of `Lwf` in methods/regularised/lwf.py, which explains them."""

    name: Literal["lwf"] = "lwf"
    weight: NotNegative = Field(default=1.0, description="α of α·T²·KL(teacher ‖ student)")
    temperature: Positive = Field(default=2.0, description="T that divides both models' logits")


class OLoraConfig(SequentialConfig, frozen=True):
    """Settings of `OLora` in methods/regularised/olora.py, which explains them."""

    name: Literal["olora"] = "olora"
    fresh: bool = Field(
        default=True,
        description="every task has an adapter of its own; false, with lambda_orthogonal 0, is seqlora",
    )
    lambda_orthogonal: NotNegative = Field(
        default=2048.0,
        description="λ1, weight of the mean overlap over pairs of a direction of the task and one of an "
        "earlier task, per optimizer step; released: 0.5 times the sum over 64 sites of 8 x 8 pairs, so 2048",
    )
    lambda_norm: NotNegative = Field(
        default=0.0, description="λ2, weight of Σ ‖A‖_F + ‖B‖_F of the task's own adapter"
    )
    overlap: Literal["abs", "squared"] = Field(
        default="abs", description="Σ|A_old Aᵀ| as in the released code, or Σ(A_old Aᵀ)² as in the paper"
    )

    @model_validator(mode="after")
    def _own_adapters(self) -> "OLoraConfig":
        if not self.fresh and self.lambda_orthogonal:
            raise ValueError(
                "'fresh' must be true where 'lambda_orthogonal' is above 0: one adapter for all tasks would "
                "be pushed away from itself"
            )
        return self


class TreeLoraConfig(SequentialConfig, frozen=True):
    """Settings of `TreeLora` in methods/regularised/treelora.py, which explains them."""

    name: Literal["treelora"] = "treelora"
    weight: Fraction = Field(
        default=0.1,
        description="β, share of the similar task's gradient in the step's gradient; not the "
        "paper's λ (0.5), which weighs another term",
    )
    exploration: NotNegative = Field(
        default=0.2,
        description="c in the lower confidence bound μ - c·√(log n / n_k); the paper "
        "has 2, with which 100 steps choose all earlier tasks nearly equally often",
    )


class TreeLoraRepoConfig(SequentialConfig, frozen=True):
    """Settings of `TreeLoraRepo` in methods/regularised/treelora_repo.py, which explains them."""

    name: Literal["treelora_repo"] = "treelora_repo"
    weight: NotNegative = Field(
        default=0.5,
        description="weight of the regulariser at the end of each epoch, to which it rises from 0",
    )

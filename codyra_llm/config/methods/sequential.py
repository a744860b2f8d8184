"""Settings of methods that train one adapter after the other."""

from typing import Literal

from pydantic import Field, model_validator

from codyra_llm.config.methods.base import Count, LoraConfig
from codyra_llm.core.schema import Fraction, NotNegative, Positive, Strict

REASONING_VARIANT = "LLM-CL-Benchmark_Reasoning"  # a folder of TRACE


class SequentialConfig(LoraConfig, frozen=True):
    """One adapter that is trained on all tasks in turn, or merged after each."""

    alpha: Positive | None = Field(
        default=None, description="scale s = alpha / rank; null: alpha = rank, so s = 1"
    )
    fresh: bool = Field(
        default=False, description="merge and start a fresh adapter after every task, as codyra does"
    )
    carry_optimizer: bool = Field(
        default=False, description="keep Adam's moments from task to task, as the published runs did"
    )
    merge_scale: Positive = Field(
        default=1.0, description="factor on a task's update when it is merged; needs `fresh`"
    )

    @model_validator(mode="after")
    def _scaled_where_merged(self) -> "SequentialConfig":
        if self.merge_scale != 1 and not self.fresh:
            raise ValueError(
                f"'merge_scale' is {self.merge_scale:g}, but with 'fresh' false one adapter goes on from "
                "task to task and none is merged; set 'fresh' to true, or remove it"
            )
        return self


class StartConfig(SequentialConfig, frozen=True):
    """How A is initialised."""

    start: Literal["random", "inputs", "weights"] = Field(
        default="random",
        description="how A is initialised: random; inputs: orthogonal to the leading directions of the "
        "layers' inputs on sequences that the model generates; weights: W's smallest right singular vectors",
    )
    start_energy: Fraction | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="inputs only: share of the inputs' energy in the directions that A avoids; default 0.95",
    )

    @model_validator(mode="after")
    def _energy_goes_with_inputs(self) -> "StartConfig":
        if self.start_energy is not None and self.start != "inputs":
            raise ValueError(
                f"'start_energy' has no effect with start '{self.start}'; remove it, or set start to inputs"
            )
        return self


class SeqLoraConfig(StartConfig, frozen=True):
    """Settings of `SeqLora` in methods/sequential/seqlora.py, which explains them."""

    name: Literal["seqlora"] = "seqlora"


class Threshold(Strict, frozen=True):
    """How hard the weights w are shrunk, and when."""

    schedule: Literal["budget", "published-ramp", "published"] = Field(
        default="budget",
        description="budget: the shrinks of all steps sum to `budget` and follow the learning rate; "
        "published-ramp: they rise until the end, as published, and sum to `budget`; published: κ rises to "
        "`kappa_max` in 50 stages, so it prunes nothing in fewer than 50 sparse steps",
    )
    budget: NotNegative | None = Field(
        default=None,
        description="S = Σκ over the sparse phase; default 0.6, with published-ramp 0.65, the total of the "
        "released setting",
    )
    kappa_max: NotNegative | None = Field(
        default=None, description="published schedule only: the last κ; default 0.005"
    )
    dense: Fraction = Field(default=0.5, lt=1, description="share of the steps before any shrinking")
    operator: Literal["soft", "released"] = Field(
        default="soft",
        description="soft: sign(w)·max(|w|-κ, 0); released: the public code's rule, with a dead zone of 2κ",
    )

    @model_validator(mode="after")
    def _used(self) -> "Threshold":
        unused = "budget" if self.schedule == "published" else "kappa_max"
        if getattr(self, unused) is not None:
            raise ValueError(f"'{unused}' has no effect with schedule '{self.schedule}'; remove it")
        return self


class RankWeightsConfig(LoraConfig, frozen=True):
    """An adapter with a weight per rank, and which of the ranks are kept."""

    scale: Positive = Field(default=1.0, description="s in ΔW = s·B diag(w) A; 1 in the published code")
    importance_init: Literal["constant", "normal"] = Field(
        default="constant", description="w at the start of a task: one value, or N(0, value²) as published"
    )
    importance_value: Positive = Field(default=1.0, description="the constant, or the standard deviation")
    importance_lr: NotNegative | None = Field(
        default=None, description="learning rate of w; default: the optimizer's"
    )
    align: bool = Field(
        default=True,
        description="when the dense phase ends, rewrite each ΔW in its singular directions, with "
        "w = σ/σ₁, so that the threshold removes ranks by size",
    )
    threshold: Threshold = Field(
        default=Threshold(), description="how hard the weights w are shrunk, and when"
    )
    selection: str = "threshold"
    keep: Fraction | None = Field(default=None, description="random only: share of all ranks kept")
    merge_scale: Positive = Field(default=1.0, description="factor on a task's update when it is merged")

    @model_validator(mode="after")
    def _keep_goes_with_random(self) -> "RankWeightsConfig":
        if (self.keep is None) == (self.selection == "random"):
            raise ValueError(
                "'keep' goes with selection 'random' and with nothing else; "
                + ("remove it" if self.keep is not None else "give the share of ranks to keep")
            )
        return self

    @model_validator(mode="after")
    def _nothing_that_is_not_read(self) -> "RankWeightsConfig":
        """Settings of weights per rank, which plain LoRA has not."""
        if self.selection != "none":
            return self
        fields = type(self).model_fields
        names = ("importance_init", "importance_value", "importance_lr", "align", "threshold")
        unused = [name for name in names if getattr(self, name) != fields[name].default]
        if unused:
            listed = ", ".join(repr(name) for name in unused)
            raise ValueError(
                f"no effect with selection 'none', where ranks have no weights: {listed}; remove this or "
                "choose another selection"
            )
        return self


class CodyraConfig(RankWeightsConfig, frozen=True):
    """Settings of `Codyra` in methods/sequential/codyra.py, which explains them."""

    name: Literal["codyra"] = "codyra"
    selection: Literal["threshold", "random", "none"] = Field(
        default="threshold",
        description="random: a control that drops ranks at random, shrinking them linearly to zero; none: "
        "plain LoRA, and with `merge_scale` a control that shrinks every update instead",
    )


class OldInputsConfig(LoraConfig, frozen=True):
    """What is kept of old inputs, and from which sequences."""

    samples: int = Field(
        default=1024,
        ge=0,
        le=1 << 16,
        description="sequences that the base generates by itself before the first task; their inputs count "
        "as those of one old task; 0: none",
    )
    sample_tokens: Count = Field(default=48, ge=1, description="tokens of each of them")
    max_examples: int = Field(
        default=256,
        ge=1,
        description="how many drawn training examples of a finished task its inputs are taken from",
    )
    sketch: Count = Field(
        default=256,
        ge=1,
        description="how many columns are kept of an input's second moment if the input is more than four "
        "times as wide; narrower ones are kept whole",
    )


class CodyraDriftConfig(OldInputsConfig, RankWeightsConfig, frozen=True):
    """Settings of `CodyraDrift` in methods/sequential/codyra_drift.py, which explains them."""

    name: Literal["codyra_drift"] = "codyra_drift"
    max_examples: int = Field(
        default=128,
        ge=1,
        description="how many drawn training examples of a finished task its inputs are taken from",
    )
    drift_weight: NotNegative = Field(
        default=10.0,
        description="μ of the relative drift of old outputs, once per optimizer step; 0: no penalty",
    )
    merge_weight: NotNegative = Field(
        default=1.0,
        description="μ_m, weight of old against new inputs in the closed-form merge; 0: the update as "
        "trained",
    )
    chats: Fraction = Field(
        default=0.5,
        description="share of the `samples` that are chats (a user's text and an answer, with twice as many "
        "tokens); for models with a chat template",
    )
    general: str | None = Field(
        default=None,
        min_length=1,
        description="a set of general data that the model is to go on answering as it does: before the first "
        "task, up to `max_examples` of its training examples count as those of one more old task; a folder "
        "in data.root, or a task of the benchmark that is not learnt; null: none",
    )
    answer_share: Fraction | None = Field(
        default=0.5,
        description="total weight, in a task's second moments, of the positions that predict the answer's "
        "tokens, which are few where prompts are long; null: every token has the same weight",
    )
    ridge: Positive = Field(
        default=1e-3,
        description="ε of that merge, and of selection ratio, as a share of the inputs' mean energy; a "
        "smaller one magnifies rounding errors where the inputs have almost no energy",
    )
    selection: Literal["none", "ratio", "threshold", "random"] = Field(
        default="none",
        description="ratio: drop the ranks with the least gain on new inputs per drift of old outputs; "
        "threshold, random: codyra's rule and its random control, for comparison",
    )
    keep_drift: Fraction | None = Field(
        default=None,
        description="ratio only: τ, the share of the drift of old outputs that may remain when the ranks are "
        "chosen, at the end of the dense phase; those that stay are trained further",
    )

    @model_validator(mode="after")
    def _budget_goes_with_ratio(self) -> "CodyraDriftConfig":
        if (self.keep_drift is None) == (self.selection == "ratio"):
            raise ValueError(
                "'keep_drift' goes with selection 'ratio' and with nothing else; "
                + ("remove it" if self.keep_drift is not None else "give the share of drift that may stay")
            )
        if self.selection == "ratio" and not self.threshold.dense:
            raise ValueError(
                "'threshold.dense' must be above 0 with selection 'ratio', which chooses among ranks that "
                "have been trained; 0.5 is the default"
            )
        return self


class IloraConfig(LoraConfig, frozen=True):
    """Settings of `Ilora` in methods/sequential/ilora.py, which explains them."""

    name: Literal["ilora"] = "ilora"
    alpha: Positive | None = Field(
        default=None, description="scale s = alpha / rank; null: alpha = rank, so s = 1"
    )
    memory: int = Field(
        default=500, ge=1, description="training examples of all earlier tasks, drawn by a reservoir"
    )
    batch: Count = Field(
        default=16,
        ge=1,
        description="how many of them each step replays; in the release as many as the step's own examples",
    )
    decay: Fraction = Field(
        default=0.25, description="α of slow ← α·slow + (1-α)·fast after every step; 0: slow is fast"
    )
    weight: NotNegative = Field(
        default=1.0,
        description="γ, weight of how far the fast adapter's hidden states are below the slow one's",
    )


class IloraMixedConfig(LoraConfig, frozen=True):
    """Settings of `IloraMixed` in methods/sequential/ilora_mixed.py, which explains them."""

    name: Literal["ilora_mixed"] = "ilora_mixed"
    alpha: Positive | None = Field(
        default=None, description="scale s = alpha / rank; null: alpha = rank, so s = 1"
    )
    ratio: Fraction = Field(
        default=0.1, description="share of each earlier task's training set that is replayed (its first part)"
    )
    decay: Fraction = Field(
        default=0.95, description="λ of slow ← λ·slow + (1-λ)·fast after every step; 0: slow is fast"
    )
    weight: NotNegative = Field(
        default=1.0, description="γ of the distance between the two adapters' hidden states"
    )


class RclConfig(SequentialConfig, frozen=True):
    """Settings of `Rcl` in methods/sequential/rcl.py, which explains them."""

    name: Literal["rcl"] = "rcl"
    folder: str | None = Field(
        default=None,
        description="TRACE's variant with reasoning; default: "
        f"{REASONING_VARIANT} in data.root, or next to it where there is none",
    )


class ReplayConfig(StartConfig, frozen=True):
    """Settings of `Replay` in methods/sequential/replay.py, which explains them."""

    name: Literal["replay"] = "replay"
    ratio: Fraction = Field(
        default=0.1, description="share of each earlier task's training set that is kept (its first part)"
    )
    general: str | None = Field(
        default="Lima",
        min_length=1,
        description="a set of general data whose training examples are all replayed too: a folder in "
        "data.root, or a task of the benchmark that is not learnt; null: none",
    )
    when: Literal["after", "mixed"] = Field(
        default="mixed",
        description="mixed: memory in every epoch; after: one more epoch over the memory after the task's "
        "own, as published, with its own learning-rate schedule",
    )


class SoraConfig(SequentialConfig, frozen=True):
    """Settings of `Sora` in methods/sequential/sora.py, which explains them."""

    name: Literal["sora"] = "sora"
    fresh: Literal[False] = Field(
        default=False,
        description="must stay false: one gated adapter for all tasks; codyra is the "
        "method that merges and restarts",
    )
    kappa: NotNegative = Field(
        default=5e-4, description="threshold κ after every step, not multiplied by the learning rate"
    )
    gate_init: Literal["normal", "constant"] = Field(
        default="normal", description="gates at the start of the stream: N(0, 1) as published, or 1"
    )
    gate_lr: NotNegative | None = Field(
        default=None,
        description="learning rate of the gates; null: the optimizer's; 0: no "
        "gradient, only the threshold changes them (not under ZeRO)",
    )


class SlaoConfig(SequentialConfig, frozen=True):
    """Settings of `Slao` in methods/sequential/slao.py, which explains them."""

    name: Literal["slao"] = "slao"
    fresh: Literal[False] = Field(
        default=False, description="must stay false: each task starts from the last one's factors"
    )
    carry_optimizer: Literal[False] = Field(
        default=False, description="must stay false: A is rewritten between tasks, and its moments with it"
    )


class PmConfig(OldInputsConfig, StartConfig, frozen=True):
    """Settings of `PerturbMerge` in methods/sequential/pm.py, which explains them."""

    name: Literal["pm"] = "pm"
    fresh: Literal[True] = Field(
        default=True, description="must stay true: α is chosen for a task's own update"
    )
    curvature: Literal["fisher", "inputs"] = Field(
        default="fisher",
        description="how the cost of a change of W to a task is measured: fisher: by the diagonal Fisher "
        "information, as published; inputs: by the change of outputs on its inputs, without gradients",
    )
    weight: NotNegative = Field(
        default=1.0, description="inputs only: μ, weight of the earlier tasks against the new one"
    )
    perturbation: Fraction = Field(
        default=0.5, lt=1, description="ε: gradients are taken at (1 ± ε) ΔW; 0: at ΔW"
    )
    samples: int = Field(
        default=0,
        ge=0,
        le=1 << 16,
        description="inputs only: sequences that the base generates by itself before the first task; their "
        "inputs count as those of one old task; 0: none",
    )

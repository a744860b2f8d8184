"""One adapter per task beside the base; single is told which to use, color and hidelora infer it from the prompt."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..lora.layer import AdapterSpec
from ..lora.mixture import attach_mixture, select, weigh
from ..loss import head_loss
from .base import Condition, Fraction, LoraConfig, Method, NotNegative, Positive, Task, restore
from .features import cosine, mean_state, over_prompts, padded, pooled_states, prompt_mask, row_weights
from .identity import Gaussians, kmeans


class ExpertConfig(LoraConfig):
    rank: int = Field(8, ge=1, description="rank r of every task's adapter")
    alpha: Positive = Field(32.0, description="scale s = alpha / rank")


class SingleConfig(ExpertConfig):
    name: Literal["single"] = "single"


class Single(Method):
    """A fresh LoRA of its own for each task (Hu et al., 2106.09685), trained from the base and chosen by the true task.

    The upper bound for methods that infer the task, and the only one here that is told it. A prompt of no task, or of
    one not learnt yet, is answered by the base. As published on TRACE: rank 8, alpha 32, dropout 0.1, q_proj and
    v_proj.
    Cost per step: none beside the adapter. Inference holds all adapters and multiplies with all of them.
    """

    name, summary, Config = "single", "one LoRA per task, chosen by the true task", SingleConfig
    config: ExpertConfig
    mode, merges, task_id, grows, max_zero_stage = "apart", False, True, True, 2

    def spec(self) -> AdapterSpec:
        return AdapterSpec(self.config.rank, self.config.alpha / self.config.rank, self.config.dropout)

    def install(self, model, task: Task) -> None:
        self.learnt = task.index + 1
        adapters = [task.archive.load(k).adapters for k in range(self.learnt)]
        attach_mixture(model, self.config.targets, self.spec(), adapters)

    @torch.no_grad()
    def condition(self, model, prompts: list[list[int]], task: int | None) -> Condition:
        weigh(model, None)  # what is read from the prompts is the base's
        weigh(model, self.mixture(model, prompts, task))
        return Condition(select=lambda rows: select(model, rows))

    def mixture(self, model: nn.Module, prompts: list[list[int]], task: int | None) -> Tensor | None:
        """Weights [prompts, tasks] of the adapters; None: the base alone."""
        if task is None or task >= self.learnt:
            return None
        return self.only(torch.full((len(prompts),), task, device=model.device))

    def only(self, tasks: Tensor) -> Tensor:
        """Weight 1 for the adapter of each row's task [rows], 0 for the others."""
        return functional.one_hot(tasks, self.learnt).float()


class ColorConfig(ExpertConfig):
    name: Literal["color"] = "color"
    centroids: int = Field(5, ge=1, description="k-means centroids per task")


class Color(Single):
    """A fresh LoRA per task; the nearest of all tasks' k-means centroids picks the adapter for each prompt.

    Source: CoLoR (2311.17601), for vision transformers, of which the abstract alone was read: not a reproduction. Ours:
    the feature, which is the mean over the prompt's tokens of the frozen base's last hidden state, the same at training
    and at test; k-means++ seeds; Euclidean distance. Where `model.quantization` packs the base for training, centroids
    come from the packed weights and test features from the plain ones.
    Cost: none per step; one forward pass over the task's prompts per task and one over every test prompt. State: the
    centroids, 5·h float32 per task. TRACE's tasks but the two of NumGLUE have prompts of their own, so expect this
    near `single`.
    """

    name, summary, Config = "color", "one LoRA per task, chosen by the nearest prompt centroid", ColorConfig
    config: ColorConfig
    task_id, grows, max_zero_stage = False, True, 0

    def begin_task(self, model, task: Task) -> None:
        super().begin_task(model, task)  # B = 0, so the features are the base's
        features = over_prompts(model, task, task.encode(task.records()), pooled_states)
        self._found = kmeans(features.cpu().double(), self.config.centroids, "k-means", self.seed, task.index).float()

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        old = [task.state["centroids"]] if task.index else []
        return {"centroids": torch.cat([*old, self._found[None]])}  # [tasks, k, h]

    def install(self, model, task: Task) -> None:
        super().install(model, task)
        self._centroids = task.state["centroids"].flatten(0, 1).double()

    def mixture(self, model, prompts, task) -> Tensor:
        features = pooled_states(model, *padded(prompts, model.device)).cpu().double()
        nearest = torch.cdist(features, self._centroids).argmin(1) // self.config.centroids
        return self.only(nearest.to(model.device))


class HideLoraConfig(ExpertConfig):
    name: Literal["hidelora"] = "hidelora"
    weight: NotNegative = Field(0.01, description="weight of the contrastive term")
    temperature: Positive = Field(0.8, description="τ, divisor of the cosines in it")
    shrinkage: Fraction = Field(0.1, gt=0, description="γ in (1 - γ)·Σ + γ·tr(Σ)/h·I, the covariance that is used")


class HideLora(Single):
    """A LoRA per task that starts from the one before; the task is inferred by linear discriminant analysis of prompts.

    Source: HiDe (its public code, HiDe-Prompt, was read), for vision transformers with a classifier. Kept of
    it: the adapters' start, statistics of features of the base that infer the task, a contrastive term against what
    earlier tasks left, weight 0.01, τ = 0.8. Ours, as a causal LM has no class head to align: the feature (mean over
    the prompt's tokens of the last hidden state), one Gaussian per task with the pooled covariance Σ, equal priors, and
    the term

        L_i = -log( e^{1/τ} / (e^{1/τ} + Σ_{k<t} e^{cos(z_i, c_k)/τ}) ),

    z_i the adapted model's feature of prompt i, c_k the mean that task k's own adapter left; averaged as the loss is.
    The release takes unnormalised products and every other row of the batch as a negative, those of the same task too.
    It shapes z and has no part in inferring the task. What TreeLoRA's table calls HideLoRA is another method.
    Cost per step: an [examples, tasks] product. Per task: a forward pass over its prompts before and one after; one
    over every test prompt; a Cholesky factor of size h per evaluation. State: h² + 2·h per task in float32.
    """

    name, summary, Config = "hidelora", "one LoRA per task from the one before, chosen by prompt statistics", HideLoraConfig
    config: HideLoraConfig
    task_id, grows, max_zero_stage, packs = False, True, 0, False

    def begin_task(self, model, task: Task) -> None:
        super().begin_task(model, task)  # B = 0, so the features are the base's
        self._examples = task.encode(task.records())
        self._gaussians = Gaussians.load(task.state).with_task(over_prompts(model, task, self._examples, pooled_states))
        self._old = task.state["adapted"].to(model.device) if task.index else None  # [tasks, h]
        if task.index:
            restore(model, task.archive.load(task.index - 1))

    def loss(self, model, batch) -> dict[str, Tensor]:
        if self._old is None or not self.config.weight:
            return super().loss(model, batch)
        states = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        labelled = states.flatten(0, 1).index_select(0, batch.predictors)
        cap = getattr(model.config, "final_logit_softcapping", None)
        terms = contrast(mean_state(states, prompt_mask(batch)), self._old, self.config.temperature)
        return {"loss": head_loss(model.lm_head, labelled, batch.targets, batch.weights, cap),
                "contrast": self.config.weight * row_weights(batch) @ terms}

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        adapted = over_prompts(model, task, self._examples, pooled_states).mean(0, keepdim=True)
        old = [] if self._old is None else [self._old]
        return {**self._gaussians.state(), "adapted": torch.cat([*old, adapted])}  # [tasks, h]

    def install(self, model, task: Task) -> None:
        super().install(model, task)
        self._tells = Gaussians.load(task.state).classifier(self.config.shrinkage)

    def mixture(self, model, prompts, task) -> Tensor:
        features = pooled_states(model, *padded(prompts, model.device))
        return self.only(self._tells(features).to(model.device))


def contrast(features: Tensor, old: Tensor, temperature: float) -> Tensor:
    """The term L_i of each row of `features` [n, h] against `old` [tasks, h]: [n]."""
    own = features.new_full((len(features), 1), 1 / temperature)
    return torch.cat([own, cosine(features, old) / temperature], 1).logsumexp(1) - own.squeeze(1)

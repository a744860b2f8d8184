"""HiDe-LoRA for a causal LM: one adapter per task that starts from the one before; the task is inferred from
the prompt."""

import torch
from torch import Tensor

from codyra_llm.config.methods.experts import HideLoraConfig
from codyra_llm.lora.layer import sites
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.base import Task, restore
from codyra_llm.methods.experts.identity import Gaussians
from codyra_llm.methods.experts.single import Single
from codyra_llm.methods.parts.features import (
    cosine,
    mean_state,
    over_prompts,
    padded,
    pooled_states,
    prompt_mask,
    row_weights,
)
from codyra_llm.models import families
from codyra_llm.models.attention import packed_attention


class HideLora(Single):
    """A LoRA per task that starts from the one before; the task is inferred by linear discriminant analysis
    of prompts.

    Source: HiDe (its public code, HiDe-Prompt and HiDe-PET, was read), for vision transformers with a
    classifier. Kept: the adapters' start and, when a task ends, their momentum (HiDe-PET's lora_momentum,
    0.1), statistics of the base's features from which the task is inferred, a contrastive term against the
    earlier tasks' features, weight 0.01, τ = 0.8. Left out: the epochs in which a head is aligned. Ours, as a
    causal LM has no class head to align: the feature (mean over the prompt's tokens of the last hidden
    state), one Gaussian per task with the pooled covariance Σ, equal priors, and the term

        L_i = -log( e^{1/τ} / (e^{1/τ} + Σ_{k<t} e^{cos(z_i, c_k)/τ}) ),

    z_i the adapted model's feature of prompt i, c_k the mean feature of task k with its own adapter; averaged
    like the loss. The release uses unnormalised products and every other row of the batch as a negative,
    including those of the same task. The term shapes z and is not used to infer the task. With
    `model.quantization` the statistics are of the packed base, and test features of the plain one. What
    TreeLoRA's table calls HideLoRA is another method. Cost per step: an [examples, tasks] product. Per task:
    a forward pass over its prompts before and one after; one over every test prompt; a Cholesky factor of
    size h per evaluation. State: h² + 2·h per task in float32."""

    name, summary, Config = (
        "hidelora",
        "one LoRA per task from the one before, chosen by prompt statistics",
        HideLoraConfig,
    )
    config: HideLoraConfig
    task_id, grows, max_zero_stage, packs = False, True, 0, False

    def begin_task(self, model, task: Task) -> None:
        """Take the prompts' statistics from the base, then go on from the last task's adapter."""
        super().begin_task(model, task)  # B = 0, so the features are the base's
        self._examples = task.encode(task.records())
        features = over_prompts(model, task, self._examples, pooled_states)  # [n, h]
        self._gaussians = Gaussians.load(task.state).with_task(features)
        self._old = task.state["adapted"].to(model.device) if task.index else None  # [tasks, h]
        past = [task.archive.load(k).adapters for k in range(task.index)]
        self._past = {}
        if task.index:
            for site in past[0]:
                self._past[site] = mean_adapter([adapters[site] for adapters in past])
            restore(model, task.archive.load(task.index - 1))

    def loss(self, model, batch) -> dict[str, Tensor]:
        """Cross entropy, and the contrastive term against the earlier tasks' means."""
        if self._old is None or not self.config.weight:
            return super().loss(model, batch)
        states = packed_attention.states(model, input_ids=batch.ids)
        labelled = states.flatten(0, 1).index_select(0, batch.predictors)
        terms = contrast(mean_state(states, prompt_mask(batch)), self._old, self.config.temperature)
        return {
            "loss": batch.cross_entropy_of(model, labelled),
            "contrast": self.config.weight * row_weights(batch) @ terms,
        }

    def state_bytes(self, model, tasks: int) -> int:
        """The scatter, two means of each task, and a count."""
        size = families.pretrained(model).config.hidden_size
        return 4 * size * (size + 2 * tasks) + 8

    @torch.no_grad()
    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """The statistics, and the mean feature under the adapter as it is archived."""
        for site, past in self._past.items():  # features are those of the adapter that is archived
            layer = sites(model)[site]
            layer.lora_A.lerp_(past.a.to(layer.lora_A), self.config.momentum)
            layer.lora_B.lerp_(past.b.to(layer.lora_B), self.config.momentum)
        adapted = over_prompts(model, task, self._examples, pooled_states).mean(0, keepdim=True)
        old = [] if self._old is None else [self._old]
        return {**self._gaussians.state(), "adapted": torch.cat([*old, adapted])}  # [tasks, h]

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """The adapter moved towards the mean of the earlier ones."""
        if self._past:
            adapters = {site: self._moved(x, self._past[site]) for site, x in adapters.items()}
        return super().consolidate(adapters, index)

    def _moved(self, adapter: Adapter, past: Adapter) -> Adapter:
        m = self.config.momentum
        return Adapter(adapter.a.lerp(past.a, m), adapter.b.lerp(past.b, m), None)

    def install(self, model, task: Task) -> None:
        """In addition, the classifier that infers the task."""
        super().install(model, task)
        self._classify = Gaussians.load(task.state).classifier(self.config.shrinkage)

    def mixture(self, model, prompts, task) -> Tensor:
        """The adapter of the inferred task."""
        features = pooled_states(model, *padded(prompts, model.device))
        return self.only(self._classify(features).to(model.device))


def mean_adapter(adapters: list[Adapter]) -> Adapter:
    """The mean of the factors A and of the factors B."""
    a = torch.stack([adapter.a for adapter in adapters]).mean(0)
    b = torch.stack([adapter.b for adapter in adapters]).mean(0)
    return Adapter(a, b, None)


def contrast(features: Tensor, old: Tensor, temperature: float) -> Tensor:
    """The term L_i of each row of `features` [n, h] against `old` [tasks, h]: [n]."""
    own = features.new_full((len(features), 1), 1 / temperature)
    return torch.cat([own, cosine(features, old) / temperature], 1).logsumexp(1) - own.squeeze(1)

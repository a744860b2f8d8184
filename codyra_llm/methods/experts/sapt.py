"""SAPT: attention from the prompt to the tasks' keys mixes the adapters of all tasks, in training and at
test.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from codyra_llm.config.methods.experts import SaptConfig
from codyra_llm.core.tensors import generator
from codyra_llm.data.batches import in_one_copy
from codyra_llm.lora.layer import attach
from codyra_llm.lora.mixture import MixtureLinear, mixtures, weigh
from codyra_llm.methods.base import Task
from codyra_llm.methods.experts.single import Single
from codyra_llm.methods.parts.features import over_prompts, padded, pooled_embeddings, prompt_mask


class PromptAttention(nn.Module):
    """w = softmax(K q / √h), q = LayerNorm(SiLU(V U e)) for a prompt's pooled embedding e [h]; K [tasks, h],
    of which the last row trains. U [hidden, h] and V [h, hidden] without biases, nothing between them."""

    def __init__(self, size: int, hidden: int, device: torch.device):
        super().__init__()
        like = {"bias": False, "device": device, "dtype": torch.float32}
        self.query = nn.Sequential(
            nn.Linear(size, hidden, **like),
            nn.Linear(hidden, size, **like),
            nn.SiLU(),
            nn.LayerNorm(size, device=device, dtype=torch.float32),
        )
        self.key = nn.Parameter(torch.zeros(size, device=device))
        self.register_buffer("old", torch.zeros(0, size, device=device), persistent=False)

    @property
    def keys(self) -> Tensor:
        """All tasks' keys, [tasks, h]."""
        return torch.cat([self.old, self.key[None]])

    def forward(self, pooled: Tensor) -> Tensor:
        """log w [n, tasks] of pooled embeddings [n, h]."""
        return (self.query(pooled) @ self.keys.T / math.sqrt(self.key.numel())).log_softmax(1)

    @torch.no_grad()
    def reset(self, state: dict[str, Tensor], *key: int | str) -> None:
        """Append a new key ~ U(-1, 1) to those of `state`, and take its query net, or draw one."""
        draw = generator("attention", *key)
        for linear in self.query[:2]:
            bound = 1 / math.sqrt(linear.in_features)
            linear.weight.copy_((torch.rand(linear.weight.shape, generator=draw) * 2 - 1) * bound)
        if state:
            self.load(state)
            self.old = self.keys
        self.key.copy_(torch.rand(self.key.shape, generator=draw) * 2 - 1)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """What `state` gave."""
        keys = state["keys"].to(self.key)
        self.old = keys[:-1]
        self.key.copy_(keys[-1])
        own = {k.removeprefix("query."): v for k, v in state.items() if k.startswith("query.")}
        self.query.load_state_dict(own)

    def state(self) -> dict[str, Tensor]:
        """What `load` reads: keys and the query net."""
        return {"keys": self.keys.detach(), **{f"query.{k}": v for k, v in self.query.state_dict().items()}}


class Sapt(Single):
    """Δ(x) = Σ_k w_k·s·B_k A_k x over all tasks' adapters, w the prompt's attention (`PromptAttention`), in
    training and at test; L = CE + kl_ratio Σ_{old j} KL(a_j ‖ w'), a_j the mean attention of task j's prompts
    when it was learnt (zero for later adapters), w' that of its stored prompts now.

    Source: SAPT (Zhao et al., 2401.08295) and its released code; e is the maximum over the prompt's token
    embeddings, pads and answer left out. Published for LLaMA: rank 4, alpha 32, learning rate 5e-5, kl_ratio
    1 on SuperNI and 2 on the long stream, q_proj and v_proj; no setting for TRACE is. Ours: the stored
    prompts are real training prompts, so this method reads old data; the release trains a generator. Old
    adapters are frozen, but the gradient with respect to their input is exact, where the release cuts it. a_j
    is that of training prompts, in the release of the eval split. The term is added once per optimizer step,
    with a batch drawn by (seed, task, step). Cost per step: (tasks)× the adapter's products, in plain
    autograd; the attention on `replay_batch` prompts per old task. Memory: all adapters, `replay_examples`·h
    float32 per old task. State: h + tasks float32 per task and 2·hidden·h."""

    name, summary, Config = "sapt", "attention from the prompt mixes the adapters of all tasks", SaptConfig
    config: SaptConfig
    old_data, task_id, grows, max_zero_stage, packs = True, False, True, 0, False

    def attach(self, model) -> None:
        """Mixing layers, and the attention that weighs them."""
        attach(model, self.config.targets, self.spec(), MixtureLinear, self.config.layers)
        model.prompt_attention = self._fresh(model)

    def begin_task(self, model, task: Task) -> None:
        """Hold the earlier adapters, append a key, and read the stored prompts of earlier tasks."""
        super().begin_task(model, task)
        updates = [task.archive.load(k).adapters for k in range(task.index)]
        for name, layer in mixtures(model).items():
            layer.hold([adapters[name] for adapters in updates])
        model.prompt_attention.reset(task.state, self.seed, task.index)
        self._index, self._step, self._means = task.index, 0, {}
        # Of each old task: features [n, h] of its prompts, its mean attention [tasks], zero-padded.
        self._replayed = []
        for past in range(task.index):
            mean = task.state[f"mean.{past}"]
            self._means[f"mean.{past}"] = mean
            stored = task.sample(self.config.replay_examples, self.seed, past)
            features = over_prompts(model, task, stored, pooled_embeddings)
            padded_mean = functional.pad(mean, (0, task.index + 1 - len(mean)))
            self._replayed.append((features, padded_mean.to(features)))

    def before_step(self, groups, step: int, steps: int, schedule: str) -> None:
        """Remember the step, by which the stored prompts are drawn."""
        self._step = step

    def loss(self, model, batch) -> dict[str, Tensor]:
        """Cross entropy under the attention of each row's prompt."""
        weigh(model, model.prompt_attention(pooled_embeddings(model, batch.ids, prompt_mask(batch))).exp())
        return super().loss(model, batch)

    def penalty(self, model) -> dict[str, Tensor]:
        """kl_ratio Σ KL(a_j ‖ w') over earlier tasks."""
        if not (self._replayed and self.config.kl_ratio):
            return {}
        terms = []
        for past, (features, mean) in enumerate(self._replayed):
            draw = generator("replay", self.seed, self._index, self._step, past)
            drawn = torch.randperm(len(features), generator=draw)[: self.config.replay_batch]
            (chosen,) = in_one_copy([drawn], features.device)
            terms.append(attention_divergence(model.prompt_attention(features[chosen]), mean))
        return {"attention": self.config.kl_ratio * torch.stack(terms).sum()}

    def state_bytes(self, model, tasks: int) -> int:
        """The query net, and of each task its key and its prompts' attention to all up to it."""
        attention = cast(PromptAttention, model.prompt_attention)
        net = sum(p.nbytes for p in attention.query.parameters())
        return net + tasks * attention.key.nbytes + 4 * sum(range(tasks + 1))

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """Keys and query net, and the mean attention of the prompts of every task."""
        features = over_prompts(model, task, task.encode(task.records()), pooled_embeddings)
        with torch.no_grad():
            mean = model.prompt_attention(features).exp().mean(0)
        return {**model.prompt_attention.state(), **self._means, f"mean.{task.index}": mean}

    def install(self, model, task: Task) -> None:
        """In addition, the attention."""
        super().install(model, task)
        self._attention = self._fresh(model)
        self._attention.load(task.state)

    def _fresh(self, model: nn.Module) -> PromptAttention:
        embeddings = model.get_input_embeddings()
        return PromptAttention(embeddings.embedding_dim, self.config.hidden, embeddings.weight.device)

    def mixture(self, model, prompts, task) -> Tensor:
        """The attention of each prompt."""
        return self._attention(pooled_embeddings(model, *padded(prompts, model.device))).exp()


def attention_divergence(log_weights: Tensor, mean: Tensor) -> Tensor:
    """Mean over rows of KL(mean ‖ w) = Σ_k mean_k (log mean_k - log w_k), log w [n, tasks], mean [tasks]."""
    return functional.kl_div(log_weights, mean.expand_as(log_weights), reduction="batchmean")

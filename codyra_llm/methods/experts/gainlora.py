"""GainLoRA: the sum of all tasks' adapters, each scaled by a gate of the prompt that is near zero on earlier
tasks' prompts.
"""

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from codyra_llm.config.methods.experts import GainLoraConfig
from codyra_llm.core.tensors import generator
from codyra_llm.lora.layer import attach, train_only_b
from codyra_llm.lora.mixture import MixtureLinear, mixtures, weigh
from codyra_llm.methods.base import Task
from codyra_llm.methods.experts.single import Single
from codyra_llm.methods.parts.features import mean_embeddings, over_prompts, padded, prompt_mask
from codyra_llm.methods.parts.inputs import (
    energy_at,
    free_rows,
    grown,
    input_covariances,
    loaded,
    memory_bytes,
)
from codyra_llm.methods.parts.subspace import Subspace, most_bytes

SHARPNESS = 4.0


class PromptGates(nn.Module):
    """a_k = |2 σ(4 cos(f_k(e), c_k)) - 1| for the tasks k, f_k(e) = SiLU(V_k SiLU(U_k e)); e [h] a prompt's
    mean embedding, U_k [hidden, h], V_k [h, hidden], key c_k [h]. The last task's train, the others are
    held."""

    def __init__(self, size: int, hidden: int, device: torch.device):
        super().__init__()
        like = {"device": device, "dtype": torch.float32}
        self.u = nn.Parameter(torch.zeros(hidden, size, **like))
        self.v = nn.Parameter(torch.zeros(size, hidden, **like))
        self.key = nn.Parameter(torch.zeros(size, **like))
        self.load({"u": self.u[None], "v": self.v[None], "keys": self.key[None]})

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """What `state` gave, of all tasks: u [tasks, hidden, h], v [tasks, h, hidden], keys [tasks, h]."""
        for name, parameter in (("u", self.u), ("v", self.v), ("keys", self.key)):
            values = state[name].detach().to(parameter)
            self.register_buffer(f"old_{name}", values[:-1].clone(), persistent=False)
            parameter.copy_(values[-1])

    def state(self) -> dict[str, Tensor]:
        """All tasks' u [tasks, hidden, h], v [tasks, h, hidden] and keys [tasks, h]."""
        parameters = (("u", self.u), ("v", self.v), ("keys", self.key))
        return {name: torch.cat([getattr(self, f"old_{name}"), p.detach()[None]]) for name, p in parameters}

    @torch.no_grad()
    def reset(self, state: dict[str, Tensor], *key: int | str) -> None:
        """Add a task. Its U and V start from the previous task's, or are drawn from U(-1/√in, 1/√in); its key
        is drawn from U(-1, 1)."""
        draw = generator("gates", *key)
        drawn = [2 * torch.rand(p.shape, generator=draw) - 1 for p in (self.u, self.v, self.key)]
        u, v, key = (tensor[None] for tensor in drawn)  # [1, …]: one task
        if not state:
            self.load({"u": u / math.sqrt(u.shape[2]), "v": v / math.sqrt(v.shape[2]), "keys": key})
            return
        new = {"u": state["u"][-1:], "v": state["v"][-1:], "keys": key}
        self.load({name: torch.cat([state[name].to(tensor), tensor]) for name, tensor in new.items()})

    def inner(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """What the last task's V and key read: SiLU(U e) [n, hidden] and f(e) [n, h]."""
        middle = functional.silu(pooled @ self.u.T)
        return middle, functional.silu(middle @ self.v.T)

    def forward(self, pooled: Tensor) -> Tensor:
        """Gates [n, tasks] of pooled embeddings [n, h]."""
        middle = functional.silu(torch.einsum("nh,kmh->nkm", pooled, torch.cat([self.old_u, self.u[None]])))
        outputs = functional.silu(torch.einsum("nkm,khm->nkh", middle, torch.cat([self.old_v, self.v[None]])))
        return gate(outputs, torch.cat([self.old_keys, self.key[None]]))


def gates_of(model: nn.Module) -> PromptGates:
    """The gates that were attached to the model."""
    return cast(PromptGates, model.prompt_gates)


class GainLora(Single):
    """y = W x + Σ_k a_k(prompt)·s·B_k A_k x, a_k as `PromptGates` has it, one gate for all layers. U_t and
    V_t start from task t-1's, c_t from the leading direction of f on the task's prompts, off M₃. Their steps
    are projected off what earlier tasks' prompts were at their inputs:

        ΔU (I - M₁M₁ᵀ)     ΔV (I - M₂M₂ᵀ)     Δc (I - M₃M₃ᵀ)

    So f_t gives those prompts what f_{t-1} gave, c_t is orthogonal to it, and a_t is zero there.

    Source: GainLoRA (Liang and Li, 2505.15424) and its released code (T5; hidden 100, SiLU, ε 0.995 for gates
    and inputs, rank 8 on the long stream and 4 on SuperNI, alpha 32, learning rate 3e-4, q and v), in its
    form on InfLoRA: A_t and its memory are that method's (`inflora`), B_t trains. M₁, M₂, M₃ grow by DualGPM
    with covariances of e, SiLU(U e) and f(e). Ours: e is the mean over the prompt's own tokens, where the
    release divides by the padded length; rows of U and V are not rescaled to their length before the
    projected step, which would undo the projection; old adapters are frozen, but the gradient with respect to
    their input is exact, where the release cuts it; if no direction is left for a key, so that its gate would
    be dead, this is a Fault. Cost per step: (tasks)× the adapter's products in plain autograd, and
    2·hidden·h·tasks per prompt. Per task: inflora's passes over data; three eigenproblems of sizes h, hidden,
    h. Memory and state: all adapters; per task 2·hidden·h; at most in²/2 float32 per distinct input of an
    adapted layer. Training takes 1.4 times as long as seqlora's on the quickstart."""

    name, summary, Config = (
        "gainlora",
        "one LoRA per task, each scaled by a gate that is near zero on earlier tasks' prompts",
        GainLoraConfig,
    )
    config: GainLoraConfig
    task_id, grows, max_zero_stage, packs = False, True, 0, False

    def attach(self, model) -> None:
        """Mixing layers whose B trains, and the gates."""
        attach(model, self.config.targets, self.spec(), MixtureLinear, self.config.layers)
        train_only_b(model)
        model.prompt_gates = self._fresh(model)

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """Start the task's gate, and choose its A in what earlier tasks leave free."""
        super().begin_task(model, task)
        updates = [task.archive.load(k).adapters for k in range(task.index)]
        for name, layer in mixtures(model).items():
            layer.hold([adapters[name] for adapters in updates])
        gates = gates_of(model)
        self._gates = gates
        gates.reset(of_gates(task.state), self.seed, task.index)
        self._examples = task.encode(task.records())
        read, spaces = self._gate_covariances(model, task), loaded(of_spaces(task.state))
        self._spaces = {name: spaces.get(name, Subspace.nothing(len(c))) for name, c in read.items()}
        leading = free_rows(self._spaces["gate.key"], "the gates' keys", read["gate.key"], 1, task)
        gates.key.copy_(leading[0].to(gates.key) * gates.key.norm())
        self._steps = self._projected(gates) if task.index else []
        for name, inputs, layers in self._covariances(model, task):
            space = spaces.get(name, Subspace.nothing(len(inputs)))
            rows = free_rows(space, name, inputs, self.config.rank, task) / math.sqrt(3)
            for layer in layers:
                layer.lora_A.copy_(rows)

    def before_step(self, groups, step: int, steps: int, schedule: str) -> None:
        """Remember the gates, so that `after_step` knows how far they moved."""
        self._held = [p.detach().clone() for p, _ in self._steps]

    @torch.no_grad()
    def after_step(self, gradients) -> None:
        """The optimizer's steps, projected: Adam's scaling leaves what the gradients lie in."""
        for (p, space), held in zip(self._steps, self._held, strict=True):
            moved = (p - held).reshape(-1, p.shape[-1])
            p.copy_(held + space.free(moved.T).T.reshape(p.shape))

    def loss(self, model, batch) -> dict[str, Tensor]:
        """Cross entropy under the gates of each row's prompt."""
        weigh(model, gates_of(model)(mean_embeddings(model, batch.ids, prompt_mask(batch))))
        return super().loss(model, batch)

    def state_bytes(self, model, tasks: int) -> int:
        """The gates of each task, and the subspaces at their largest."""
        gates = gates_of(model)
        hidden, size = gates.u.shape
        spaces = memory_bytes(model) + 2 * most_bytes(size) + most_bytes(hidden)
        return spaces + tasks * (gates.u.nbytes + gates.v.nbytes + gates.key.nbytes)

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """The gates, and M₁, M₂, M₃ and the inputs' memories grown by this task."""
        state = {f"gates.{key}": value for key, value in self._gates.state().items()}
        for name, read in self._gate_covariances(model, task).items():
            state |= self._spaces[name].grown(read, energy_at(self.config, task)).state(name)
        only = replace(task, state=of_spaces(task.state))
        return state | grown(self.config, only, self._covariances(model, task))

    def install(self, model, task: Task) -> None:
        """In addition, the gates of all tasks."""
        super().install(model, task)
        self._answering = self._fresh(model)
        self._answering.load(of_gates(task.state))

    def mixture(self, model, prompts, task) -> Tensor:
        """The gates of each prompt."""
        return self._answering(mean_embeddings(model, *padded(prompts, model.device)))

    def _fresh(self, model: nn.Module) -> PromptGates:
        embeddings = model.get_input_embeddings()
        return PromptGates(embeddings.embedding_dim, self.config.hidden, embeddings.weight.device)

    @torch.no_grad()
    def _gate_covariances(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """The covariances of what the task's U, V and key read on its prompts, float64 on the CPU."""
        pooled = over_prompts(model, task, self._examples, mean_embeddings)
        read = dict(zip(("gate.u", "gate.v", "gate.key"), (pooled, *self._gates.inner(pooled)), strict=True))
        return {name: covariance(x.double().cpu()) for name, x in read.items()}

    def _projected(self, gates: PromptGates) -> list[tuple[nn.Parameter, Subspace]]:
        """What trains of the gates, with the space that its rows may move in, on its device."""
        named = (("gate.u", gates.u), ("gate.v", gates.v), ("gate.key", gates.key))
        return [(p, self._spaces[name].to(p)) for name, p in named]

    def _covariances(self, model: nn.Module, task: Task):
        def gated(batch) -> None:
            weigh(model, gates_of(model)(mean_embeddings(model, batch.ids, prompt_mask(batch))))

        return input_covariances(self.config, model, task, self.seed, gated)


def gate(outputs: Tensor, keys: Tensor) -> Tensor:
    """|2 σ(4 cos) - 1| of the outputs f_k(e) [n, tasks, h] and the keys [tasks, h]: [n, tasks]."""
    cosines = functional.normalize(outputs, dim=-1) * functional.normalize(keys, dim=-1)
    return (2 * torch.sigmoid(SHARPNESS * cosines.sum(-1)) - 1).abs()


def covariance(x: Tensor) -> Tensor:
    """The second moment of the rows of x [n, k], about zero and not their mean: [k, k]."""
    return x.T @ x / len(x)


def of_gates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gates' part of the method's state."""
    return {key.removeprefix("gates."): value for key, value in state.items() if key.startswith("gates.")}


def of_spaces(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The subspaces' part of it."""
    return {key: value for key, value in state.items() if not key.startswith("gates.")}

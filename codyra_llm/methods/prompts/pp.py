"""Progressive Prompts: a soft prompt per task, in front of all earlier ones, which are frozen."""

from typing import cast

import torch
from torch import Tensor, nn

from codyra_llm.config.methods.prompts import PpConfig
from codyra_llm.core.tensors import generator
from codyra_llm.methods.base import Condition, Task
from codyra_llm.methods.prompts.pool import PromptMethod, random_embeddings, zeros


class Prompt(nn.Module):
    """p + MLP(p) of the task's own prompt p [P, h], and the `earlier` ones [t, P, h]."""

    def __init__(self, model: nn.Module, config: PpConfig):
        super().__init__()
        hidden = model.config.hidden_size
        self.prompt = zeros(model, config.length, hidden)
        like = {"device": self.prompt.device, "dtype": self.prompt.dtype}
        self.mlp = _mlp(hidden, config.mlp_width, like) if config.mlp else None
        self.register_buffer("earlier", torch.empty(0, config.length, hidden, **like))

    def forward(self) -> Tensor:
        """All prompts, the newest first: [t + 1, P, h]."""
        own = self.prompt if self.mlp is None else self.prompt + self.mlp(self.prompt)
        return torch.cat([own[None], self.earlier])

    @torch.no_grad()
    def reset(self, start: Tensor, *key: int | str) -> None:
        """Begin at p = `start`: the MLP is drawn by the key, U(-1/√in, 1/√in), its last layer is zero."""
        self.prompt.copy_(start)
        draw, linear = generator(*key), [m for m in self.modules() if isinstance(m, nn.Linear)]
        for layer in linear:
            for p in layer.parameters():
                p.copy_((torch.rand(p.shape, generator=draw) * 2 - 1) * layer.in_features**-0.5)
        for p in linear[-1].parameters() if linear else ():
            p.zero_()


def _mlp(hidden: int, width: int, like: dict) -> nn.Sequential:
    """The network of the reparametrisation; `like`: its device and dtype."""
    return nn.Sequential(
        nn.Linear(hidden, width, **like),
        nn.ReLU(),
        nn.Linear(width, hidden, **like),
        nn.Tanh(),
        nn.Linear(hidden, hidden, **like),
    )


class ProgressivePrompts(PromptMethod):
    """The input is preceded by p̂_t, p̂_{t-1}, …, p̂_0, of which only p̂_t = p + MLP(p) trains; p̂_t is
    frozen after its task.

    Source: Progressive Prompts (2301.12314), on T5. MLP: Linear, ReLU, Linear, Tanh, Linear as on TRACE.
    Trained prompts never change, but what precedes them does: after task i every test prompt gets p̂_i …
    p̂_0, without a task id. TRACE's code keeps training one prompt on all tasks, lets gradients reach earlier
    ones, and scores without any.

    Ours: the prompt starts as embeddings of random tokens, and the MLP at zero; the MLP trains at `optim.lr`.
    Cost: `length` more tokens per task on every example; with the MLP h·(2·width + h) parameters while
    training.
    """

    name, summary, Config = "pp", "a new soft prompt per task before all earlier ones, frozen", PpConfig
    config: PpConfig
    grows = True

    def prompt_positions(self, tasks: int) -> int:
        """A prompt of each task."""
        return tasks * self.config.length

    def attach(self, model) -> None:
        """The task's `Prompt`."""
        model.prompts = Prompt(model, self.config)

    def begin_task(self, model, task: Task) -> None:
        """Start the new prompt from random tokens, before the earlier ones."""
        start = random_embeddings(model, self.config.length, "pp", self.seed, task.index)
        model.prompts.reset(start, "pp mlp", self.seed, task.index)
        if task.state:
            model.prompts.earlier = task.state["prompts"].to(model.prompts.earlier)

    def param_groups(self, model, lr: float) -> list[dict]:
        """The prompt at its own learning rate, without weight decay; the MLP at the optimizer's."""
        prompt, *mlp = model.prompts.parameters()
        own = {"params": [prompt], "lr": self.config.prompt_lr, "weight_decay": 0.0}
        return [own, {"params": mlp, "lr": lr}] if mlp else [own]

    def loss(self, model, batch) -> dict:
        """Cross entropy after all prompts."""
        return {"loss": batch.cross_entropy(model, _for_all(model.prompts(), len(batch.ids)))}

    def state_bytes(self, model, tasks: int) -> int:
        """A prompt of each task."""
        return tasks * cast(Prompt, model.prompts).prompt.nbytes

    def end_task(self, model, task: Task, gradients) -> dict:
        """All prompts, the newest first; the MLP is dropped."""
        return {"prompts": model.prompts().detach()}

    def condition(self, model, prompts, task) -> Condition:
        """All prompts in front of each prompt."""
        return Condition(_for_all(model.prompts["prompts"], len(prompts)))


def _for_all(prompts: Tensor, rows: int) -> Tensor:
    """Prompts [t, P, h] one after the other before each row: [rows, t·P, h]."""
    return prompts.flatten(0, 1).expand(rows, -1, -1)

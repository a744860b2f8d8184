"""L2P: a pool of prompts with keys; every example picks the nearest ones by the frozen model's view of it."""

import torch
from torch import nn

from codyra_llm.config.methods.prompts import L2pConfig
from codyra_llm.methods.base import Condition, Task, trained_bytes
from codyra_llm.methods.parts.features import cosine, row_weights
from codyra_llm.methods.prompts.pool import (
    PromptMethod,
    Queries,
    query,
    random_embeddings,
    uniform,
    zeros,
)


class L2p(PromptMethod):
    """L = CE − c·mean_b Σ_{n ∈ top N} cos(q_b, k_n); the N nearest prompts are put before the example, the
    nearest first.

    Source: Learning to Prompt (2112.08654), on a vision transformer with [CLS] as the query. Pool, length and
    N as on TRACE; keys train and start at U(-1, 1), as in the original. Tasks are not distinguished, and only
    the distance of their keys keeps one task from overwriting another's prompts.

    Ours: the query, the mean of the base's last hidden states over the prompt's tokens, the same in training
    and at test (but for `model.quantization`, which packs the base for training alone); prompts start as
    embeddings of random tokens; the mean over examples is weighted as the loss is (`optim.loss_average`).
    TRACE's code scores the bare model, its keys stay fixed and its queries see the answer.
    Cost: N·length tokens per example (15), and one forward pass over each prompt, once per task and once per
    test prompt.
    """

    name, summary, Config = (
        "l2p",
        "a pool of prompts, chosen by key match and put before the input",
        L2pConfig,
    )
    config: L2pConfig

    def prompt_positions(self, tasks: int) -> int:
        """The chosen prompts."""
        return self.config.chosen * self.config.length

    def attach(self, model) -> None:
        """The pool [M, length, h] and its keys [M, h]."""
        c, hidden = self.config, model.config.hidden_size
        model.prompts = nn.ParameterDict(
            {"prompts": zeros(model, c.pool, c.length, hidden), "match": zeros(model, c.pool, hidden)}
        )

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """Go on with the pool, or start it from random tokens' embeddings."""
        c, held = self.config, model.prompts
        self.queries = Queries()
        start = task.state or {
            "prompts": random_embeddings(model, c.pool * c.length, "l2p", self.seed).view_as(held["prompts"]),
            "match": uniform(held["match"].shape, "l2p keys", self.seed),
        }
        for key, value in start.items():
            held[key].copy_(value)

    def loss(self, model, batch) -> dict:
        """Cross entropy after the chosen prompts, and the pull of their keys to the queries."""
        held = model.prompts
        near = self._near(model, self.queries(model, batch.prompts))
        front = held["prompts"][near.indices].flatten(1, 2)
        pull = row_weights(batch) @ near.values.sum(1).to(batch.weights)
        return {"loss": batch.cross_entropy(model, front), "pull": -self.config.pull * pull}

    def state_bytes(self, model, tasks: int) -> int:
        """The pool and its keys."""
        return trained_bytes(model)

    def end_task(self, model, task: Task, gradients) -> dict:
        """The pool and its keys."""
        self.queries = Queries()
        return dict(model.prompts.items())

    def condition(self, model, prompts, task) -> Condition:
        """The chosen prompts in front of each prompt."""
        near = self._near(model, query(model, prompts))
        return Condition(model.prompts["prompts"][near.indices].flatten(1, 2))

    def _near(self, model, queries):
        """The N keys that are nearest to each query: their cosines `values` and their numbers `indices`, both
        [B, N].
        """
        return cosine(queries, model.prompts["match"]).topk(self.config.chosen, 1)

"""DualPrompt: prefixes to keys and values, general ones for all tasks and an expert of each task, found by
its key.
"""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from codyra_llm.config.methods.prompts import DualPromptConfig
from codyra_llm.methods.base import Condition, Task
from codyra_llm.methods.parts.features import cosine, row_weights
from codyra_llm.methods.prompts.pool import (
    PromptMethod,
    Queries,
    query,
    random_tokens,
    uniform,
    zeros,
)
from codyra_llm.models import families
from codyra_llm.models.attention import prefix_attention


class DualPrompt(PromptMethod):
    """L = CE − c·mean_b cos(q_b, k_t); G, E_t and k_t train. At test an example takes the expert argmax_t
    cos(q, k_t).

    Source: DualPrompt (2204.04799), prefix tuning; layers, lengths and c as published for a vision
    transformer of 12 layers. E_t starts as a copy of E_{t-1}. G is shared by design: it drifts with every
    task, and nothing prevents it. Public code for language models puts G and E before the input, chooses E by
    the task's name, or applies neither.

    Ours: the query (see l2p); prefixes start as keys and values that the base makes of random tokens; and
    keys that start at the mean of their queries, which is where c pulls them. Queries of different tasks have
    much in common, so among keys on their way from a random start the one that got furthest would be the
    nearest to all queries. The attention function is ours whatever `model.attention` is (sdpa, or eager where
    scores are capped), since the prefix needs it. Cost: a mask in the layers with a prefix, no token more;
    one forward pass over each prompt, once per task and once per test prompt; per task |layers|·2·length·kv
    heads·head size numbers."""

    name, summary, Config = (
        "dualprompt",
        "prefixes in attention, shared and per task, chosen by key match",
        DualPromptConfig,
    )
    config: DualPromptConfig
    grows = True

    def check(self, config, attention: str | None) -> list[str]:
        """Faults: layers past the model's last, heads of several shapes, attention that takes no prefix."""
        c, depth, faults = self.config, config.num_hidden_layers, []
        for key in ("general_layers", "expert_layers"):
            beyond = [i for i in getattr(c, key) if i >= depth]
            if beyond:
                faults.append(
                    f"method.{key}: {beyond} are not layers of the model, which has 0 to {depth - 1}; name "
                    "others"
                )
        shapes = families.attention_shapes(config)
        if len({(shape.kv_heads, shape.head_dim) for shape in shapes}) > 1 or not shapes[-1].own_keys:
            faults.append(
                f"method.name: dualprompt gives all layers prefixes of one shape, and the layers of a "
                f"{config.model_type} have keys of several, or share them; choose another method"
            )
        if attention == "flash_attention_2":
            faults.append(
                "model.attention: dualprompt has an attention function of its own, and flash_attention_2 "
                "takes no prefix; set it to null"
            )
        return faults

    def attach(self, model) -> None:
        """Prefixes of keys and values, [layers, 2, kv_heads, length, head_dim], and the task's key [h]."""
        prefix_attention.use(model)
        c, config = self.config, model.config
        first = families.attention_shapes(config)[0]
        heads, size = first.kv_heads, first.head_dim
        model.prompts = nn.ParameterDict(
            {
                "general": zeros(model, len(c.general_layers), 2, heads, c.general_length, size),
                "expert": zeros(model, len(c.expert_layers), 2, heads, c.expert_length, size),
                "key": zeros(model, config.hidden_size),
            }
        )

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """Start the prefixes from the previous task's, or from the keys and values of random tokens."""
        c, held = self.config, model.prompts
        self.queries = Queries()
        if task.state:
            held["general"].copy_(task.state["general"])
            held["expert"].copy_(task.state["experts"][-1])
        else:
            for name, layers in (("general", c.general_layers), ("expert", c.expert_layers)):
                ids = random_tokens(model, held[name].shape[3], name, self.seed)
                held[name].copy_(prefix_attention.made_by(model, ids, layers))
        if c.key_init == "mean":
            key = self._mean_query(model, task)
        else:
            key = uniform(held["key"].shape, "key", self.seed, task.index)
        held["key"].copy_(key)

    def loss(self, model, batch) -> dict:
        """Cross entropy under both prefixes, and the pull of the key to the prompts' queries."""
        held, prompts = model.prompts, batch.prompts
        prefix_attention.show(model, {})  # the query is the bare model's
        near = cosine(self.queries(model, prompts), held["key"][None]).squeeze(1)
        self._show(model, held["general"], held["expert"].expand(len(prompts), *held["expert"].shape))
        return {
            "loss": batch.cross_entropy(model),
            "pull": -self.config.pull * (row_weights(batch) @ near.to(batch.weights)),
        }

    def state_bytes(self, model, tasks: int) -> int:
        """The general prefix, and of each task its own and its key."""
        held = cast(nn.ParameterDict, model.prompts)
        return held["general"].nbytes + tasks * (held["expert"].nbytes + held["key"].nbytes)

    def end_task(self, model, task: Task, gradients) -> dict:
        """The general prefix, and all tasks' expert prefixes and keys."""
        held, before = model.prompts, task.state
        self.queries = Queries()  # the task's own are of no more use
        experts, keys = held["expert"][None].cpu(), held["key"][None].cpu()
        return {
            "general": held["general"],
            "experts": torch.cat([before["experts"], experts]) if before else experts,
            "matches": torch.cat([before["matches"], keys]) if before else keys,
        }

    def install(self, model, task: Task) -> None:
        """Put the prefixes into the model's attention."""
        super().install(model, task)
        prefix_attention.use(model)

    def condition(self, model, prompts, task) -> Condition:
        """The expert whose key is nearest to each prompt's query."""
        held = model.prompts
        prefix_attention.show(model, {})
        nearest = cosine(query(model, prompts), held["matches"]).argmax(1)
        self._show(model, held["general"], held["experts"][nearest])
        return Condition(select=partial(prefix_attention.select, model))

    def _show(self, model, general: Tensor, expert: Tensor) -> None:
        """`general` [layers, 2, H_kv, P, d] to all rows, `expert` [B, layers, 2, H_kv, P, d] row by row."""
        general = general.expand(len(expert), *general.shape)
        layers = self.config.general_layers + self.config.expert_layers
        prefixes = (*general.unbind(1), *expert.unbind(1))
        prefix_attention.show(model, dict(zip(layers, prefixes, strict=True)))

    def _mean_query(self, model, task: Task) -> Tensor:
        """The mean direction of the training prompts' queries [h], as long as a uniform key is."""
        found = [self.queries(model, batch.prompts) for batch in task.batches(task.encode(task.records()))]
        mean = functional.normalize(torch.cat(found), dim=-1).mean(0)
        return functional.normalize(mean, dim=0) * (len(mean) / 3) ** 0.5

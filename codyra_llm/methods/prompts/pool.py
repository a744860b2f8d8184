"""What the prompt methods share: the base is frozen, soft prompts train, and the frozen base's hidden states
are the queries by which some of them are chosen.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from codyra_llm.config.methods.prompts import PromptConfig
from codyra_llm.core.tensors import generator
from codyra_llm.lora.update import Update
from codyra_llm.methods.base import Method, Task
from codyra_llm.methods.parts.features import padded, pooled_states
from codyra_llm.models import families


class PromptMethod(Method):
    """Soft prompts, registered as `model.prompts`, are all that trains. The update is empty; `end_task` keeps
    the prompts.
    """

    trains, merges, mode, packs = "prompts", False, "apart", False
    max_zero_stage = 2  # 3 would gather a module's parameters around its own call alone

    def __init__(self, config: PromptConfig, seed: int):
        super().__init__(config, seed)
        self.queries = Queries()

    def check(self, config, attention: str | None) -> list[str]:
        """A model that adds token embeddings in every layer takes no prompt without tokens."""
        if families.takes_embeddings(config):
            return []
        return [
            f"method.name: {self.name} puts prompts that are not tokens before a text, and every layer of a "
            f"{config.model_type} adds embeddings of the tokens themselves; choose another method"
        ]

    def param_groups(self, model, lr: float) -> list[dict]:
        """No weight decay: it would wear down what no example has chosen."""
        return [
            {"params": list(model.prompts.parameters()), "lr": self.config.prompt_lr, "weight_decay": 0.0}
        ]

    def progress(self) -> dict[str, Tensor]:
        """The queries that were computed."""
        return self.queries.state()

    def resume(self, progress: dict[str, Tensor]) -> None:
        """Put them back."""
        self.queries.load_state(progress)

    def consolidate(self, adapters, index: int) -> Update:
        """No update of weights: the prompts are the method's state."""
        return Update({}, 1.0, "apart")

    def install(self, model, task: Task) -> None:
        """Put the state into the model as frozen prompts."""
        model.prompts = nn.ParameterDict(
            {key: nn.Parameter(value, requires_grad=False) for key, value in task.state.items()}
        ).to(families.pretrained(model).device)


class Queries:
    """Queries of training prompts, each computed once."""

    def __init__(self):
        self.known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, model: nn.Module, prompts: Sequence[list[int]]) -> Tensor:
        keys = [tuple(prompt) for prompt in prompts]
        missing = [key for key in dict.fromkeys(keys) if key not in self.known]
        if missing:
            self.known.update(zip(missing, query(model, missing), strict=True))
        return torch.stack([self.known[key].to(families.pretrained(model).device) for key in keys])

    def state(self) -> dict[str, Tensor]:
        """Kept through a restart, since a query's rounding depends on the batch that it was computed in."""
        if not self.known:
            return {}
        return {
            "queries": torch.stack(list(self.known.values())),
            "lengths": torch.tensor(list(map(len, self.known))),
            "tokens": torch.tensor(list(chain.from_iterable(self.known))),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        if state:
            keys = state["tokens"].split(state["lengths"].tolist())
            self.known = dict(zip((tuple(key.tolist()) for key in keys), state["queries"], strict=True))


@torch.no_grad()
def query(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Mean of the base's last hidden states over the tokens of each prompt, BOS included and no answer: [B,
    h].
    """
    training = model.training
    found = pooled_states(model.eval(), *padded(prompts, families.pretrained(model).device))
    model.train(training)
    return found


def random_tokens(model: nn.Module, count: int, *key: int | str) -> Tensor:
    """`count` token ids, drawn by the key."""
    base = families.pretrained(model)
    return torch.randint(base.config.vocab_size, (count,), generator=generator(*key)).to(base.device)


def random_embeddings(model: nn.Module, count: int, *key: int | str) -> Tensor:
    """Embeddings of `count` random tokens [count, h], as they enter the first layer."""
    return families.pretrained(model).get_input_embeddings()(random_tokens(model, count, *key)).detach()


def uniform(shape: tuple[int, ...], *key: int | str) -> Tensor:
    """U(-1, 1), drawn by the key."""
    return torch.rand(shape, generator=generator(*key)) * 2 - 1


def zeros(model: nn.Module, *shape: int) -> nn.Parameter:
    """A parameter in float32 (float64 for such a base) on the model's device."""
    base = families.pretrained(model).get_input_embeddings().weight
    return nn.Parameter(
        torch.zeros(shape, device=base.device, dtype=torch.promote_types(base.dtype, torch.float32))
    )

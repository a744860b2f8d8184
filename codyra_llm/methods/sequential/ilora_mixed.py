"""I-LoRA after its paper's text: replay mixed into a fast adapter, whose slow average is kept and used."""

import torch
from torch import Tensor

from codyra_llm.config.methods.sequential import IloraMixedConfig
from codyra_llm.data.batches import in_one_copy
from codyra_llm.lora.layer import sites, snapshot, stand_in
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.base import Method, Task, factor_bytes, restore
from codyra_llm.methods.sequential.replay import head
from codyra_llm.methods.sequential.seqlora import SeqLora


class IloraMixed(SeqLora):
    """Loss + γ Σ weights·mean_h (h_fast - h_slow)² over the labelled tokens of replayed examples; after every
    step A' ← λ A' + (1-λ) A and B' ← λ B' + (1-λ) B of the slow adapter (A', B'), which is evaluated and
    archived.

    Source: I-LoRA (2402.18865) by its text; its code is `ilora` here. Two memories, after complementary
    learning systems: a fast learner trained by gradients, a slow one by interpolation, and a squared distance
    between their embeddings of replayed examples. Ours, where the paper's text did not decide: λ, γ and the
    share replayed; the last hidden states at labelled positions, averaged like the loss; memory mixed into
    every epoch of the task; both adapters start equal; the slow forward without dropout. The average is of
    the factors, not of their product. Cost per step from the second task on: the memory's examples, and for
    micro-batches that hold one of them a forward without gradient; one more copy of the adapter, on the
    device and, per task, in the state. Validation losses are those of the fast adapter."""

    name, Config = "ilora_mixed", IloraMixedConfig
    summary = "replay mixed in, with a slow average of the adapter"
    old_data, grows, max_zero_stage = True, True, 0  # the slow adapter is an average of whole parameters
    mode, carries_optimizer, merge_factor, averages = "replace", False, 1.0, True
    config: IloraMixedConfig

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """Load the fast adapter, which trains, and the slow one, which is archived."""
        if task.index:
            restore(model, task.archive.load(task.index - 1))
        else:
            Method.begin_task(self, model, task)
        self._slow = snapshot(model)
        if task.index:
            self._load_fast(model, task.state)
        self._first = task.index == 0
        self._own = len(task.records())

    def _load_fast(self, model, state: dict[str, Tensor]) -> None:
        """Put the factors that `end_task` gave into the model."""
        for site, layer in sites(model).items():
            layer.lora_A.copy_(state[f"{site}.a"])
            layer.lora_B.copy_(state[f"{site}.b"])

    def train_data(self, stream, index: int):
        """The task's records and the first part of every earlier task's."""
        records, epochs = super().train_data(stream, index)
        memory = []
        for past in range(index):
            memory += head(stream.records(past, "train"), self.config.ratio)
        return records + memory, [range(len(records) + len(memory))] * len(epochs)

    def loss(self, model, batch) -> dict[str, Tensor]:
        """Cross entropy, and the distance between the two adapters' hidden states on replayed examples."""
        if self._first or not self.config.weight or not model.training:
            return super().loss(model, batch)
        hidden, distance = batch.hidden(model), batch.weights.new_zeros(())
        old = [i >= self._own for i in batch.examples]
        if any(old):
            with torch.no_grad(), stand_in(model, self._slow):
                slow = batch.hidden(model)
            rows = torch.tensor(old).repeat_interleave(torch.tensor(batch.labelled))
            (replayed,) = in_one_copy([rows], hidden.device)
            distance = (batch.weights * replayed) @ (hidden - slow).float().square().mean(1)
        return {
            "loss": batch.cross_entropy_of(model, hidden),
            "consistency": self.config.weight * distance,
        }

    @torch.no_grad()
    def after_step(self, gradients) -> None:
        """slow ← λ·slow + (1-λ)·fast."""
        for site, layer in sites(gradients.model).items():
            a, _, b = self._slow[site]
            a.lerp_(layer.lora_A, 1 - self.config.decay)
            b.lerp_(layer.lora_B, 1 - self.config.decay)

    def progress(self) -> dict[str, Tensor]:
        """The slow adapter."""
        return {
            f"{site}.{key}": factor
            for site, (a, _, b) in self._slow.items()
            for key, factor in (("a", a), ("b", b))
        }

    def resume(self, progress: dict[str, Tensor]) -> None:
        """Put it back."""
        for site, (a, _, b) in self._slow.items():
            a.copy_(progress[f"{site}.a"])
            b.copy_(progress[f"{site}.b"])

    def state_bytes(self, model, tasks: int) -> int:
        """The fast adapter's factors."""
        return factor_bytes(model)

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """The fast adapter, from which the next task goes on."""
        return {
            f"{site}.{key}": factor
            for site, layer in sites(model).items()
            for key, factor in (("a", layer.lora_A), ("b", layer.lora_B))
        }

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """The slow adapter is the update."""
        slow = {
            site: Adapter(a.float().cpu(), b.float().cpu(), None) for site, (a, _, b) in self._slow.items()
        }
        return super().consolidate(slow, index)

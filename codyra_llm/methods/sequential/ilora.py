"""I-LoRA as its repository runs it: a fast adapter with a replayed batch in every step, and its slow
average."""

import torch
from torch import Tensor, nn

from codyra_llm.config.methods.sequential import IloraConfig
from codyra_llm.core.tensors import generator
from codyra_llm.data.batches import Batch, in_one_copy
from codyra_llm.lora.layer import stand_in
from codyra_llm.methods.base import Task
from codyra_llm.methods.sequential.ilora_mixed import IloraMixed
from codyra_llm.models.attention import packed_attention


class Ilora(IloraMixed):
    """½ (CE of the batch + CE of a replayed batch) + γ mean (h_fast - max(h_fast, h_slow))² from the second
    task on; A' ← α A' + (1-α) A and the same for B' after every step, (A', B') being the slow adapter.

    h: hidden states of all layers, the embeddings' included, at all positions of the replayed batch. So a
    state is pulled up to the slow one's where it is below it, and not changed above.

    Source: I-LoRA (2402.18865) by its code (which47/LLMCL, method/ILORA.py): α 0.25, γ 1, a buffer of 500 by
    reservoir, a replayed batch as large as the step's, rank 8, alpha 32, dropout 0.1, q, k, v and o, learning
    rate 1e-5. Its faults are not reproduced: there, pads count in the distance and are attended to, the slow
    adapter starts from another random A, and `load_ema_model`, which the code calls after each task, does not
    exist. The slow adapter is evaluated and archived, as in the paper; the code does not say which. Ours: the
    buffer changes between tasks, not within one, and each training example enters it once; the replayed batch
    has `batch` examples, and is read without dropout by both adapters. Validation losses are those of the
    fast adapter. Cost per step from the second task on: `batch` examples forward and backward, and once more
    forward; one more copy of the adapter, on the device and, per task, in the state."""

    name, Config = "ilora", IloraConfig
    summary = "replay in every step, with a slow average of the adapter, as its repository runs it"
    packs = False  # the distance is over all positions
    config: IloraConfig

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """In addition, draw the buffer of earlier tasks' examples."""
        super().begin_task(model, task)
        self._index = task.index
        self._buffer = task.encode(self._reservoir(task)) if task.index else []

    def train_data(self, stream, index: int):
        """The task's own records; replay is a batch of its own in every step."""
        return super(IloraMixed, self).train_data(stream, index)

    def before_step(self, groups, step: int, steps: int, schedule: str) -> None:
        """Remember the step, by which the replayed batch is drawn."""
        self._step = step

    def loss(self, model, batch) -> dict[str, Tensor]:
        """Cross entropy of the task's own batch."""
        return super(IloraMixed, self).loss(model, batch)

    @torch.no_grad()
    def edit_gradients(self, gradients) -> None:
        """Half of the step's gradient and half of the replayed batch's, and the gradient of the distance to
        the slow adapter."""
        if not self._buffer:
            return
        draw = generator("replayed", self.seed, self._index, self._step)
        order = torch.randperm(len(self._buffer), generator=draw)
        replayed = [self._buffer[i] for i in order[: self.config.batch].tolist()]
        positions = sum(map(len, replayed))

        def memory(model: nn.Module, batch: Batch) -> Tensor:
            lengths = [len(replayed[i]) for i in batch.examples]
            share = batch.weights.any()  # a filler batch, whose weights are 0, adds no distance
            term = self.config.weight * share * self._distance(model, batch, lengths, positions)
            return batch.cross_entropy(model) / 2 + term

        with torch.enable_grad():
            found = gradients.mean(replayed, memory)
        for grad, other in zip(gradients.step, found, strict=True):
            grad.div_(2).add_(other)

    def _distance(self, model: nn.Module, batch: Batch, lengths: list[int], positions: int) -> Tensor:
        """The share of these examples in the mean over layers, `positions` and dimensions."""
        fast = hidden_states(model, batch, lengths)
        with torch.no_grad(), stand_in(model, self._slow):
            slow = hidden_states(model, batch, lengths)
        below = [
            (h - torch.maximum(h, g)).float().square().mean(1).sum() for h, g in zip(fast, slow, strict=True)
        ]
        return torch.stack(below).sum() / (len(fast) * positions)

    def _reservoir(self, task: Task) -> list[dict]:
        """What a reservoir of `memory` holds after it has seen each earlier task's examples once, in order: a
        uniform sample of them."""
        kept, seen = [], 0
        for past in range(task.index):
            draw = generator("reservoir", self.seed, past)
            for record in task.records(past):
                place = int(torch.randint(seen + 1, (), generator=draw))
                seen += 1
                if len(kept) < self.config.memory:
                    kept.append(record)
                elif place < self.config.memory:
                    kept[place] = record
        return kept


def hidden_states(model: nn.Module, batch: Batch, lengths: list[int]) -> list[Tensor]:
    """The hidden states of the embeddings and of every layer, [n, h] each, at the n positions that are not
    padding."""
    states = packed_attention.all_states(model, batch.ids)
    width = batch.ids.shape[1]
    rows = [torch.arange(i * width, i * width + n) for i, n in enumerate(lengths)]
    (places,) = in_one_copy([torch.cat(rows)], batch.ids.device)
    return [layer.flatten(0, 1).index_select(0, places) for layer in states]

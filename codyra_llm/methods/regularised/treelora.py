"""TreeLoRA after its paper: each site finds the earlier task whose gradients are most like its own, and moves
its gradient towards that task's.
"""

import torch
from torch import Tensor

from codyra_llm.config.methods.regularised import TreeLoraConfig
from codyra_llm.lora.layer import sites
from codyra_llm.methods.base import Task, factor_bytes
from codyra_llm.methods.regularised.tree import Bandit
from codyra_llm.methods.sequential.seqlora import SeqLora


class TreeLora(SeqLora):
    """g ← (1 - β) g + β g_k ‖g‖/‖g_k‖ at every site, k the earlier task that a bandit on a tree of gradients
    selects.

    Source: Qian et al. (2506.10355): residuals ‖ĝ - g_k‖₁, minimum lower confidence bound, K-D style tree,
    λ‖ĝ - g_k‖₁ in the loss. Its exact gradient is a Hessian-vector product. There are two surrogates, of
    opposite sign: (i) with the Hessian approximated by c·I, g + λc·sign(g - g_k) steps towards where the
    gradients would agree if the curvature were uniform; (ii) the blend above makes the applied update
    resemble the similar task's, which is what the method is described to do, and needs no guess of c. This is
    (ii); say so when you report its results. Ours: g_k, a task's signature, is its mean gradient of A and B
    over its last epoch, and ĝ the mean over the epoch so far; residuals are taken between vectors of ℓ1 norm
    1 and halved, so that they are in [0, 1] as the bound expects and do not depend on the size of gradients
    early or late in training; one tree and bandit per site; β's value is untuned. Cost per step: two passes
    over the adapter's gradients and one transfer of a number per site. Memory and state: the signatures of
    all earlier tasks, float32, each of the adapter's size. With β 0 it is seqlora."""

    name, Config = "treelora", TreeLoraConfig
    summary = "seqlora whose gradients lean to the most similar earlier task's"
    config: TreeLoraConfig
    grows = True
    max_zero_stage = 0

    def begin_task(self, model, task: Task) -> None:
        """Read the earlier tasks' mean gradients; one bandit per site."""
        super().begin_task(model, task)
        self._layers, self._epochs = sites(model), task.stream.epochs[task.index]
        self._saved = {site: old.to(self._layers[site].lora_A) for site, old in task.state.items()}
        self._bandits = {
            site: Bandit(unit(old).cpu(), self.config.exploration) for site, old in self._saved.items()
        }

    def before_step(self, groups: list[dict], step: int, steps: int, schedule: str) -> None:
        """Begin the running mean again with every epoch."""
        if step % (steps // self._epochs) == 0:
            self._means, self._seen = dict.fromkeys(self._layers, 0.0), 0

    def edit_gradients(self, gradients) -> None:
        """Update the running mean, choose a task per site, and blend its gradient in."""
        flat = {
            site: torch.cat([layer.lora_A.grad.flatten(), layer.lora_B.grad.flatten()])
            for site, layer in self._layers.items()
        }
        self._seen += 1
        self._means = {site: mean + (flat[site] - mean) / self._seen for site, mean in self._means.items()}
        if not (self._saved and self.config.weight):
            return
        chosen = {site: bandit.select() for site, bandit in self._bandits.items()}
        distances = [distance(self._means[site], self._saved[site][k]) for site, k in chosen.items()]
        residuals = torch.stack(distances).tolist()  # one transfer for all sites
        for (site, k), residual in zip(chosen.items(), residuals, strict=True):
            self._bandits[site].observe(k, residual)
            self._write(site, blend(flat[site], self._saved[site][k], self.config.weight))

    def progress(self) -> dict[str, Tensor]:
        """The running means, the number of steps in them, and the bandits' pulls and costs."""
        state = {"seen": torch.tensor(self._seen)}
        for site, bandit in self._bandits.items():
            state[f"bandit.{site}"] = torch.tensor([bandit.pulls, bandit.costs], dtype=torch.float64)
        for site, mean in self._means.items():
            state[f"mean.{site}"] = mean
        return state

    def resume(self, progress: dict[str, Tensor]) -> None:
        """Put them back."""
        self._seen = int(progress["seen"])
        self._means = {
            site: progress[f"mean.{site}"].to(layer.lora_A) for site, layer in self._layers.items()
        }
        for site, bandit in self._bandits.items():
            pulls, bandit.costs = progress[f"bandit.{site}"].tolist()
            bandit.pulls = list(map(int, pulls))

    def state_bytes(self, model, tasks: int) -> int:
        """A signature of each task, of the adapter's size."""
        return tasks * factor_bytes(model)

    def held_bytes(self, model, tasks: int) -> int:
        """The signatures again."""
        return self.state_bytes(model, tasks)

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """The mean gradients of all tasks by site, [tasks, n]."""
        return {
            site: torch.cat([self._saved[site], mean[None]]) if self._saved else mean[None]
            for site, mean in self._means.items()
        }

    def _write(self, site: str, gradient: Tensor) -> None:
        """Write a flat gradient into those of the site's A and B."""
        a, b = self._layers[site].lora_A.grad, self._layers[site].lora_B.grad
        a.copy_(gradient[: a.numel()].view_as(a))
        b.copy_(gradient[a.numel() :].view_as(b))


def unit(vectors: Tensor) -> Tensor:
    """Scaled to ℓ1 norm 1 along the last dimension; zero stays zero."""
    return vectors / vectors.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """½‖a/‖a‖₁ - b/‖b‖₁‖₁, in [0, 1]: 0 for the same direction."""
    return (unit(a) - unit(b)).abs().sum(-1) / 2


def blend(g: Tensor, other: Tensor, share: float) -> Tensor:
    """(1 - β) g + β g_k ‖g‖/‖g_k‖ of g and g_k = `other`, both [n], with β = `share`; g where g_k is zero."""
    norm = other.norm()
    return torch.where(norm > 0, torch.lerp(g, other * (g.norm() / norm), share), g)

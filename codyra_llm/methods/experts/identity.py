"""From a feature vector to its task: centroids and Gaussians, kept per task."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from codyra_llm.core.tensors import generator


def kmeans(x: Tensor, k: int, *key: int | str, rounds: int = 100) -> Tensor:
    """k centroids [k, h] of x [n, h] on the CPU: k-means++ seeds drawn by `key`, then Lloyd's rounds until
    none moves. A centroid that no point is nearest to stays; with fewer than k distinct points some
    coincide."""
    draw = generator(*key)
    chosen = [int(torch.randint(len(x), (1,), generator=draw))]
    while len(chosen) < k:
        far = torch.cdist(x, x[chosen]).min(1).values.square()
        chosen.append(int(torch.multinomial(far + torch.finfo(far.dtype).tiny, 1, generator=draw)))
    centroids = x[chosen].clone()
    for _ in range(rounds):
        nearest = torch.cdist(x, centroids).argmin(1)
        moved = centroids.clone()
        for c in nearest.unique().tolist():  # the others have no point, and stay
            moved[c] = x[nearest == c].mean(0)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


@dataclass(frozen=True)
class Gaussians:
    """Means [tasks, h] and the scatter Σ (x - μ)(x - μ)ᵀ [h, h] of all tasks about their own means, over
    `count` vectors. On the CPU in float64; stored in float32."""

    means: Tensor
    scatter: Tensor
    count: int

    @classmethod
    def load(cls, state: dict[str, Tensor]) -> "Gaussians":
        """What `state` gave; nothing from an empty state."""
        if "means" not in state:
            return cls(torch.zeros(0, 0), torch.zeros(0, 0), 0)
        return cls(state["means"].double(), state["scatter"].double(), int(state["count"]))

    def state(self) -> dict[str, Tensor]:
        """What `load` reads."""
        return {
            "means": self.means.float(),
            "scatter": self.scatter.float(),
            "count": torch.tensor(self.count),
        }

    def with_task(self, features: Tensor) -> "Gaussians":
        """With one more task, from its features [n, h]."""
        x = features.cpu().double()
        mean = x.mean(0, keepdim=True)
        scatter, count = (x - mean).T @ (x - mean), len(x)
        if not self.count:
            return Gaussians(mean, scatter, count)
        return Gaussians(torch.cat([self.means, mean]), self.scatter + scatter, self.count + count)

    def classifier(self, shrinkage: float) -> Callable[[Tensor], Tensor]:
        """Linear discriminant analysis with equal priors: from [n, h] to the task [n] of the largest
        likelihood under N(μ_t, (1 - γ)·Σ + γ·tr(Σ)/h·I), γ = `shrinkage`, Σ = scatter / (count - tasks)."""
        size = len(self.scatter)
        covariance = self.scatter / max(self.count - len(self.means), 1)
        level = (covariance.trace() / size).clamp_min(torch.finfo(torch.float32).tiny)
        shrunk = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(size).double()
        factor = torch.linalg.cholesky(shrunk)

        def white(x: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(factor, x.T, upper=False).T

        means = white(self.means)
        return lambda x: torch.cdist(white(x.cpu().double()), means).argmin(1)

"""From a feature vector to its task: Gaussians, kept per task."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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

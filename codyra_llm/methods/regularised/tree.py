"""A bandit that finds the nearest of a few stored vectors, its arms in a tree of similar ones."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Node:
    """A set of arms; `spread`: the largest distance between two of them. A leaf has one arm, or arms that are
    equal.
    """

    arms: list[int]
    spread: float = 0.0
    children: list["Node"] = field(default_factory=list)


def grow(signatures: Tensor, arms: list[int]) -> Node:
    """The tree of these `arms`, which are rows of `signatures` [tasks, n]. In K-D style, the arms of a node
    are split at the median of their ℓ1 distance to the node's mean.
    """
    own = signatures[arms]
    spread = torch.cdist(own, own, p=1).max().item() / 2
    if spread == 0:
        return Node(arms)
    apart = (own - own.mean(0)).abs().sum(1)
    # By rank, since two arms are always equally far from their mean; rounded, so that no rounding error
    # decides for them.
    order = torch.argsort((apart / apart.max()).round(decimals=5), stable=True).tolist()
    half = (len(arms) + 1) // 2
    near = [arms[i] for i in order[:half]]
    far = [arms[i] for i in order[half:]]
    return Node(arms, spread, [grow(signatures, near), grow(signatures, far)])


class Bandit:
    """Minimum lower confidence bound by descent of a tree; costs in [0, 1], half of the ℓ1 distance of the
    `signatures` [tasks, n] from what is sought.

    L(node) = max(μ - c·√(log t / n) - spread, min of its children's L); -∞ where nothing was observed. The
    first is a bound on the arms below, since they differ from one another by `spread` at most; so a subtree
    of alike arms is left as one.
    """

    def __init__(self, signatures: Tensor, exploration: float):
        self.tree = grow(signatures, list(range(len(signatures))))
        self.exploration = exploration
        self.pulls, self.costs = [0] * len(signatures), [0.0] * len(signatures)

    def select(self) -> int:
        """The arm to try next."""
        node = self.tree
        while node.children:
            node = min(node.children, key=self._bound)
        return min(node.arms, key=lambda k: self.pulls[k])

    def observe(self, arm: int, cost: float) -> None:
        """Count a pull of the arm, and what it cost."""
        self.pulls[arm] += 1
        self.costs[arm] += cost

    def _bound(self, node: Node) -> float:
        pulls = sum(self.pulls[k] for k in node.arms)
        if not pulls:
            return -math.inf
        mean = sum(self.costs[k] for k in node.arms) / pulls
        own = mean - self.exploration * math.sqrt(math.log(sum(self.pulls)) / pulls) - node.spread
        return max(own, min(map(self._bound, node.children))) if node.children else own

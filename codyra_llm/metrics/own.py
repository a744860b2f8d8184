"""Metrics of your own: a function of one example, with its bounds and its direction."""

import math
import re
from collections.abc import Callable

from codyra_llm.metrics.text import METRICS, ExampleMean

Example = Callable[[str, str, str], float]
TAKEN = ("prompt", "prediction", "answer")  # the other keys of a row of predictions/
SHIPPED = frozenset(METRICS)


def metric(
    name: str, *, low: float = 0.0, high: float = 100.0, higher_is_better: bool = True, version: int = 1
) -> Callable[[Example], Example]:
    """Decorator: `(prompt, prediction, answer) -> float` becomes the metric `name`, the mean over examples.

    Every value is in [low, high]; reports show it on a scale from 0 (worst) to 100 (best), so that scores of
    tasks can be averaged. `version` rises whenever a value can change. Raises ValueError for a name that is
    taken or not a valid one, and for bounds that enclose no interval."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) or name in TAKEN:
        raise ValueError(
            f"metric {name!r} is not a valid name; give lower-case letters, digits and '_', and none of "
            f"{', '.join(TAKEN)}"
        )
    if name in SHIPPED:
        raise ValueError(f"metric {name!r} is one of codyra_llm's own; give yours another name")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"metric {name!r}: low {low} must be below high {high}, and both finite")

    def register(example: Example) -> Example:
        traits = {
            "metric": name,
            "example": staticmethod(example),
            "bounds": (float(low), float(high)),
            "higher_is_better": higher_is_better,
            "VERSION": version,
            "takes_sources": True,  # it is given the prompt, and may look at it
            "__doc__": example.__doc__,
            "__module__": example.__module__,
        }
        METRICS[name] = type(name, (ExampleMean,), traits)
        return example

    return register

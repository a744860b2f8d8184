"""The keys and values of tokens that a model has read, and how it is given them."""

from typing import Any

import transformers
from packaging.version import Version
from transformers import DynamicCache, PreTrainedModel

# What a model's forward calls its cache; 5.24 still takes the older name, but warns of it.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache of keys and values that grows with the tokens read."""
    return DynamicCache(config=model.config)


def cached(cache: DynamicCache) -> dict[str, Any]:
    """The arguments with which a model reads this cache and adds to it."""
    return {CACHE: cache, "use_cache": True}

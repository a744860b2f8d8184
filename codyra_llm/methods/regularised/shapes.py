"""Sites whose A have one shape together, so that a method treats them by one batched product."""

from codyra_llm.lora.layer import LoraLinear


def by_shape(layers: dict[str, LoraLinear]) -> list[dict[str, LoraLinear]]:
    """The sites grouped by the shape of A, in the model's order within each group."""
    groups: dict[tuple, dict[str, LoraLinear]] = {}
    for site, layer in layers.items():
        groups.setdefault(tuple(layer.lora_A.shape), {})[site] = layer
    return list(groups.values())

"""The model families that are supported: their descriptions, and how models are read by them.

Everything that depends on the structure of a model asks here. A family of your own takes one call of
`register`, or an entry point of the group `codyra_llm.families` in a package."""

from codyra_llm.models.families.family import Family, Tower
from codyra_llm.models.families.known import of, refusals, register, registered, titles
from codyra_llm.models.families.structure import (
    AttentionShape,
    attention_shapes,
    attention_softcap,
    attentions,
    backbone,
    blocks,
    family_in,
    family_named,
    head,
    pretrained,
    projections,
    rope_type,
    set_blocks,
    shortened,
    softcap,
    takes_embeddings,
    text_config,
    text_model,
    text_part,
    windows,
)

__all__ = [
    "AttentionShape",
    "Family",
    "Tower",
    "attention_shapes",
    "attention_softcap",
    "attentions",
    "backbone",
    "blocks",
    "family_in",
    "family_named",
    "head",
    "of",
    "pretrained",
    "projections",
    "refusals",
    "register",
    "registered",
    "rope_type",
    "set_blocks",
    "shortened",
    "softcap",
    "takes_embeddings",
    "text_config",
    "text_model",
    "text_part",
    "titles",
    "windows",
]

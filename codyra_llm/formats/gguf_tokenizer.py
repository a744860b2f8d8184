"""Write a Hugging Face tokenizer as GGUF fields with which llama.cpp tokenises the same way."""

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from codyra_llm.core.errors import Fault
from codyra_llm.models.tokenizer import adds_bos

INSTEAD = "export it as merged, and convert it with llama.cpp's convert_hf_to_gguf.py"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How byte-level BPE cuts a text before it merges: the pattern in tokenizer.json, llama.cpp's name for it.
PATTERNS = {WORDS % r"\p{N}{1,3}": "llama-bpe", WORDS % r"\p{N}": "qwen2"}
SPACE = "\u2581"  # SentencePiece's mark of a space


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer: its model; by id the tokens' texts, kinds and
    (SentencePiece only) scores; for byte-level BPE, how it cuts a text, and the merges."""

    model: str
    texts: list[str]
    kinds: list[TokenType]
    scores: list[float] | None = None
    cut: str | None = None
    merges: list[str] | None = None
    space_in_front: bool = False


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The tokenizer's vocabulary, filled up to the model's `rows` embeddings. Raises Fault for one that
    llama.cpp would read wrongly."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model = core["model"]
    if model.get("type") != "BPE":
        kind = model.get("type")
        raise Fault(f"the tokenizer is of type {kind}, which a GGUF export does not know; {INSTEAD}")
    texts = [f"[PAD{number}]" for number in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    for text, number in model["vocab"].items():
        texts[number], kinds[number] = text, TokenType.NORMAL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        return _sentencepiece(core, model, texts, kinds, merges)
    _mark_added(core, texts, kinds, space=False)
    return Vocabulary("gpt2", texts, kinds, cut=_cut(core), merges=merges)


def _mark_added(core: dict, texts: list[str], kinds: list[TokenType], space: bool) -> None:
    """Enter the added tokens into `texts` and `kinds`. `space`: SentencePiece's mark in them is written as a
    space."""
    for token in core["added_tokens"]:
        if token["id"] >= len(texts):  # Gemma 3's token for images, of which a text model has no embedding
            continue
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        text = token["content"]
        if space and kind == TokenType.USER_DEFINED:
            text = text.replace(SPACE, " ")  # llama.cpp looks for these in the text as it is
        texts[token["id"]], kinds[token["id"]] = text, kind


def _cut(core: dict) -> str:
    """llama.cpp's name for how the text is cut before merging. Raises Fault where it has none."""
    whole = core["pre_tokenizer"] or {}
    steps = whole.get("pretokenizers", [whole])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds == ["ByteLevel"] and last.get("use_regex", True) and not last["add_prefix_space"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in PATTERNS and steps[0]["behavior"] == "Isolated":
            return PATTERNS[pattern]
    raise Fault(
        "the tokenizer cuts a text into words in a way for which a GGUF export knows no llama.cpp name; "
        f"{INSTEAD}"
    )


def _sentencepiece(
    core: dict, model: dict, texts: list[str], kinds: list[TokenType], merges: list[str]
) -> Vocabulary:
    """llama.cpp merges the pair whose result has the highest score, `tokenizers` the pair that comes first in
    the list of merges: so a token's score is minus its place there."""
    scores = [-1e9] * len(texts)
    for place, merge in enumerate(merges):
        number = model["vocab"]["".join(merge.split(" "))]
        scores[number] = max(scores[number], -float(place))
    for text, number in model["vocab"].items():
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[number] = TokenType.BYTE
    unknown = model["vocab"].get(model.get("unk_token"))
    _mark_added(core, texts, kinds, space=True)
    if unknown is not None:
        kinds[unknown] = TokenType.UNKNOWN
    return Vocabulary("llama", texts, kinds, scores, space_in_front=_space_in_front(core))


def _space_in_front(core: dict) -> bool:
    """Whether a text gets the mark of a space in front, as LLaMA 2's do and Gemma's don't."""
    normalizer, cut = core["normalizer"] or {}, core["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepends = any(step.get("type") == "Prepend" and step["prepend"] == SPACE for step in steps)
    return prepends or (cut.get("type") == "Metaspace" and cut.get("prepend_scheme", "always") != "never")


def write_vocabulary(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, end_of_turn: int | None
) -> None:
    """Add the tokenizer's fields. `end_of_turn`: what ends an answer in a chat, if not EOS."""
    found = vocabulary(tokenizer, rows)
    writer.add_tokenizer_model(found.model)
    writer.add_token_list(found.texts)
    writer.add_token_types(found.kinds)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(found.space_in_front)
    else:
        writer.add_tokenizer_pre(found.cut)
        writer.add_token_merges(found.merges)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if end_of_turn not in (None, tokenizer.eos_token_id):
        writer.add_eot_token_id(end_of_turn)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)


def write_template(writer: GGUFWriter, template: Any) -> None:
    """Add a tokenizer's chat template: a text, or several by name; nothing where there is none."""
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)

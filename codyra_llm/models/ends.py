"""The tokens that end an answer: the same set for every way of generating answers."""

from collections.abc import Collection, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from codyra_llm.core.files import write_json
from codyra_llm.core.foreign import Failed
from codyra_llm.core.parsing import read_json
from codyra_llm.models import families
from codyra_llm.models.tokenizer import ASKED, render_chat

GENERATION = "generation_config.json"
SAID = "An answer"  # marks where a turn ends in what a chat template writes


def answer_ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens at which an answer of the model in `folder` ends: the tokenizer's EOS, with which training
    ends answers; those of generation_config.json (or else of config.json), at which transformers' `generate`
    stops, and of which chat models name several; the token that the chat template writes after an answer; and
    the tokens that end turns in the family's own chats, which a tokenizer may have even without a
    template."""
    known = _special(tokenizer)
    turns = {known.get(token) for token in families.family_in(folder).turn_ends}
    ends = {*named_ends(folder), tokenizer.eos_token_id, end_of_turn(tokenizer), *turns}
    return frozenset(token for token in ends if isinstance(token, int))


def named_ends(folder: Path) -> list[int]:
    """The tokens at which transformers' `generate` and vLLM stop for the model in `folder`, by its own files,
    in their order."""
    file = folder / GENERATION
    config = read_json(file if file.is_file() else folder / "config.json", "the model's own")
    named = config.get("eos_token_id", families.text_part(config).get("eos_token_id"))
    listed = named if isinstance(named, list) else [named]
    return [token for token in listed if isinstance(token, int)]


def name_ends(folder: Path, ends: Collection[int]) -> None:
    """Add those of `ends` that are missing to the generation config of the model in `folder`, so that servers
    end an answer where evaluation does. The file is unchanged if none is missing."""
    named, file = named_ends(folder), folder / GENERATION
    missing = sorted(set(ends) - set(named))
    if not missing:
        return
    if file.is_file():
        config = read_json(file, "the model's own")
        config.pop("_from_model_config", None)  # with it transformers 4 may use the config's ends instead
    else:
        own = families.text_part(read_json(folder / "config.json", "the model's own"))
        config = {key: own[key] for key in ("bos_token_id", "pad_token_id") if own.get(key) is not None}
    write_json(file, config | {"eos_token_id": [*named, *missing]})


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes right after an answer; None without a template, or with
    one that writes none there or can't be used, whose chats are refused where they are asked for."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    try:
        written = render_chat(tokenizer, chat, ask=False)
    except (Failed, ValueError, TypeError):  # several templates, none of them for chats; one that is not text
        return None
    after = written.rpartition(SAID)[2].lstrip()
    special = _special(tokenizer)
    met = [content for content in special if after.startswith(content)]
    return special[max(met, key=len)] if met else None


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokenizer's special tokens by content."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: number for number, token in added if token.special}


def ended(ids: Sequence[int], ends: Collection[int]) -> bool:
    """Whether an answer ends with one of `ends`; else it was cut."""
    return bool(ids) and ids[-1] in ends


def without_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """An answer's tokens without its end token, which decoding would not always drop."""
    return list(ids[:-1] if ended(ids, ends) else ids)

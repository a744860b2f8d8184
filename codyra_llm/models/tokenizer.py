"""Tokenizers: loading, chat templates, BOS."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from codyra_llm.core import foreign
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256
from codyra_llm.core.parsing import shown
from codyra_llm.models.families.config_file import explain_errors, read_config

DATE = "26 Jul 2024"  # today's date for chat templates, fixed so that a run's prompts don't change
ASKED = "A question"  # marks a user's text in what a chat template writes

# Put in front of a template, so that one which asks for today's date fails. With the line break the template
# still begins on a new line, as it was written; jinja drops it from what is written.
UNDATED = (
    "{% macro strftime_now(form) %}"
    """{{ raise_exception("it writes today's date, so prompts would change daily") }}"""
    "{% endmacro %}\n"
)

_TEXT = "What is monetary policy?\n\n" + "Größe, 态度, <s> {{ x }} 4.5 %. " * 200
_ASKED = {"role": "user", "content": _TEXT}
_SAID = {"role": "assistant", "content": "It is\nset by a central bank."}
# Chats on which a template is tried, and whether it must write them: some refuse system or empty messages.
PROBES = [
    ([{"role": "user", "content": "a"}], True),
    ([_ASKED], True),
    ([_ASKED, _SAID, _ASKED], False),
    ([{"role": "system", "content": "Be brief."}, _ASKED], False),
    ([{"role": "user", "content": ""}], False),
]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, which pads and truncates on the left, so that the end of a prompt is next to its answer.

    A missing pad token falls back to EOS, then to the unknown token. Labels and padding go by position, so a
    pad token that equals EOS hides no EOS from the loss."""
    config = read_config(folder) if (folder / "config.json").is_file() else None
    with explain_errors(
        f"{folder} has a tokenizer that can't be read",
        "expected the model's own tokenizer; download it again",
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            local_files_only=True,
            padding_side="left",
            truncation_side="left",
        )
        tokenizer("a\n")  # some faults appear only in use
    fallback = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None and fallback:
        tokenizer.pad_token = fallback
    return tokenizer


def tokenizer_folder(adapter: Path | None, base: Path) -> Path:
    """Where tokenizer and chat template are read: an adapter's own folder if it has them, or the base's."""
    own = adapter and any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return adapter if adapter and own else base


def tokenizer_faults(folder: Path, rows: int | None, chat_template: bool) -> list[str]:
    """What is wrong with the tokenizer in `folder` for a model of `rows` embeddings (None: not known), and,
    where it is to write chats, with its template."""
    try:
        tokenizer = load_tokenizer(folder)
    except Fault as fault:
        return fault.messages
    faults = []
    if tokenizer.eos_token_id is None:
        faults.append(
            f"{folder} has a tokenizer without EOS, so answers would never end: set eos_token in "
            "tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        faults.append(
            f"{folder} has a tokenizer without pad, EOS or unknown token: set pad_token in "
            "tokenizer_config.json."
        )
    if isinstance(rows, int) and _lacks_embeddings(tokenizer, rows):
        faults.append(
            f"{folder} has a tokenizer of {len(tokenizer)} tokens and a vocab_size of {rows}: expected at "
            "least as many embeddings; use the model's own tokenizer."
        )
    return faults + (chat_faults(folder, tokenizer) if chat_template else [])


def without_embedding(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> dict[int, str]:
    """The tokens, by number, that are past the last of a model's `rows` embeddings (None: not known)."""
    if rows is None or len(tokenizer) <= rows:
        return {}
    return {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}


def _lacks_embeddings(tokenizer: PreTrainedTokenizerBase, rows: int) -> bool:
    """Whether the model lacks embeddings that any text may need. It may lack those of added tokens, as the
    text models of Gemma 3 do for the token that stands for images: only texts that contain one of them need
    it, and the encoder refuses these."""
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    added = tokenizer.added_tokens_decoder
    return any(number in named or number not in added for number in without_embedding(tokenizer, rows))


def chat_faults(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Why the tokenizer can't write chats; empty where it can."""
    templates = tokenizer.chat_template
    if not templates:
        return [
            f"{folder} has no chat template, but chat_template is on: turn it off or choose a chat model."
        ]
    if isinstance(templates, dict) and "default" not in templates:
        return [
            f"{folder} has chat templates {', '.join(sorted(templates))} and none of them is the default: "
            f"copy the one that is meant to {folder}/chat_template.jinja, or turn chat_template off."
        ]
    template = tokenizer.get_chat_template()
    if not isinstance(template, str):
        return [
            f"{folder} has the chat template {shown(template)}: expected text; turn chat_template off, or "
            "use the model's own template."
        ]
    for chat, must in PROBES:
        try:
            render_chats(tokenizer, [chat])
        except foreign.Failed as error:
            if must or error.stopped:
                return [template_fault(folder, error)]
    return []


def template_fault(folder: Path | str, error: foreign.Failed, at: str = "") -> str:
    """The message for a chat template that failed; `at`: the user's prompt at which it failed."""
    where = f" at the prompt {shown(at)}" if at else ""
    return (
        f"{folder} has a chat template that fails{where} ({error.reason}): turn chat_template off, or use "
        "the model's own template."
    )


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    ask: bool = True,
    tools: list[Any] | None = None,
) -> str:
    """`render_chats` of one chat."""
    return render_chats(tokenizer, [messages], ask, tools=tools)[0]


def render_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[list[dict]],
    ask: bool = True,
    go_on: bool = False,
    tools: list[dict] | None = None,
) -> list[str]:
    """Chats as the model's template writes them, with the offered `tools`; with `ask` up to where the answer
    begins, with `go_on` up to the end of the last message. Equal to the tokenizer's `apply_chat_template`, in
    bounded time and memory.

    Raises foreign.Failed where the template refuses a chat, comes to no end, or writes today's date whatever
    `date_string` says, and ValueError where there is no template, or several and none of them is the default.
    """
    shared = {
        **tokenizer.special_tokens_map,
        "chat_template": UNDATED + tokenizer.get_chat_template(),
        "add_generation_prompt": ask,
        "continue_final_message": go_on,
        "tools": tools,
        "date_string": DATE,
    }
    # A key that is null is left out, as apply_chat_template does: templates ask whether it is there.
    given = []
    for chat in chats:
        given.append([_without_nulls(message) for message in chat])
    return foreign.write_chats(shared, given)


def around_text(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before a user's text, such as a system part of its own and the header of
    the turn, and after it, up to where the answer begins; both empty without a template, or with one that
    can't be used, whose chats are refused where they are asked for."""
    if not tokenizer.chat_template:
        return "", ""
    try:
        written = render_chat(tokenizer, [{"role": "user", "content": ASKED}])
    except (foreign.Failed, ValueError, TypeError):  # as in `end_of_turn`
        return "", ""
    before, found, after = written.partition(ASKED)
    return (before, after) if found else ("", "")


def _without_nulls(message: dict) -> dict:
    return {key: value for key, value in message.items() if value is not None}


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS in front by itself (LLaMA and Gemma do, SmolLM2 and Qwen don't)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def tokenizer_hash(folder: Path) -> str | None:
    """Hex sha256 of the folder's tokenizer.json; None where the tokenizer is in another file."""
    file = folder / "tokenizer.json"
    return file_sha256(file) if file.is_file() else None

"""Tokenizers: loading, chat templates, BOS."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from codyra_llm.core.files import file_sha256
from codyra_llm.models.weights import told

DATE = "26 Jul 2024"  # what chat templates are told that today is, so that a run's prompts stay as they are

# Goes in front of a template. Its last line break is cut, so that a template begins a line as it does alone.
UNDATED = (
    "{% macro strftime_now(form) %}"
    """{{ raise_exception("it writes today's date, so prompts would change daily") }}"""
    "{% endmacro %}\n"
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer that pads and truncates on the left, so that the end of a prompt meets its answer.

    A missing pad token falls back to EOS, then to the unknown token. Labels are made by position and padding
    is masked by position, so a pad token that is also EOS hides no EOS from the loss.
    """
    with told(
        f"{folder} has a tokenizer that can't be read",
        "expected the model's own tokenizer; download it again",
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            padding_side="left",
            truncation_side="left",
        )
        tokenizer("a\n")  # some faults show in use
    if tokenizer.pad_token_id is None and (fallback := tokenizer.eos_token or tokenizer.unk_token):
        tokenizer.pad_token = fallback
    return tokenizer


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """A chat as the model's template writes it, up to where the answer begins. Raises jinja2's TemplateError
    where the template refuses it, or writes today's date whatever `date_string` says."""
    return tokenizer.apply_chat_template(
        messages,
        chat_template=UNDATED + tokenizer.get_chat_template(),
        tokenize=False,
        add_generation_prompt=True,
        date_string=DATE,
    )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS in front by itself (LLaMA and Gemma do, SmolLM2 and Qwen don't)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def tokenizer_hash(folder: Path) -> str | None:
    """Hex sha256 of the folder's tokenizer.json; None where the tokenizer is in another file."""
    file = folder / "tokenizer.json"
    return file_sha256(file) if file.is_file() else None

"""Ollama's Modelfile: prompts in the format that the model was trained on, and greedy answers."""

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from codyra_llm.core.foreign import Failed
from codyra_llm.models.tokenizer import adds_bos, render_chat

WINDOW = 4096  # Ollama's default limit on the tokens of prompt and answer
PLAIN = "{{ .Prompt }}"
CONTENT = "{{ .Content }}"
# Marks for the texts of a chat in what a template writes.
SYSTEM, ASKED, SAID, AGAIN = "A system's text", "A question", "An answer", "Another question"

ASKS = {"role": "user", "content": ASKED}
GOES_ON = [ASKS, {"role": "assistant", "content": SAID}, {"role": "user", "content": AGAIN}]
BEGINS = {"role": "system", "content": SYSTEM}


def modelfile(name: str, template: str | None, longest: int, stops: Sequence[str]) -> str:
    """The Modelfile of the GGUF file `name`. `template` writes its prompts (PLAIN, or what `chat_template`
    makes); None leaves the choice to Ollama, which takes one of its own that looks like the GGUF file's.

    Answers are greedy, as in evaluation. Older versions of Ollama penalise repetition of the last 64 tokens,
    even at temperature 0. All cut what is longer than their window, so it is enlarged if it is too short for
    `longest` tokens. `stops` end an answer in addition to EOS, the only end token that Ollama reads from a
    GGUF file."""
    lines = [f"FROM ./{name}"]
    if template is None:
        lines.append(
            "# The model's chat template has no counterpart here: compare a prompt with what it writes."
        )
    else:
        lines.append(f'TEMPLATE """{template}"""')
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    if longest > WINDOW:
        lines.append(f"PARAMETER num_ctx {longest}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template in Go's language, as Ollama reads it, for chats of system, user and
    assistant without tools; a system's text only if the template takes one. It is put together from what the
    template writes around the texts of short chats; None where longer ones aren't made of the same pieces.

    BOS is left out if the tokenizer puts it in front by itself, since llama.cpp then does so too."""
    front = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
    first = _around(tokenizer, [ASKS], front)
    longer = _around(tokenizer, GOES_ON, front)
    if not first or not longer:
        return None
    before, after = first
    if (longer[0], longer[-1]) != (before, after):
        return None
    turn, following = longer[1:3]  # what the template writes before and after an earlier answer
    system = _around(tokenizer, [BEGINS, ASKS], front)
    if system and _around(tokenizer, [BEGINS, *GOES_ON], front) != [*system[:2], turn, following, after]:
        return None
    opening = _text(system[0]) + CONTENT if system else ""
    asked_first = _text(system[1] if system else before)  # what precedes a question after a system's text
    return "".join(
        [
            "{{ range $i, $_ := .Messages }}",
            '{{ if eq .Role "system" }}',
            opening,
            '{{ else if eq .Role "user" }}',
            "{{ if eq $i 0 }}"
            + _text(before)
            + "{{ else if and (eq $i 1) $.System }}"
            + asked_first
            + "{{ end }}",
            CONTENT,
            '{{ else if eq .Role "assistant" }}',
            _text(turn) + CONTENT + _text(following),
            "{{ end }}{{ end }}",
            _text(after),
        ]
    )


def _around(tokenizer: PreTrainedTokenizerBase, chat: list[dict], front: str) -> list[str] | None:
    """What the template writes before, between and after the texts of a chat, without `front`; None where it
    refuses the chat or changes its texts."""
    try:
        rest = render_chat(tokenizer, chat)
    except (Failed, ValueError, TypeError):  # as in models/ends.py
        return None
    rest, pieces = rest.removeprefix(front), []
    for message in chat:
        piece, found, rest = rest.partition(message["content"])
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, rest]


def _text(text: str) -> str:
    """A text as an action of a Go template that writes it. In any other form a Modelfile would change some
    characters, and Go would read braces as actions. Go's string literals are JSON's, except that they have
    an escape of their own for characters past U+FFFF."""
    if not text:
        return ""
    quoted = json.dumps(text, ensure_ascii=False)
    return "{{ " + "".join(c if c.isprintable() else _escaped(c) for c in quoted) + " }}"


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}"

"""Chats as text, by a model's chat template or without one, and the positions of the assistant's turns in
it."""

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from codyra_llm.core.foreign import Failed
from codyra_llm.core.parsing import shown
from codyra_llm.data.chats import Chat, Wrong
from codyra_llm.models.ends import end_of_turn
from codyra_llm.models.tokenizer import around_text, render_chats

Span = tuple[int, int]  # the first character, and the one after the last


class Render:
    """Chats as lines, without a model's template: for `codyra-llm data check`."""

    closing = ""  # what is written after a user's text, up to where the answer begins

    def __call__(self, chat: Chat) -> str:
        """The text before the assistant's next turn."""
        lines = [f"tools: {_compact(chat.tools)}"] if chat.tools else []
        for message in chat.messages:
            calls = f" {_compact(message['tool_calls'])}" if "tool_calls" in message else ""
            lines.append(f"{message['role']}: {message['content']}{calls}")
        return "\n".join(lines)

    def turns(self, chat: Chat) -> list[Span]:
        """The spans of the assistant's turns in the written `chat`; none without a template."""
        return []


plain = Render()


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _holds(written: str, content: str) -> bool:
    """Whether a chat as it is written has a message's text in it, as it is or, as some templates write what
    tools reply, as JSON."""
    text = content.strip()
    forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return any(form in written for form in forms)


def _token(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    token = tokenizer.convert_ids_to_tokens(number)
    assert isinstance(token, str), "one id is one token"
    return token


class ByTemplate(Render):
    """Chats as the model's template writes them, up to where the answer begins."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        end = end_of_turn(tokenizer)
        self.end = None if end is None else _token(tokenizer, end)
        self.closing = around_text(tokenizer)[1]

    def __call__(self, chat: Chat) -> str:
        """The text before the assistant's next turn. Raises Wrong where the template leaves out what is not
        the assistant's, as some do with a system's text without a word."""
        written = self._beginnings(chat, [len(chat.messages)])[0]
        for place, message in enumerate(chat.messages):
            if message["role"] != "assistant" and not _holds(written, message["content"]):
                raise Wrong(
                    f"the model's chat template leaves out the text of message {place}, whose role is "
                    f"{shown(message['role'])}; take it out of the chat, or choose another model"
                )
        return written

    def turns(self, chat: Chat) -> list[Span]:
        """The spans of the assistant's turns that are to be learnt, each from where it would be generated up
        to and including the token that ends it. Raises Wrong where the template writes a turn, or the text
        before it, differently when the chat continues: then no single sequence contains what the model reads
        and writes at each turn."""
        spoken = [
            place for place, message in enumerate(chat.messages) if place and message["role"] == "assistant"
        ]
        turn_at = {place: turn for turn, place in enumerate(spoken, 1) if place not in chat.unlearnt}
        if not turn_at:
            return []
        *before, whole = self._beginnings(chat, [*turn_at, len(chat.messages)])
        spans = [
            self._turn(chat.messages[place], turn, written, whole)
            for (place, turn), written in zip(turn_at.items(), before, strict=True)
        ]
        return [span for span in spans if span]

    def _turn(self, message: dict, number: int, before: str, whole: str) -> Span | None:
        """The span in `whole` of the assistant's turn `number`, which begins after `before`; None if it is
        empty."""
        text, start = message["content"].strip(), len(before)
        rest = whole[start:].lstrip()  # templates may put white space around a text
        if not whole.startswith(before) or not rest.startswith(text):
            raise Wrong(
                f"the model's chat template writes the assistant's turn {number}, or what stands before it, "
                "otherwise when the chat goes on (such as without its reasoning), so that it can't be learnt "
                "together with later ones; set train_on to last, or change the text"
            )
        if "tool_calls" in message:
            return start, self._end_of_call(number, start + len(text), whole)
        if not text:
            return None
        return start, self._end_of_text(len(whole) - len(rest) + len(text), whole)

    def _end_of_text(self, stop: int, whole: str) -> int:
        """The end of a turn whose text ends at `stop`: after the token that closes the turn, if it comes
        next."""
        rest = whole[stop:].lstrip()
        if self.end is None or not rest.startswith(self.end):
            return stop
        return len(whole) - len(rest) + len(self.end)

    def _end_of_call(self, number: int, start: int, whole: str) -> int:
        """The end of a turn that calls a tool, which every template writes in its own way."""
        stop = whole.find(self.end, start) if self.end else -1
        if stop < 0:
            raise Wrong(
                f"the assistant's turn {number} calls a tool, and the model's chat template marks no end of "
                "it, so that it can't be learnt; set train_on to last, or choose another model"
            )
        return stop + len(self.end)

    def _beginnings(self, chat: Chat, places: Sequence[int]) -> list[str]:
        """What is written before the message at each of `places`."""
        template = self.tokenizer.get_chat_template()
        needed = {"tool_calls"} if any("tool_calls" in message for message in chat.messages) else set()
        if chat.tools:
            needed.add("tools")
        for word in sorted(needed):
            if word not in template:  # the template would silently leave them out
                raise Failed(f"it writes no {word}", stopped=False)
        shortened = [chat.messages[:place] for place in places]
        return render_chats(self.tokenizer, shortened, tools=chat.tools)

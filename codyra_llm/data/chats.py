"""Chats in common formats, OpenAI's messages and ShareGPT's turns, as the messages that a chat template
writes."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from codyra_llm.config.task import Task
from codyra_llm.core.errors import nearest
from codyra_llm.core.parsing import shown

OPENAI_ROLES = {"developer": "system", "model": "assistant"}  # others are called as templates call them
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")


class Chat(NamedTuple):
    """Messages, each with `role` and `content` and, where the assistant calls tools, `tool_calls`; and the
    tools that it may call.
    """

    messages: list[dict[str, Any]]
    tools: list[dict] | None = None
    unlearnt: frozenset[int] = frozenset()  # the places of assistant's messages that are not to be learnt

    def before(self, place: int) -> "Chat":
        """The chat up to the message at `place`, which is left out."""
        return self._replace(messages=self.messages[:place])


class Wrong(Exception):
    """What is wrong with a chat; the message does not say where the chat is."""


def read_chat(row: object, task: Task) -> Chat:
    """The chat in a row of a task that has chats. Raises Wrong."""
    field = task.chat
    assert field is not None
    sharegpt = task.format == "sharegpt"
    fields = row if isinstance(row, dict) else {}
    raw = fields.get(field)
    keys = ("from", "value") if sharegpt else ("role", "content")
    if isinstance(row, dict) and field not in row:
        raise Wrong(f"there is no '{field}', expected a list of messages; add it.{nearest(field, row)}")
    if not isinstance(raw, list) or len(raw) < 2:
        raise Wrong(
            f"'{field}' must be a list of messages with the texts '{keys[0]}' and '{keys[1]}', of which the "
            "last is the assistant's; correct it."
        )
    read_one = _turn if sharegpt else _message
    messages = [read_one(message, f"'{field}', message {i}") for i, message in enumerate(raw)]
    _refuse_other_end(messages[-1], field)
    unlearnt = frozenset() if sharegpt else _unlearnt(raw, field)  # ShareGPT has no weights
    system = fields.get("system") if sharegpt else None
    if isinstance(system, str) and system:
        messages.insert(0, {"role": "system", "content": system})
    return Chat(messages, _tools(fields.get("tools")), unlearnt)


def _refuse_other_end(last: dict[str, Any], field: str) -> None:
    """Raises Wrong where the last message is not a text of the assistant's."""
    calls = "tool_calls" in last
    if last["role"] == "assistant" and isinstance(last["content"], str) and not calls:
        return
    found = "calls a tool" if calls else f"is of role {shown(last['role'])}"
    raise Wrong(
        f"'{field}' must be a list of messages of which the last is the assistant's text, to be learnt, "
        f"and its last {found}; cut it after one."
    )


def _unlearnt(raw: list[dict], field: str) -> frozenset[int]:
    """The places of the messages that are not to be learnt. Raises Wrong where the last is one of them."""
    places = frozenset(i for i, message in enumerate(raw) if _without_weight(message, field, i))
    if len(raw) - 1 in places:
        raise Wrong(
            f"the last message of '{field}' has the weight 0, so that nothing of the chat would be learnt; "
            "cut it after a message that is to be learnt."
        )
    return places


def _without_weight(raw: dict, field: str, place: int) -> bool:
    """Whether an assistant's message in OpenAI's format has the weight 0: it is not to be learnt."""
    weight = raw.get("weight")
    if raw["role"] not in ("assistant", "model") or weight is None:
        return False
    if isinstance(weight, bool) or weight not in (0, 1):
        raise Wrong(
            f"'{field}', message {place} has the weight {shown(weight)}, expected 0 or 1; correct it."
        )
    return weight == 0


def _turn(raw: object, where: str) -> dict[str, Any]:
    """A turn of ShareGPT as a message."""
    if not isinstance(raw, dict) or not isinstance(raw.get("from"), str):
        hint = (
            " It looks like OpenAI's; give format: openai." if isinstance(raw, dict) and "role" in raw else ""
        )
        raise Wrong(f"{where} must have the texts 'from' and 'value'; correct it.{hint}")
    role, text = raw["from"], raw.get("value")
    if role not in SHAREGPT_ROLES:
        raise Wrong(
            f"{where} is from {shown(role)}, which is not known.{nearest(role, SHAREGPT_ROLES)} Known: "
            f"{', '.join(SHAREGPT_ROLES)}"
        )
    if not isinstance(text, str):
        raise Wrong(f"{where} has a {type(text).__name__} as 'value', expected a text; correct it.")
    message = {"role": SHAREGPT_ROLES[role], "content": text}
    if role == "function_call":
        return {**message, "content": "", "tool_calls": [_call(text, where)]}
    return message


def _message(raw: object, where: str) -> dict[str, Any]:
    """A message in OpenAI's format, reduced to the fields that templates know."""
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
        hint = (
            " It looks like ShareGPT's; give format: sharegpt."
            if isinstance(raw, dict) and "from" in raw
            else ""
        )
        raise Wrong(f"{where} must have the texts 'role' and 'content'; correct it.{hint}")
    role, content, calls = raw["role"], raw.get("content"), raw.get("tool_calls")
    message: dict[str, Any] = {"role": OPENAI_ROLES.get(role, role), "content": content}
    if raw.get("function_call"):
        raise Wrong(f"{where} has a 'function_call', the old form; write it as 'tool_calls'.")
    if isinstance(content, list):
        message["content"] = "".join(_parts(content, where))
    elif content is None and calls:
        message["content"] = ""
    elif not isinstance(content, str):
        raise Wrong(f"{where} has {_a(content)} as 'content', expected a text; correct it.")
    if calls:
        if not isinstance(calls, list):
            raise Wrong(f"{where} has {_a(calls)} as 'tool_calls', expected a list; correct it.")
        message["tool_calls"] = [_call(call, where) for call in calls]
    for key in ("name", "tool_call_id"):
        if role == "tool" and isinstance(raw.get(key), str):
            message[key] = raw[key]
    return message


def _a(value: object) -> str:
    """A value's type with an article, for sentences."""
    return "null" if value is None else f"a {type(value).__name__}"


def _parts(content: list, where: str) -> Iterator[str]:
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            found = f"of type {shown(kind)}" if kind else _a(part)
            raise Wrong(f"{where}: part {place} of 'content' is {found}, expected text alone; leave it out.")
        yield part["text"]


def _call(raw: object, where: str) -> dict:
    """A call of a tool, its arguments as the mapping that templates expect."""
    call = _parsed(raw, where, "tool call")
    inner = call.get("function", call)
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise Wrong(f"{where} calls a tool without a 'name'; give it one.")
    given = inner.get("arguments", {})
    arguments = _parsed(given, where, f"arguments of {shown(name)}")
    found = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**found, "id": call["id"]} if isinstance(call.get("id"), str) else found


def _parsed(raw: object, where: str, what: str) -> dict:
    """A mapping that may be given as JSON."""
    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
    except (ValueError, RecursionError):
        raise Wrong(f"{where}: the {what} can't be read as JSON; correct it.") from None
    if not isinstance(value, dict):
        raise Wrong(f"{where}: the {what} must be an object, not {_a(value)}; correct it.")
    return value


def _tools(raw: object) -> list[dict] | None:
    """The tools that are offered, which ShareGPT gives as JSON."""
    if not raw:
        return None
    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
    except (ValueError, RecursionError):
        raise Wrong("'tools' can't be read as JSON; correct it.") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Wrong("'tools' must be a list of objects; correct it.")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value] or None

"""A set of general data: training records that belong to no task of the stream."""

from typing import TYPE_CHECKING

from codyra_llm.core.errors import Fault

if TYPE_CHECKING:
    from codyra_llm.data.stream import Stream


def general_set(stream: "Stream", name: str | None) -> list[dict]:
    """The set's training records; none where `name` is None. Raises Fault where it is a task of the stream,
    or can't be read."""
    if name is None:
        return []
    if name in stream.tasks:
        raise Fault(f"method.general: '{name}' is one of data.tasks; give a set that is not learnt, or null")
    try:
        return stream.extra(name)
    except Fault as fault:
        advice = "; give a set that is there, or null for none"
        raise Fault(
            *(f"method.general: {message.rstrip('.')}{advice}" for message in fault.messages)
        ) from None


def general_hash(stream: "Stream", name: str | None) -> dict[str, str]:
    """The hash of these records by their file's name; empty where `name` is None."""
    return {} if name is None else dict([stream.hash_of(name, "train")])

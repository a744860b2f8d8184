"""Makes examples, {"prompt", "answer"}, from a task's rows: from columns, a template over columns, or
chats."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codyra_llm.config.sections import FILE
from codyra_llm.config.task import Task
from codyra_llm.config.template import Template
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.foreign import Failed
from codyra_llm.core.parsing import parse_json, read_text, shown
from codyra_llm.data.chats import Chat, Wrong, read_chat
from codyra_llm.data.records import ABSENT, HIDDEN, as_text, record_faults, text_faults
from codyra_llm.data.rendering import Render, plain

Example = dict[str, Any]
Made = tuple[Example | None, list[str]]


def label_names(root: Path, name: str, task: Task) -> tuple[str, ...]:
    """The labels of a task, in the order of their numbers; empty if it has none. Raises Fault for a file
    without labels."""
    if not task.labels:
        return ()
    if not task.labels.file:
        return task.labels.names
    path = root / task.labels.file
    text = read_text(path, f"the labels of task '{name}'")
    if path.suffix == ".txt":
        found = [line.strip() for line in text.split("\n") if line.strip()]
    else:
        found = parse_json(text, str(path), "a list of labels")
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(as_text(label), str) for label in found)
    ):
        raise Fault(f"{path} must be a list of texts, the labels of task '{name}'; correct it")
    return tuple(str(label) for label in found)


def field(row: dict, name: str) -> object:
    """The value of the field `name`, or if there is no such field, the value at this path: `answers.text.0`
    is the first of the list `text` in `answers`. ABSENT where there is none."""
    if name in row:
        return row[name]
    value: object = row
    for step in name.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return ABSENT
    return value


class Columns:
    """Rows whose prompt and answer are columns, or whose prompt a template makes of columns."""

    def __init__(self, task: Task, labels: tuple[str, ...]):
        self.task, self.labels, self.templates = task, labels, task.templates
        offered = {"labels": ", ".join(labels)} if labels else {}
        self.given = {**offered, **task.constants}
        # Where labels are numbers, such as ratings from 1 to 5, an answer's number can't be told from theirs.
        counted = not any(label.isdecimal() for label in labels)
        self.numbered = {str(number): label for number, label in enumerate(labels) if counted}

    def lacking(self, rows: list, where: str) -> Iterator[str]:
        """Faults for columns of the template that no row has: these are mistakes, not optional texts."""
        if not self.templates:
            return
        rows = [row for row in rows if isinstance(row, dict)]
        if not rows:
            return
        known = dict.fromkeys(key for row in rows[:100] for key in row)
        for name in self.templates[-1].columns:
            if name not in self.given and all(field(row, name) is ABSENT for row in rows):
                yield (
                    f"{where}: no record has '{name}', which the prompt names in {FILE}."
                    f"{nearest(name, known)} "
                    "Correct it, write {{ and }} for braces, or give it as one of 'constants'."
                )

    def skips(self, row: object) -> bool:
        """Whether a training row is left out, since it has no answer."""
        return self.task.skip_empty and isinstance(row, dict) and self._answer(row) in ("", None)

    def key(self, row: dict) -> str:
        """What identifies the prompt of a faultless row."""
        return self._prompt(row)

    def make(self, row: object, split: str, where: str) -> Made:
        """The example that a row is, and what is wrong with it."""
        names = (self.task.columns.prompt, self.task.answer)
        if not isinstance(row, dict):
            return None, record_faults(row, split, where, names)
        if self.templates:
            faults = [*self._unwritable(row, where)] or [*self._unsaid(row, where)]
        else:
            faults = [*self._column(row, names[0], "prompt", split, where)]
        faults += self._column(row, names[1], "answer", split, where)
        if faults:
            return None, faults
        return {"prompt": self._prompt(row), "answer": str(self._answer(row))}, []

    def _prompt(self, row: dict) -> str:
        if not self.templates:
            return str(_single(field(row, self.task.columns.prompt)))
        chosen = next((one for one in self.templates if self._fills(one, row)), self.templates[-1])
        return chosen.fill(lambda name: self._text(row, name))

    def _fills(self, template: Template, row: dict) -> bool:
        """Whether the row has text for every column of the template."""
        return all(self._text(row, name).strip() for name in template.columns)

    def _value(self, row: dict, name: str) -> object:
        """A column of a template; an optional one that is absent is empty."""
        value = field(row, name)
        if value is ABSENT:
            return self.given.get(name, "")
        return "" if value is None else value

    def _text(self, row: dict, name: str) -> str:
        value = self._value(row, name)
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    def _unwritable(self, row: dict, where: str) -> Iterator[str]:
        """Faults for columns of the templates that hold something other than text."""
        for name in self._columns():
            value = self._value(row, name)
            items = value if isinstance(value, list) else [value]
            wrong = [item for item in items if not isinstance(as_text(item), str)]
            if wrong:
                yield from text_faults(wrong[0], name, "prompt", False, where)

    def _unsaid(self, row: dict, where: str) -> Iterator[str]:
        """Faults of the prompt that the templates make of a row."""
        yield from text_faults(self._prompt(row), "prompt", "prompt", False, where)
        own = [name for name in self._columns() if name not in self.given]
        if own and not any(self._text(row, name).strip() for name in own):
            names = ", ".join(f"'{name}'" for name in own)
            yield (
                f"{where} has no text in {names}, of which the prompt is made; fill in one, or remove the "
                "record."
            )

    def _columns(self) -> list[str]:
        """The columns of all templates."""
        return list(dict.fromkeys(name for one in self.templates for name in one.columns))

    def _answer(self, row: dict) -> object:
        """The answer, with a number replaced by its label; ABSENT, and what is not text, unchanged."""
        value = _single(field(row, self.task.answer))
        if not self.labels or value in self.labels or not isinstance(value, str):
            return value
        if value == "-1":
            return HIDDEN
        return self.numbered.get(value, value)

    def _column(self, row: dict, name: str, part: str, split: str, where: str) -> Iterator[str]:
        """Faults of the column that holds this `part`, prompt or answer."""
        value = self._answer(row) if part == "answer" else _single(field(row, name))
        learnt = split == "train"
        if value is ABSENT:
            yield f"{where} has no '{name}', expected a string; add it.{nearest(name, row)}"
            return
        faults = [*text_faults(value, name, part, learnt, where)]
        yield from faults
        if part == "answer" and learnt and not faults and self.labels and value not in self.labels:
            known = ", ".join(self.labels[:20])
            yield f"{where}: '{name}' is {shown(value)}, which is none of the labels, {known}; correct it."


def _single(value: object) -> object:
    """A list of one item as that item, integers as text."""
    return as_text(value[0] if isinstance(value, list) and len(value) == 1 else value)


class Chats:
    """Rows that hold a chat: everything before the last message is the prompt, the last the answer."""

    def __init__(self, task: Task, render: Render, every: bool):
        """`every`: whether the assistant's earlier turns are learnt too."""
        self.task, self.render, self.every = task, render, every

    def lacking(self, rows: list, where: str) -> Iterator[str]:
        """Nothing: what a chat lacks is found record by record."""
        return iter(())

    def skips(self, row: object) -> bool:
        """No row is left out."""
        return False

    def key(self, row: dict) -> str:
        """What identifies the prompt of a faultless row, before any model writes it."""
        return plain(_asked(read_chat(row, self.task)))

    def make(self, row: object, split: str, where: str) -> Made:
        """The example that a row makes, and what is wrong with it. `learnt` has the spans in the prompt,
        [start, stop) in characters, of the turns that are learnt too."""
        try:
            example = self._example(read_chat(row, self.task))
        except Wrong as wrong:
            return None, [f"{where}: {wrong}"]
        except Failed as error:
            sentence = (
                f"{where}: the model's chat template refuses '{self.task.chat}' ({error.reason}); correct "
                "it, or choose another model."
            )
            if error.stopped:  # it would be at every other record too
                raise Fault(sentence) from None
            return None, [sentence]
        faults = record_faults(example, split, where)
        return (None if faults else example), faults

    def _example(self, chat: Chat) -> Example:
        asked = _asked(chat)
        example = {"prompt": self.render(asked), "answer": chat.messages[-1]["content"]}
        return {**example, "learnt": self.render.turns(asked) if self.every else []}


def _asked(chat: Chat) -> Chat:
    """The chat without its last message, which is the answer."""
    return chat.before(len(chat.messages) - 1)

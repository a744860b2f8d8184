"""In which settings two recipes differ."""

from typing import Any

from codyra_llm.config.recipe import Recipe
from codyra_llm.config.sections import JudgeSection

# Settings that change no result.
NO_RESULT = (
    "output",
    "model.gradient_checkpointing",
    "checkpoint",
    "save.minutes",
    "save.keep",
    "hang_minutes",
    "trackers",
    "optim.micro_batch_tokens",
    "eval.batch_tokens",
    "model.fused",
    "data.batching",
    *(f"open_ended.judge.{key}" for key in JudgeSection.model_fields),
)

BY_TASK = ("data.epochs.", "eval.max_new_tokens.")  # what is given for each task
PLACES = ("data.root", "data.benchmark", "model.path", "model.revision")  # known by their content


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Keys in which two resolved recipes differ, except for tasks added at the end, paths, and settings that
    change no result."""
    before, after = (flat(r.model_dump(mode="json")) for r in (old, new))
    lines = []
    if new.tasks[: len(old.tasks)] != old.tasks:
        lines.append(f"data.tasks was {old.tasks}, now {new.tasks}")
    for key in sorted(before.keys() | after.keys()):
        section = next((section for section in BY_TASK if key.startswith(section)), None)
        may_differ = key in (*NO_RESULT, *PLACES, "data.tasks")
        of_added_task = section is not None and key.removeprefix(section) not in old.tasks
        kept = key == "model.dtype" and after.get(key) == "auto"  # a run keeps the dtype it began with
        if not (may_differ or of_added_task or kept) and before.get(key) != after.get(key):
            lines.append(f"{key} was {before.get(key)!r}, now {after.get(key)!r}")
    return lines


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one, keys joined by dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    found = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else key)
    return found

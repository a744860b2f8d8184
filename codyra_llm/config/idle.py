"""Settings that nothing reads next to the others: mistakes that would otherwise pass in silence."""

from collections.abc import Collection, Iterator
from pathlib import Path

from codyra_llm.config.recipe import Recipe
from codyra_llm.config.sections import GeneralSection, JudgeSection, OpenEndedSection
from codyra_llm.core.parsing import expanded, shown
from codyra_llm.core.schema import Strict

Section = GeneralSection | OpenEndedSection | JudgeSection


def settings(recipe: Recipe, shipped: Collection[str]) -> list[str]:
    """Settings that nothing reads next to the others, one sentence each. A run that is only read may have
    them: this is for recipes that are about to run. `shipped`: the names of models that come
    with the package.

    A section whose switch (`general.data`, `open_ended.prompts`, `open_ended.judge.base_url`) is written as
    null has been switched off by name, as a sweep's tries switch off what they don't need, and may keep its
    other settings.
    """
    return [*_of_model(recipe, shipped), *_of_general(recipe.general), *_of_open_ended(recipe.open_ended)]


def _of_model(recipe: Recipe, shipped: Collection[str]) -> Iterator[str]:
    path, revision = recipe.model.path, recipe.model.revision
    kind = "a shipped model" if path in shipped else _local(Path(expanded(path)))
    if revision is not None and kind:
        yield (
            f"model.revision: {shown(revision)} has no effect, since model.path, {shown(path)}, is {kind}, "
            "and only models on the hub have revisions; leave it out, or give a hub id as model.path"
        )


def _local(path: Path) -> str:
    """What the path is on this machine; empty where it is a hub id."""
    if path.suffix == ".gguf":
        return "a file"
    return "a folder" if path.is_dir() else ""


def _of_general(section: GeneralSection) -> Iterator[str]:
    if section.data is None:
        yield from _idle(
            "general", section, "data", "mini, hub or a folder with what is measured", "to measure nothing"
        )
        return
    if section.limit is None:
        yield from _undrawn("general", section)
    if section.trust_code and section.data in ("mini", "hub"):
        yield (
            f"general.trust_code: true has no effect with general.data {shown(section.data)}, since it is "
            "about task files in a folder of yours; leave it out"
        )


def _of_open_ended(section: OpenEndedSection) -> Iterator[str]:
    if section.prompts is None:
        yield from _idle("open_ended", section, "prompts", "a file or folder of prompts", "to ask nothing")
    elif section.limit is None:
        yield from _undrawn("open_ended", section)
    if section.judge.base_url is None:
        yield from _idle(
            "open_ended.judge", section.judge, "base_url", "the judge's address", "to judge nothing"
        )


def _idle(key: str, section: Section, switch: str, expected: str, off: str) -> Iterator[str]:
    """The settings of a section that nothing reads, because its `switch` is missing."""
    if switch in section.model_fields_set:  # written as null
        return
    for name, value in _changed(section):
        yield (
            f"{key}.{name}: {shown(value)} has no effect without {key}.{switch}; give that too ({expected}), "
            f"leave {name} out, or write {switch}: null {off}"
        )


def _undrawn(key: str, section: GeneralSection | OpenEndedSection) -> Iterator[str]:
    """The seed of a draw, where all examples are taken and none is drawn."""
    if section.seed != 0:
        yield (
            f"{key}.seed: {section.seed} has no effect without {key}.limit, since it draws the examples that "
            "limit asks for; give a limit, or leave it out"
        )


def _changed(section: Section) -> Iterator[tuple[str, object]]:
    """The settings that are not the default, by name; without sections, which are looked at by themselves."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value != field.default and not isinstance(value, Strict):
            yield name, value

"""A recipe: the YAML file that describes one run, its schema, its overrides, and all of its faults at
once.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, Field, SerializeAsAny, model_validator

from codyra_llm.config.benchmark import Benchmark, benchmark_folder, load_benchmark
from codyra_llm.config.methods.base import MethodConfig
from codyra_llm.config.overrides import method_section, override, read_recipe
from codyra_llm.config.plugins import has_method
from codyra_llm.config.registry import METHODS
from codyra_llm.config.sections import (
    SHIPPED,
    DataSection,
    EvalSection,
    GeneralSection,
    ModelSection,
    OpenEndedSection,
    OptimSection,
    SaveSection,
)
from codyra_llm.core.errors import Attempts, Fault, nearest
from codyra_llm.core.parsing import WrittenPath, shown
from codyra_llm.core.schema import Positive, Strict

T = TypeVar("T")
FILE_NAME = re.compile(r"[^/\\.\x00-\x1f][^/\\\x00-\x1f]*")  # what a task's name becomes
NAME_BYTES = 200  # file systems take 255; numbers, suffixes and a process's id are added to the name


class Recipe(Strict, frozen=True):
    """One run. Fields left at null are filled from the protocol by `resolved`. Sections may be given as
    mappings, and the method as its name alone."""

    model: ModelSection
    data: DataSection
    method: SerializeAsAny[MethodConfig]
    optim: OptimSection = OptimSection()
    eval: EvalSection = EvalSection()
    general: GeneralSection = GeneralSection()
    open_ended: OpenEndedSection = OpenEndedSection()
    save: SaveSection = SaveSection()
    seed: int = Field(
        default=1234,
        ge=0,
        lt=1 << 32,
        description="seed of the order of examples, adapters' initial values, dropout and draws",
    )
    output: WrittenPath = Field(description="run folder")
    hang_minutes: Positive = Field(
        default=30.0, description="a launch of several processes ends if none makes progress for so long"
    )
    trackers: list[str] = Field(
        default=[],
        description="trackers of Accelerate, which get losses and scores as they are written: "
        "tensorboard, wandb, trackio, mlflow, aim, ...; Accelerate's docs list all",
    )
    checkpoint: bool = Field(default=True, description="write the final merged model to <output>/checkpoint")

    def __init__(self, /, **given: Any):
        _with_settings(given, lambda settings: super(Recipe, self).__init__(**settings))

    __init__.__pydantic_base_init__ = True  # pyright: ignore  # as in Strict

    @classmethod
    def model_validate(cls, obj: Any, *, prefix: tuple[str, ...] = (), **options: Any) -> Self:
        """The recipe that a mapping holds."""

        def validate(settings: Any) -> Self:
            return super(Recipe, cls).model_validate(settings, prefix=prefix, **options)

        return _with_settings(obj, validate) if isinstance(obj, dict) else validate(obj)

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark, read from its folder. Raises Fault if there is none, or a faulty one."""
        return load_benchmark(self.data.benchmark)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order of the stream."""
        given = self.data.tasks
        return list(self.benchmark.orders[given]) if isinstance(given, int) else given

    def by_template(self, task: str) -> bool:
        """Whether the model's chat template writes the prompts of `task`: those of every task with
        data.chat_template, else only those of tasks whose examples are chats."""
        return self.data.chat_template or self.benchmark.task(task).chat is not None

    @property
    def epochs(self) -> list[int]:
        """Epochs of each task, in order; the recipe must be resolved."""
        epochs = self.data.epochs
        assert epochs is not None, "resolved() fills in the protocol's"
        return [by_task(epochs, task) for task in self.tasks]

    @model_validator(mode="after")
    def _names_are_consistent(self) -> "Recipe":
        # A finished run's recipe names its tasks, and is read without its benchmark where that is a folder.
        if isinstance(self.data.tasks, int) or self.data.benchmark in SHIPPED:
            try:
                missing = self.benchmark.lacks(self.data)
            except Fault as fault:
                missing = fault.messages
            if missing:
                raise ValueError("\n".join(missing))
        faults = [
            *_task_faults(self.tasks),
            *_foreign_tasks("data.epochs", self.data.epochs, self.tasks),
            *_foreign_tasks("eval.max_new_tokens", self.eval.max_new_tokens, self.tasks),
        ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def given(self) -> dict[str, Any]:
        """The recipe as a mapping, without what was left at its default."""
        mapping = self.model_dump(mode="json", exclude_unset=True, warnings=False)
        if isinstance(self.method, MethodConfig):  # its name is a default, which exclude_unset leaves out
            mapping["method"] = self.method.model_dump(mode="json")
        return mapping

    def resolved(self) -> "Recipe":
        """The same recipe with every null that the benchmark knows filled in; valid, and equal to itself
        resolved. Raises Fault for names that the benchmark lacks."""
        known = self.benchmark
        missing = known.lacks(self.data)
        if missing:
            raise Fault(*missing)
        name = self.data.protocol or next(iter(known.protocols))
        protocol, tasks = known.protocols[name], self.tasks
        root = self.data.root or str(benchmark_folder(self.data.benchmark))
        epochs = _for_each(self.data.epochs, {task: known.task(task).epochs for task in tasks})
        longest = {task: known.task(task).max_new_tokens or protocol.max_new_tokens for task in tasks}
        limits = _for_each(self.eval.max_new_tokens, longest)
        data = _filled(self.data, protocol, root=root, protocol=name, tasks=tasks, epochs=epochs)
        return self.model_copy(
            update={
                "data": data,
                "optim": _filled(self.optim, protocol),
                "eval": _filled(self.eval, protocol, max_new_tokens=limits),
            }
        )


def _task_faults(tasks: list[str]) -> Iterator[str]:
    """What is wrong with the names of a recipe's tasks."""
    if not tasks or len(set(tasks)) < len(tasks):
        yield f"data.tasks: {tasks} must name at least one task, and each once"
    for name in tasks:
        if not FILE_NAME.fullmatch(name):
            yield (
                f"data.tasks: {shown(name)} becomes a file name; leave out '/', control characters and a '.' "
                "in front"
            )
        elif len(name.encode()) > NAME_BYTES:
            yield (
                f"data.tasks: {shown(name)} has {len(name.encode())} bytes and becomes a file name; shorten "
                f"it to at most {NAME_BYTES}"
            )
    if "base" in tasks:
        yield "data.tasks: 'base' is the name of the stage before all tasks; rename it"
    if len(tasks) > 100:
        yield f"data.tasks: there are {len(tasks)}, and files of a run are numbered up to 99; leave some out"


def _foreign_tasks(key: str, value: int | dict[str, int] | None, tasks: list[str]) -> Iterator[str]:
    """What is wrong with the names in a setting that is one number, or a number by task."""
    for name in value if isinstance(value, dict) else ():
        if name not in tasks:
            yield f"{key}: '{name}' is not a task of this recipe.{nearest(name, tasks)}"


def by_task(value: int | dict[str, int], task: str) -> int:
    """The value for one task of a setting that is one number or a number by task."""
    return value if isinstance(value, int) else value[task]


def _for_each(given: int | dict[str, int] | None, defaults: dict[str, int]) -> int | dict[str, int]:
    """One number for all tasks as it is; else a number for every task, its default where none is given."""
    if isinstance(given, int):
        return given
    chosen = given or {}
    return {task: chosen.get(task, default) for task, default in defaults.items()}


def _filled(section: BaseModel, protocol: Any, /, **known: Any) -> BaseModel:
    """The section with `known` set, and every other null replaced by the protocol's field of that name."""
    missing = {
        key: getattr(protocol, key) for key, value in section if value is None and hasattr(protocol, key)
    }
    return section.model_copy(update={**missing, **known})


AnyRecipe = str | Path | Mapping[str, Any] | Recipe  # a file or the name of a shipped one, or its content


def load_recipe(recipe: AnyRecipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe (a file, the name of a shipped one, a mapping, or another recipe) with `a.b=value` overrides.
    Raises one Fault with every mistake."""
    if isinstance(recipe, Recipe):
        return parse_recipe(override(recipe.given(), overrides))
    if isinstance(recipe, Mapping):
        return parse_recipe(override(deepcopy(dict(recipe)), overrides))
    return parse_recipe(override(read_recipe(recipe), overrides), str(recipe))


def parse_recipe(raw: dict, source: str = "recipe") -> Recipe:
    """A validated recipe from a mapping; every mistake of every section in one Fault."""
    try:
        return Recipe.model_validate(raw)
    except Fault as fault:
        raise Fault(*(f"{source}: {line}" for line in fault.messages)) from None


def _with_settings(raw: dict, build: Callable[[dict], T]) -> T:
    """What `build` makes of a recipe's mapping, once its method's section is replaced by that method's own
    class of settings. Raises one Fault with what is wrong with the method and with all the rest."""
    tried = Attempts()
    # Where the method is at fault, another one stands in while the rest is validated.
    config = tried(_method_settings, raw.get("method")) or METHODS.settings("seqlora")()
    built = tried(build, {**raw, "method": config})
    if tried.faults:
        raise Fault(*tried.faults)
    return built


def _method_settings(given: Any) -> MethodConfig:
    """The settings of a recipe's `method`: a name, a section, or settings as they are."""
    if isinstance(given, MethodConfig):
        return given
    section = method_section(given)
    name = section.get("name") if isinstance(section, dict) else section  # any YAML
    if not (isinstance(section, dict) and has_method(name)):
        raise Fault(
            f"method.name: {shown(name)} is not a method.{nearest(str(name)[:100], METHODS)} "
            f"Known: {', '.join(METHODS)}; one of your own is given by --plugin FILE"
        )
    return METHODS.settings(str(name)).model_validate(section, prefix=("method",))

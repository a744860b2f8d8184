"""From the arguments of `codyra-llm evaluate`: what the checkpoint is, and the recipe that it is scored
by."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from codyra_llm.config.benchmark import benchmark_folder, digest
from codyra_llm.config.overrides import assign, override, split_overrides
from codyra_llm.config.plugins import has_method
from codyra_llm.config.recipe import Recipe, parse_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.config.sections import SHIPPED, TRACE
from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import expanded, read_mapping, shown
from codyra_llm.experiment.export import LINEAGE
from codyra_llm.formats.adapter import Base, base_of
from codyra_llm.formats.adapter_files import is_adapter
from codyra_llm.store.folder import RunFolder


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; None where it leaves the choice to the checkpoint's own recipe."""

    data: str | None = None
    tasks: list[str] | None = None
    general: str | None = None
    general_tasks: list[str] | None = None
    base: str | None = None
    out: Path | None = None
    overrides: list[str] = field(default_factory=list)
    benchmark: str | None = None


@dataclass(frozen=True)
class Source:
    """What a checkpoint consists of: the recipe it was made with (`raw`, empty where there is none), and one
    of three: a `run` and the last task learnt (`after`); a merged `model`; a base (`model`, `revision`) and
    the folder of its `adapter`."""

    raw: dict
    after: str | None = None
    benchmark: str | None = None  # the digest of its recipe's
    run: RunFolder | None = None
    model: str | None = None
    revision: str | None = None
    adapter: Path | None = None
    chat: bool = False  # whether the chat template wrote the prompts of the last task that an export learnt
    remark: str = ""  # what the user should know about it


def taken_apart(checkpoint: str, wanted: Wanted) -> Source:
    """Find out what `checkpoint` is and where it comes from, without loading it. Raises Fault if it can't be
    scored as asked.
    """
    return _on_benchmark(checkpoint_source(checkpoint, wanted.base), checkpoint, wanted.benchmark)


def checkpoint_source(checkpoint: str, base: str | None) -> Source:
    """What `checkpoint` (folder, hub id, .gguf, PEFT folder, RUN, RUN@TASK) is; an adapter is on `base`, or
    on the one that it names. Raises Fault for no name, for a run that has no such task, and for an adapter
    that can't be used."""
    if not checkpoint.strip():  # an unset variable of the shell; as a path it would be the working folder
        raise Fault("CHECKPOINT: expected a folder, a hub id or RUN@TASK, got nothing; give one")
    folder, (place, task) = Path(expanded(checkpoint)), run_at(checkpoint)
    if place:
        return _stage(RunFolder(place), task)
    if (folder / "recipe.json").is_file():
        return _stage(RunFolder(folder))
    found = _carried(_own_folder(folder) / LINEAGE, checkpoint)
    if is_adapter(folder):
        given = Base(base, revision_of(base, found.raw)) if base else None
        path, revision = base_of(folder, given)
        revision = revision or revision_of(path, found.raw)  # adapters of old exports name none
        return replace(found, model=path, revision=revision, adapter=folder)
    return found


def _own_folder(checkpoint: Path) -> Path:
    """The folder of a checkpoint's files: that of a GGUF file is the one that it lies in."""
    return checkpoint.parent if checkpoint.is_file() else checkpoint


def run_at(checkpoint: str) -> tuple[Path | None, str]:
    """The folder and the task of RUN@TASK; None where `checkpoint` is anything else, such as a folder whose
    name has an @ in it."""
    whole = expanded(checkpoint)
    place, _, task = whole.rpartition("@")
    return (Path(place), task) if place and Path(place).is_dir() and not Path(whole).exists() else (None, "")


def revision_of(base: str, raw: dict) -> str | None:
    """The revision of a base that the command line names: the one of the recipe `raw` if that names the same
    one, else none, as another model's branches and commits are its own."""
    model = raw.get("model") or {}
    return model.get("revision") if model.get("path") == base else None


def _stage(run: RunFolder, after: str | None = None) -> Source:
    """The run `after` that task; None: after the last that it has learnt."""
    after = ["base", *run.archive().tasks][-1] if after is None else after
    return Source(run.recipe.model_dump(mode="json"), after, run.manifest.get("benchmark"), run)


def _carried(file: Path, checkpoint: str) -> Source:
    """The recipe, the last task and the digest of the benchmark that an export carries; any other checkpoint
    carries none of them. An export is a plain model, and is scored as one where its method is not known
    here."""
    if not file.is_file():
        return Source({}, model=checkpoint)
    carried = read_mapping(file, "what a run's export says of itself")
    raw, after = carried.get("recipe"), carried.get("after")
    if not isinstance(raw, dict):
        raise Fault(
            f"{file}: 'recipe' is {shown(raw)}, expected a run's recipe; restore the file, or remove it and "
            "give --data"
        )
    remark = ""
    unknown = _unknown_method(raw)
    if unknown:
        raw = raw | {"method": {"name": "none"}}
        remark = (
            f"{checkpoint}: made by method '{unknown}', which is not known here; scored as a plain model, "
            "and with --plugin FILE by the method's own prompts"
        )
    recipe = parse_recipe(raw, str(file))
    chat = carried.get("chat", recipe.data.chat_template)
    if not isinstance(chat, bool):
        raise Fault(f"{file}: 'chat' is {shown(chat)}, expected true or false; restore the file")
    if after is not None and after not in recipe.tasks:
        raise Fault(
            f"{file}: 'after' is {shown(after)}, expected one of {', '.join(recipe.tasks)}; restore the file"
        )
    return Source(
        recipe.model_dump(mode="json"),
        after,
        carried.get("benchmark"),
        model=checkpoint,
        chat=chat,
        remark=remark,
    )


def _unknown_method(raw: dict) -> str | None:
    """The name of the recipe's method where nothing here has it."""
    method = raw.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    return name if isinstance(name, str) and not has_method(name) else None


def _on_benchmark(source: Source, checkpoint: str, wanted: str | None) -> Source:
    """The checkpoint; without its own recipe where the user asks for another benchmark than that recipe's."""
    own = source.raw.get("data", {}).get("benchmark", TRACE)
    if not (source.raw and wanted):
        return source
    if benchmark_folder(wanted).resolve() == benchmark_folder(own).resolve():
        return source
    if source.benchmark == digest(wanted):  # the same benchmark at another path
        if source.raw["data"]["root"] == str(benchmark_folder(own)):
            assign(source.raw, "data.root", str(benchmark_folder(wanted)))
        return source
    if source.run:
        raise Fault(
            f"--benchmark: {checkpoint} is a stage of a run on {own}, and is scored on its tasks; export it "
            "with `codyra-llm export`, and give the export"
        )
    remark = (
        f"{checkpoint}: scored by the protocol of {wanted}, not by its run's recipe, which is for "
        f"another benchmark, {own}"
    )
    return replace(source, raw={}, after=None, remark=remark)


def recipe_of(checkpoint: str, source: Source, wanted: Wanted) -> Recipe:
    """The recipe that the checkpoint is scored by: its own, or the benchmark's protocol, with the command
    line's settings over it."""
    anywhere = "." if wanted.benchmark in (None, *SHIPPED) else None
    plain = {
        "model": {},
        "data": {"root": wanted.data or anywhere},
        "method": "none",
        "general": {"data": None},
    }
    raw = deepcopy(source.raw) or plain
    if source.raw:
        _refuse_own_code(checkpoint, source, wanted)
    # None leaves the recipe's value, except for these keys, which it resets.
    reset = {"optim.validate_every", "model.quantization"}
    if source.model:
        reset.add("model.revision")
    for key, value in _given(checkpoint, source, wanted).items():
        if value is not None or (source.raw and key in reset):
            assign(raw, key, value)
    recipe = parse_recipe(override(raw, wanted.overrides), checkpoint)
    _refuse_another_run(checkpoint, source, recipe)
    if wanted.general_tasks and not recipe.general.data:
        raise Fault("--general-tasks: no general ability is measured; give --general, or leave it out")
    if source.raw or wanted.data or recipe.data.root != ".":
        return recipe
    if not (recipe.general.data or recipe.open_ended.prompts):
        raise _nothing_to_score(checkpoint)
    return without_tasks(recipe)


def _given(checkpoint: str, source: Source, wanted: Wanted) -> dict[str, Any]:
    """By key, the settings that the command's options and the checkpoint's kind decide; None: left open."""
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in checkpoint.strip("/."))
    given = {
        "output": str(wanted.out or Path("evaluations") / name),
        "checkpoint": False,
        "data.root": wanted.data,
        "data.benchmark": wanted.benchmark,
        "model.path": source.model,
        "model.revision": source.revision,
        "general.data": wanted.general,
        "general.tasks": wanted.general_tasks,
    }
    if source.raw:  # checkpoints are shared, so only the command line decides where keys and answers are sent
        given |= {
            "optim.validate_every": None,
            "optim.keep_best": False,
            "model.quantization": None,
            "open_ended.judge": {},
            "general.trust_code": False,
            "trackers": [],
        }
    elif wanted.tasks:
        given["data.tasks"] = wanted.tasks
    return given


def _nothing_to_score(checkpoint: str) -> Fault:
    """For a checkpoint without a recipe where the command line names no data either."""
    remedy = "give the tasks' folder with --data, or files for general ability with --general"
    if Path(expanded(checkpoint)).exists():
        return Fault(f"{checkpoint} carries no recipe, so there is nothing to score it on; {remedy}")
    return Fault(
        f"there is no folder or file '{checkpoint}', and a model of the hub carries no recipe to score "
        f"it on; correct the path, or {remedy}"
    )


def _refuse_another_run(checkpoint: str, source: Source, recipe: Recipe) -> None:
    """Raises one Fault where settings would change what the checkpoint is: how its updates are read, or which
    task each of them belongs to."""
    if not source.raw:
        return
    own, faults = parse_recipe(source.raw, checkpoint), []
    if recipe.method != own.method:
        faults.append(
            f"method: {checkpoint} was made by {own.method.name} with settings of its own, and is scored by "
            "these; leave 'method' out"
        )
    if recipe.tasks != own.tasks:
        faults.append(
            f"data.tasks: {checkpoint} is of a run that learns {', '.join(own.tasks)} in this order; leave "
            "'data.tasks' out, and name those to score with --tasks"
        )
    if faults:
        raise Fault(*faults)


def _refuse_own_code(checkpoint: str, source: Source, wanted: Wanted) -> None:
    """Raises Fault where the recipe that the checkpoint carries names the checkpoint itself as the folder of
    general-ability tasks: the harness's task files can run code."""
    data = (source.raw.get("general") or {}).get("data")
    given = wanted.general or any(key == "general.data" for key, _ in split_overrides(wanted.overrides))
    if given or data in (None, "mini", "hub"):
        return
    folder = source.run.path if source.run else source.adapter or _own_folder(Path(source.model).expanduser())
    if Path(expanded(data)).resolve().is_relative_to(folder.resolve()):
        raise Fault(
            f"general.data: the recipe that {checkpoint} carries names '{data}', a folder of the checkpoint "
            "itself, whose task files can run code; look at them and give it with --general, or give "
            "general.data=null"
        )


def without_tasks(recipe: Recipe) -> Recipe:
    """The recipe with no tasks to learn or score, for measuring general ability only."""
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"tasks": [], "root": "."}),
            "method": METHODS.settings("none")(),
        }
    )

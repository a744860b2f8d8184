"""`codyra-llm evaluate`: score a checkpoint that exists, as a run scores its own, without training."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from . import __version__, distributed, live, models, open_ended, watch
from . import recipe as recipes
from .benchmark import TRACE, digest, place
from .distributed import collectively, of_first
from .errors import Fault, nearest
from .evaluate import judge
from .evaluate.layout import lm_eval_layout
from .export import LINEAGE
from .files import await_file, file_sha256, write_json
from .folder import NO_RESULT, RunFolder, flat
from .lease import Lease
from .live import console
from .measure import measure
from .preflight import preflight
from .recipe import Recipe
from .report import judged
from .report.tables import delta_r
from .setup import Setup, prepare
from .untrusted import read_mapping, shown


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


@dataclass
class Checkpoint(Setup):
    """A setup whose model is given, whatever a run would have made of the base."""

    build: Callable[[], PreTrainedModel]

    def model(self, archive, after, without=None) -> PreTrainedModel:
        return self.build()


@dataclass(frozen=True)
class Source:
    """A checkpoint taken apart: the recipe that it comes from, or an empty one; the run and the task after which, the merged
    model's folder, or the base and the adapter's folder."""

    raw: dict
    after: str | None = None
    run: RunFolder | None = None
    model: str | None = None
    adapter: Path | None = None
    told: str = ""  # what the user should know of it


def evaluate(checkpoint: str, wanted: Wanted) -> RunFolder:
    """Score `checkpoint` (folder, hub id, .gguf, PEFT folder, RUN, RUN@TASK) into `wanted.out`, as far as it isn't yet.

    A checkpoint that a run made is scored as the run did, by the recipe that it carries. Raises one Fault with all that
    is wrong, before any weights load.
    """
    acc = distributed.accelerator()
    first = acc.is_local_main_process  # what is converted on first use is made once on each node
    prepared = collectively(first, _prepare, checkpoint, wanted)
    setup, source, index, base = collectively(not first, _prepare, checkpoint, wanted) or prepared
    if base and setup.prompts:
        collectively(acc.is_main_process, judge.require, setup.recipe.open_ended.judge)
    if acc.num_processes > 1:
        watch.start(acc.process_index, acc.num_processes, setup.recipe.hang_minutes)
        preflight(acc, setup, models.fingerprint(setup.base) if first else None)
    lease = Lease(Path(setup.recipe.output))
    out = RunFolder(lease.folder, lease, acc.is_main_process)
    collectively(acc.is_main_process, lease.take)
    try:
        with live.running(acc.is_main_process), watch.until_stopped():
            _measure(checkpoint, wanted, acc, setup, source, index, base, out)
    finally:
        lease.release()
    return out


def _measure(checkpoint: str, wanted: Wanted, acc: Accelerator, setup: Setup, source: Source, index: int, base: Setup | None,
             out: RunFolder) -> None:
    if source.told and acc.is_main_process:
        console.print(source.told, soft_wrap=True)
    collectively(acc.is_main_process, lambda: _claim(out, _manifest(checkpoint, setup, source, base)))
    collectively(True, await_file, out.path / "manifest.json")
    known = {"after": source.after or "checkpoint", "step": index + 1 if source.after else 1}
    had = of_first(len(out.scores) if acc.is_main_process else None)
    if base:
        measure(base, out, acc, -1, {"after": "base", "step": 0}, (), True, out)
        open_ended.answer(base, out, acc, -1, {"after": "base", "step": 0}, out)
    general = bool(wanted.general) or index in (-1, len(setup.recipe.tasks) - 1) or setup.recipe.general.when == "each"
    measure(setup, source.run or out, acc, index, known, _positions(setup.recipe, index, wanted.tasks), general, out)
    if base:
        open_ended.answer(setup, source.run or out, acc, index, known, out)
        open_ended.settle(setup, out, acc)
    collectively(acc.is_main_process, lambda: _finish(checkpoint, setup, out, known, had))


def _prepare(checkpoint: str, wanted: Wanted) -> tuple[Setup, Source, int, Setup | None]:
    """What to score, where it comes from, the position of the task after which (-1: none), and the base if it is asked for."""
    source = _on_benchmark(_source(checkpoint, wanted.base), checkpoint, wanted.benchmark)
    recipe = _recipe(checkpoint, source, wanted)
    setup = prepare(recipe, open_ended=bool(wanted.base))
    if unknown := [task for task in wanted.tasks or () if task not in setup.recipe.tasks]:
        raise Fault(*(f"--tasks: '{task}' is not a task of the recipe that {checkpoint} carries."
                      f"{nearest(task, setup.recipe.tasks)} Known: {', '.join(setup.recipe.tasks)}" for task in unknown))
    index = source.run.archive().index(source.after) if source.run else -1
    if not source.run:
        index = setup.recipe.tasks.index(source.after) if source.after else -1
        setup = Checkpoint(**vars(setup), build=lambda: _built(setup, source.adapter))
    if not (wanted.base and (setup.recipe.general.data or setup.prompts)):
        return setup, source, index, None
    plain = prepare(_without_tasks(recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": wanted.base})})))
    return setup, source, index, Checkpoint(**vars(plain), build=lambda: _built(plain, None))


def _source(checkpoint: str, base: str | None) -> Source:
    path, at, task = checkpoint.rpartition("@")
    if at and Path(path).is_dir():
        run = RunFolder(Path(path))
        return Source(run.recipe.model_dump(mode="json"), task, run)
    folder = Path(checkpoint).expanduser()
    if (folder / "recipe.json").is_file():
        run = RunFolder(folder)
        learnt = run.archive().tasks
        return Source(run.recipe.model_dump(mode="json"), learnt[-1] if learnt else "base", run)
    found = Source(*_carried(folder / LINEAGE), model=checkpoint)
    return _on_base(found, folder, base) if (folder / "adapter_config.json").is_file() else found


def _carried(file: Path) -> tuple[dict, str | None]:
    """The recipe and the task after which that an export carries; ({}, None) of any other checkpoint."""
    if not file.is_file():
        return {}, None
    carried = read_mapping(file, "what a run's export says of itself")
    raw, after = carried.get("recipe"), carried.get("after")
    if not isinstance(raw, dict):
        raise Fault(f"{file}: 'recipe' is {shown(raw)}, expected a run's recipe; restore the file, or remove it and give --data")
    recipe = recipes.parse(raw, str(file))
    if after is not None and after not in recipe.tasks:
        raise Fault(f"{file}: 'after' is {shown(after)}, expected one of {', '.join(recipe.tasks)}; restore the file")
    return recipe.model_dump(mode="json"), after


def _on_benchmark(source: Source, checkpoint: str, wanted: str | None) -> Source:
    """The checkpoint, without its own recipe where another benchmark than that recipe's is asked for."""
    own = source.raw.get("data", {}).get("benchmark", TRACE)
    if not (source.raw and wanted) or place(wanted).resolve() == place(own).resolve():
        return source
    if source.run:
        raise Fault(f"--benchmark: {checkpoint} is a stage of a run on {own}, and is scored on its tasks; export it with "
                    f"`codyra-llm export`, and give the export")
    carried = read_mapping(Path(checkpoint).expanduser() / LINEAGE, "what a run's export says of itself")
    if carried.get("benchmark") == digest(wanted):  # the same, at another place
        if source.raw["data"]["root"] == str(place(own)):
            recipes.assign(source.raw, "data.root", str(place(wanted)))
        return source
    told = f"{checkpoint}: scored by the protocol of {wanted}, not by its run's recipe, which is for another benchmark, {own}"
    return replace(source, raw={}, after=None, told=told)


def _on_base(source: Source, folder: Path, base: str | None) -> Source:
    """A PEFT folder as the base that it names, or that is given, and itself."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise Fault(f"{folder} is a PEFT adapter, and the package peft is not installed; install codyra-llm[peft]") from None
    config = read_mapping(folder / "adapter_config.json", "the adapter's config")
    if (kind := config.get("peft_type")) != "LORA":
        raise Fault(f"{folder} is an adapter of peft_type {kind}, expected LORA, which can be merged into its base; merge it "
                    f"where it was made, and give the merged folder")
    if not (model := base or config.get("base_model_name_or_path")):
        raise Fault(f"{folder}/adapter_config.json names no base_model_name_or_path; give the base with --base")
    return Source(source.raw, source.after, model=model, adapter=folder)


def _recipe(checkpoint: str, source: Source, wanted: Wanted) -> Recipe:
    """The recipe that the checkpoint is scored by: its own, or the benchmark's protocol; the command line over it."""
    anywhere = None if wanted.benchmark not in (None, TRACE) else "."
    raw = source.raw or {"model": {}, "data": {"root": wanted.data or anywhere}, "method": "none"}
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in checkpoint.strip("/."))
    given = {"output": str(wanted.out or Path("evaluations") / name), "checkpoint": False, "data.root": wanted.data,
             "data.benchmark": wanted.benchmark, "model.path": source.model, "general.data": wanted.general,
             "general.tasks": wanted.general_tasks}
    if source.raw:  # checkpoints are passed on: where a key and answers go, the command line alone says
        given |= {"optim.validate_every": None, "optim.keep_best": False, "model.quantization": None,
                  "open_ended.judge": {}, "trackers": []}
        _refuse_own_code(checkpoint, source, wanted)
    elif wanted.tasks:
        given["data.tasks"] = wanted.tasks
    for key, value in given.items():
        if value is not None or source.raw and key.startswith(("optim", "model.q")):
            recipes.assign(raw, key, value)
    recipe = recipes.parse(recipes.override(raw, wanted.overrides), checkpoint)
    if source.raw or wanted.data or recipe.data.root != ".":
        return recipe
    if not (recipe.general.data or recipe.open_ended.prompts):
        raise Fault(f"{checkpoint} carries no recipe, so there is nothing to score it on; give the tasks' folder with --data, "
                    f"or files for general ability with --general")
    return _without_tasks(recipe)


def _refuse_own_code(checkpoint: str, source: Source, wanted: Wanted) -> None:
    """Raises Fault where the recipe that the checkpoint carries names the checkpoint itself as the folder of general-ability
    tasks: the harness's task files can run code."""
    data = (source.raw.get("general") or {}).get("data")
    given = wanted.general or any(key == "general.data" for key, _ in recipes.split_overrides(wanted.overrides))
    if given or data in (None, "mini", "hub"):
        return
    folder = source.run.path if source.run else source.adapter or Path(source.model).expanduser()
    if Path(os.path.expanduser(os.path.expandvars(data))).resolve().is_relative_to(folder.resolve()):
        raise Fault(f"general.data: the recipe that {checkpoint} carries names '{data}', a folder of the checkpoint itself, whose "
                    f"task files can run code; look at them and give it with --general, or give general.data=null")


def _without_tasks(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tasks": [], "root": "."}),
                                     "method": recipes.METHODS["none"].Config()})


def _built(setup: Setup, adapter: Path | None) -> PreTrainedModel:
    """The model of the folder; with an adapter merged in float32 and cast once."""
    attention = setup.recipe.model.attention
    if adapter is None:
        return models.load(setup.base, setup.dtype, attention)
    from peft import PeftModel

    model = PeftModel.from_pretrained(models.load(setup.base, torch.float32, attention), str(adapter))
    return model.merge_and_unload().to(setup.dtype).requires_grad_(False)


def _positions(recipe: Recipe, index: int, names: list[str] | None) -> list[int]:
    """Which tasks to score: those named, or those that the run scored after task `index`."""
    if names is not None:
        return [recipe.tasks.index(name) for name in names]
    count = index + 1 if index >= 0 and recipe.eval.tasks == "seen" else len(recipe.tasks)
    return list(range(count))


def _manifest(checkpoint: str, setup: Setup, source: Source, base: Setup | None) -> dict:
    recipe = setup.recipe.model_dump(mode="json")
    if setup.suite:
        recipe["general"]["tasks"] = list(setup.suite)
    packages = ["torch", "transformers", "accelerate", *["lm_eval"] * bool(setup.suite)]
    return {"checkpoint": checkpoint, "after": source.after, "base": models.fingerprint(setup.base),
            "adapter": file_sha256(source.adapter / "adapter_model.safetensors") if source.adapter else None,
            "updates": source.run.archive().lineage[-1] if source.run else None,
            "compared": base and models.fingerprint(base.base), "recipe": recipe, "metrics": setup.metrics,
            "data": setup.stream.hashes(), "codyra_llm": __version__, **{name: version(name) for name in packages},
            "dtype": str(setup.dtype),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def _claim(out: RunFolder, manifest: dict) -> None:
    """Begin the folder, or go on in it: with the same weights and the same way of scoring, on more tasks if asked."""
    out.clear_up()
    file = out.path / "manifest.json"
    if file.is_file():
        was = out.manifest
        before, now = (_compared(m) for m in (was, manifest))
        if faults := [f"{out.path} was begun with {key} {before[key]!r}, now it is {now[key]!r}; give another --out, or remove "
                      f"the folder" for key in sorted(before.keys() & now.keys()) if before[key] != now[key]]:
            raise Fault(*faults)
    out.write_manifest(manifest)


def _compared(manifest: dict) -> dict[str, Any]:
    """What may not change in a folder: weights, data, metrics, and every setting that could change a score."""
    free = (*NO_RESULT, "data.tasks", "data.root", "data.epochs", "general.tasks", "general.when", "model.path")
    settings = {key: value for key, value in flat(manifest["recipe"]).items()
                if key not in free and not key.startswith(("optim.", "data.epochs."))
                and not (key.startswith("general.") and manifest["recipe"]["general"]["data"] is None)
                and not (key.startswith("open_ended.") and manifest["recipe"]["open_ended"]["prompts"] is None)}
    base = {"compared": manifest["compared"]} if manifest["compared"] else {}
    scored = {f"{kind} of {name}": value for kind in ("data", "metrics") for name, value in manifest.get(kind, {}).items()}
    return {key: manifest[key] for key in ("after", "base", "adapter", "updates")} | base | settings | scored


def _finish(checkpoint: str, setup: Setup, out: RunFolder, known: dict, had: int) -> None:
    """summary.json, and where something was scored the tasks' scores in the layout of lm-eval's result files."""
    rows = out.scores
    own = [row for row in rows if row["step"] == known["step"] and row["after"] == known["after"]]
    scored = {row["task"]: {"metric": row["headline"], **row["metrics"][row["headline"]]} for row in own
              if row["kind"] == "task"}
    general: dict[str, dict] = {}
    for row in rows:
        if row["kind"] == "general":
            general.setdefault(row["task"], {})["after" if row in own else "before"] = row["score"]
    write_json(out.path / "summary.json", {
        "checkpoint": checkpoint, **known, "tasks": scored, "general": general, "delta_r": delta_r(general),
        "open_ended": judged.summarise(setup.recipe, out),
        "mean": fmean(score["mean"] for score in scored.values()) if scored else None})
    if scored and len(rows) > had:
        stamp = datetime.now().isoformat().replace(":", "-")
        write_json(out.path / "lm_eval" / f"{known['step']:02d}-{known['after']}" / f"results_{stamp}.json",
                   lm_eval_layout(checkpoint, setup, [row for row in own if row["kind"] == "task"]))
    console.print(f"evaluation: {out.path}")

"""`codyra-llm evaluate`: score a checkpoint that exists, as a run scores its own, without training."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from codyra_llm.checkpoints.lm_eval_layout import lm_eval_layout
from codyra_llm.checkpoints.source import Source, Wanted, recipe_of, taken_apart, without_tasks
from codyra_llm.config.benchmark import digest
from codyra_llm.config.differences import NO_RESULT, PLACES, flat
from codyra_llm.config.recipe import Recipe
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import await_file, file_sha256, write_json
from codyra_llm.core.version import __version__
from codyra_llm.evaluate import judge
from codyra_llm.experiment import open_ended
from codyra_llm.experiment.preflight import preflight
from codyra_llm.experiment.scoring import measure
from codyra_llm.experiment.setup import Setup, prepare
from codyra_llm.formats.adapter import build
from codyra_llm.models import loading
from codyra_llm.models.weights import fingerprint
from codyra_llm.report import judged
from codyra_llm.report.summary import delta_r
from codyra_llm.runtime import display, heartbeat, launch, precision
from codyra_llm.runtime.display import console
from codyra_llm.runtime.launch import collectively, of_first
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.lock import Lease


@dataclass
class Checkpoint(Setup):
    """A setup whose model is given, instead of made from the base as in a run."""

    build: Callable[[], PreTrainedModel]

    def model(self, archive, after, without=None) -> PreTrainedModel:
        return self.build()


def evaluate(checkpoint: str, wanted: Wanted) -> RunFolder:
    """Score `checkpoint` (folder, hub id, .gguf, PEFT folder, RUN, RUN@TASK) into `wanted.out`, as far as it
    isn't yet.

    A checkpoint that a run made is scored as the run did, by the recipe that it carries. Raises one Fault
    with everything that is wrong, before any weights load.
    """
    acc = launch.accelerator()
    first = acc.is_local_main_process  # what is converted on first use is made once on each node
    fast = precision.agreed(acc)
    prepared = collectively(first, _prepare, checkpoint, wanted, fast)
    setup, source, index, base = collectively(not first, _prepare, checkpoint, wanted, fast) or prepared
    if base and setup.prompts:
        collectively(acc.is_main_process, judge.require, setup.recipe.open_ended.judge)
    if acc.num_processes > 1:
        heartbeat.start(acc.process_index, acc.num_processes, setup.recipe.hang_minutes)
        preflight(acc, setup, fingerprint(setup.base) if first else None)
    lease = Lease(Path(setup.recipe.output))
    out = RunFolder(lease.folder, lease, acc.is_main_process)
    collectively(acc.is_main_process, lease.take)
    try:
        with display.running(acc.is_main_process), heartbeat.until_stopped():
            _measure(checkpoint, wanted, acc, setup, source, index, base, out)
    finally:
        lease.release()
    heartbeat.leave(0)
    return out


def _measure(
    checkpoint: str,
    wanted: Wanted,
    acc: Accelerator,
    setup: Setup,
    source: Source,
    index: int,
    base: Setup | None,
    out: RunFolder,
) -> None:
    if source.told and acc.is_main_process:
        console.print(source.told, soft_wrap=True)
    collectively(acc.is_main_process, lambda: _claim(out, _manifest(checkpoint, setup, source, base)))
    collectively(True, await_file, out.path / "manifest.json")
    known = {"after": source.after or "checkpoint", "step": index + 1 if source.after else 1}
    had = of_first(len(out.scores) if acc.is_main_process else None)
    if base:
        measure(base, out, acc, -1, {"after": "base", "step": 0}, (), True, out)
        open_ended.answer(base, out, acc, -1, {"after": "base", "step": 0}, out)
    general = (
        bool(wanted.general)
        or index in (-1, len(setup.recipe.tasks) - 1)
        or setup.recipe.general.when == "each"
    )
    measure(
        setup,
        source.run or out,
        acc,
        index,
        known,
        _positions(setup.recipe, index, wanted.tasks),
        general,
        out,
    )
    if base:
        open_ended.answer(setup, source.run or out, acc, index, known, out)
        open_ended.settle(setup, out, acc)
    collectively(acc.is_main_process, lambda: _finish(checkpoint, setup, out, known, had))


def _prepare(
    checkpoint: str, wanted: Wanted, bfloat16: bool | None = None
) -> tuple[Setup, Source, int, Setup | None]:
    """What to score, where it comes from, the position of the task after which (-1: none), and the base if it
    is asked for. `bfloat16`: whether all processes multiply it fast.
    """
    source = taken_apart(checkpoint, wanted)
    recipe = recipe_of(checkpoint, source, wanted)
    setup = prepare(recipe, bool(wanted.base), source.adapter, bfloat16)
    if unknown := [task for task in wanted.tasks or () if task not in setup.recipe.tasks]:
        raise Fault(
            *(
                f"--tasks: '{task}' is not a task of the recipe that {checkpoint} carries."
                f"{nearest(task, setup.recipe.tasks)} Known: {', '.join(setup.recipe.tasks)}"
                for task in unknown
            )
        )
    index = source.run.archive().index(source.after) if source.run else -1
    if not source.run:
        index = setup.recipe.tasks.index(source.after) if source.after else -1
        setup = Checkpoint(**vars(setup), build=lambda: _built(setup, source.adapter))
    if not (wanted.base and (setup.recipe.general.data or setup.prompts)):
        return setup, source, index, None
    plain = prepare(
        without_tasks(
            recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": wanted.base})})
        ),
        bfloat16=bfloat16,
    )
    return setup, source, index, Checkpoint(**vars(plain), build=lambda: _built(plain, None))


def _built(setup: Setup, adapter: Path | None) -> PreTrainedModel:
    """The model of the folder; with an adapter merged in float32 and cast once."""
    attention = setup.recipe.model.attention
    if adapter is None:
        return loading.load(setup.base, setup.dtype, attention)
    return build(setup.base, adapter, setup.dtype, attention)


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
    return {
        "checkpoint": checkpoint,
        "after": source.after,
        "base": fingerprint(setup.base),
        "adapter": file_sha256(source.adapter / "adapter_model.safetensors") if source.adapter else None,
        "updates": source.run.archive().lineage[-1] if source.run else None,
        "compared": base and fingerprint(base.base),
        "recipe": recipe,
        "metrics": setup.metrics,
        "benchmark": digest(setup.recipe.data.benchmark),
        "data": setup.stream.hashes(),
        "plugins": setup.origins,
        "codyra_llm": __version__,
        **{name: version(name) for name in packages},
        "dtype": str(setup.dtype),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _claim(out: RunFolder, manifest: dict) -> None:
    """Begin the folder, or go on in it: with the same weights and the same way of scoring, on more tasks if
    asked.
    """
    out.clear_up()
    out.check_results()
    file = out.path / "manifest.json"
    if file.is_file():
        was = out.manifest
        before, now = (_compared(m) for m in (was, manifest))
        if faults := [
            f"{out.path} was begun with {key} {before[key]!r}, now it is {now[key]!r}; give another --out, "
            "or remove the folder"
            for key in sorted(before.keys() & now.keys())
            if before[key] != now[key]
        ]:
            raise Fault(*faults)
    out.write_manifest(manifest)


def _compared(manifest: dict) -> dict[str, Any]:
    """What must stay the same in a folder: weights, data, metrics, and every setting that could change a
    score.
    """
    free = (*NO_RESULT, *PLACES, "data.tasks", "data.epochs", "general.tasks", "general.when")
    settings = {
        key: value
        for key, value in flat(manifest["recipe"]).items()
        if key not in free
        and not key.startswith(("optim.", "data.epochs."))
        and not (key.startswith("general.") and manifest["recipe"]["general"]["data"] is None)
        and not (key.startswith("open_ended.") and manifest["recipe"]["open_ended"]["prompts"] is None)
    }
    base = {"compared": manifest["compared"]} if manifest["compared"] else {}
    scored = {
        f"{kind} of {name}": value
        for kind in ("data", "metrics")
        for name, value in manifest.get(kind, {}).items()
    }
    scored |= {
        f"file of {name}": origin.get("sha256") for name, origin in manifest.get("plugins", {}).items()
    }
    own = {
        key: manifest[key] for key in ("after", "base", "adapter", "updates", "benchmark") if key in manifest
    }
    return own | base | settings | scored


def _finish(checkpoint: str, setup: Setup, out: RunFolder, known: dict, had: int) -> None:
    """summary.json, and where something was scored the tasks' scores in the layout of lm-eval's result
    files.
    """
    rows = out.scores
    own = [row for row in rows if row["step"] == known["step"] and row["after"] == known["after"]]
    scored = {
        row["task"]: {"metric": row["headline"], **row["metrics"][row["headline"]]}
        for row in own
        if row["kind"] == "task"
    }
    general: dict[str, dict] = {}
    for row in rows:
        if row["kind"] == "general":
            general.setdefault(row["task"], {})["after" if row in own else "before"] = row["score"]
    write_json(
        out.path / "summary.json",
        {
            "checkpoint": checkpoint,
            **known,
            "tasks": scored,
            "general": general,
            "delta_r": delta_r(general),
            "open_ended": judged.summarise(setup.recipe, out),
            "mean": fmean(score["mean"] for score in scored.values()) if scored else None,
        },
    )
    if scored and len(rows) > had:
        stamp = datetime.now().isoformat().replace(":", "-")
        write_json(
            out.path / "lm_eval" / f"{known['step']:02d}-{known['after']}" / f"results_{stamp}.json",
            lm_eval_layout(checkpoint, setup, [row for row in own if row["kind"] == "task"]),
        )
    console.print(f"evaluation: {out.path}")

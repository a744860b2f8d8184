"""`codyra-llm evaluate`: score a checkpoint that exists, as a run scores its own, without training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from codyra_llm.checkpoints.lm_eval_layout import lm_eval_layout
from codyra_llm.checkpoints.source import (
    Source,
    Wanted,
    recipe_of,
    revision_of,
    taken_apart,
    without_tasks,
)
from codyra_llm.config.benchmark import digest
from codyra_llm.config.differences import NO_RESULT, PLACES, flat
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import await_file, file_sha256, write_json
from codyra_llm.core.version import __version__
from codyra_llm.evaluate.matrix import mean
from codyra_llm.evaluate.statistics import delta_r
from codyra_llm.experiment import open_ended
from codyra_llm.experiment.experiment import Experiment
from codyra_llm.experiment.observers import Beats
from codyra_llm.experiment.preflight import preflight, refuse_lacking
from codyra_llm.experiment.scoring import measure
from codyra_llm.experiment.setup import Setup, prepare
from codyra_llm.formats.adapter import build
from codyra_llm.models import fused_norm, loading
from codyra_llm.models.weights import fingerprint
from codyra_llm.report import judged
from codyra_llm.report.summary import before_and_after
from codyra_llm.runtime import heartbeat, launch, precision
from codyra_llm.runtime.launch import by_machine, collectively, is_first, of_first, on_first, on_others, say
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.lock import Lease
from codyra_llm.store.observer import Observer, observing
from codyra_llm.store.rows import BASE, Stage


@dataclass
class Checkpoint(Setup):
    """A setup whose model is given, instead of made from the base as in a run."""

    build: Callable[[], PreTrainedModel]

    def model(self, archive, after, without=None) -> PreTrainedModel:
        return self.build()

    def load_stage(
        self, folder: RunFolder, stage: Stage, device: torch.device
    ) -> tuple[PreTrainedModel, None]:
        """The model itself, whatever the stage is called."""
        model = self.build().to(device).eval()
        fused_norm.use(model)
        return model, None


class Prepared(NamedTuple):
    """What is scored, where it comes from, its stage, and the base where it is asked for."""

    setup: Setup
    source: Source
    stage: Stage
    base: Setup | None


@launch.in_one_thread()
def evaluate(checkpoint: str, wanted: Wanted, observers: Sequence[Observer] = ()) -> RunFolder:
    """Score `checkpoint` (folder, hub id, .gguf, PEFT folder, RUN, RUN@TASK) into `wanted.out`, as far as it
    isn't yet. `observers` are called in the first process.

    A checkpoint that a run made is scored as the run did, by the recipe that it carries. Raises one Fault
    with everything that is wrong, before any weights load.
    """
    acc = launch.accelerator()
    if acc.num_processes > 1:
        heartbeat.start(acc.process_index, acc.num_processes)
    prepared = by_machine(_prepare, checkpoint, wanted, precision.agreed(acc))
    setup = prepared.setup
    collectively(True, refuse_lacking, setup, bool(prepared.base and setup.prompts) and is_first())
    if acc.num_processes > 1:
        hashed = collectively(acc.is_local_main_process, fingerprint, setup.base)
        heartbeat.limit(setup.recipe.hang_minutes)
        preflight(acc, setup, hashed)
    lease = Lease(Path(setup.recipe.output))
    out = RunFolder(lease.folder, lease, is_first())
    on_first(lease.take)
    try:
        on_others(lease.await_token, of_first(lambda: lease.token))
        listening = [Beats(), *(observers if is_first() else ())]
        with observing(setup.recipe.tasks, *listening), heartbeat.until_stopped():
            _measure(checkpoint, wanted, prepared, acc, out)
    finally:
        lease.release()
    heartbeat.leave(0)
    return out


def _measure(checkpoint: str, wanted: Wanted, prepared: Prepared, acc: Accelerator, out: RunFolder) -> None:
    """Score what is not scored yet, and write the summary; called with the lock of `out` held."""
    setup, source, stage, base = prepared
    experiment = Experiment(setup, out, acc, models=source.run or out)
    if source.remark:
        say(source.remark)
    on_first(_begin, checkpoint, prepared, out)
    collectively(True, await_file, out.path / "manifest.json")
    scored_before = of_first(lambda: len(out.scores))
    if base:
        plain, before = Experiment(base, out, acc, models=out), Stage(0, BASE)
        measure(plain, before, (), True)
        open_ended.answer(plain, before)
    measure(experiment, stage, _positions(prepared, wanted.tasks), _asks_general(prepared, wanted))
    if base:
        open_ended.answer(experiment, stage)
        open_ended.settle(experiment)
    on_first(_finish, checkpoint, experiment, stage, scored_before)
    say(f"evaluation: {out.path}")


def _asks_general(prepared: Prepared, wanted: Wanted) -> bool:
    """Whether to measure general ability: where the run did, or the user asks for it."""
    recipe = prepared.setup.recipe
    at_an_end = prepared.source.after is None or prepared.stage.step in (0, len(recipe.tasks))
    return bool(wanted.general) or at_an_end or recipe.general.when == "each"


def _prepare(checkpoint: str, wanted: Wanted, bfloat16: bool | None = None) -> Prepared:
    """Find out what to score. `bfloat16`: whether all processes multiply it fast."""
    source = taken_apart(checkpoint, wanted)
    recipe = recipe_of(checkpoint, source, wanted)
    setup = prepare(recipe, bool(wanted.base), source.adapter, bfloat16, learns=False)
    tasks = setup.recipe.tasks
    faults = [
        f"--tasks: '{task}' is not a task of the recipe that {checkpoint} carries."
        f"{nearest(task, tasks)} Known: {', '.join(tasks)}"
        for task in wanted.tasks or ()
        if task not in tasks
    ]
    if faults:
        raise Fault(*faults)
    stage = Stage(1, "checkpoint")
    if source.run:
        assert source.after is not None, "a run is scored at one of its stages"
        stage = Stage.of(tasks, source.run.archive().index(source.after))
    elif source.after:
        stage = Stage.of(tasks, tasks.index(source.after))
    measured = setup.recipe.general.data or setup.prompts
    if wanted.base and not (source.adapter or measured):
        raise Fault(
            f"--base: {checkpoint} is not a PEFT adapter, and nothing is measured on the base, since neither "
            "general.data nor open_ended.prompts is given; give one of them, or leave --base out"
        )
    scored = setup
    if not source.run:
        scored = Checkpoint(**vars(setup), build=lambda: _built(setup, source.adapter))
    if not (wanted.base and measured):
        return Prepared(scored, source, stage, None)
    named = {"path": wanted.base, "revision": revision_of(wanted.base, source.raw)}
    model = recipe.model.model_copy(update=named)
    alone = without_tasks(recipe.model_copy(update={"model": model}))
    plain = prepare(alone, bfloat16=bfloat16, learns=False)
    return Prepared(scored, source, stage, Checkpoint(**vars(plain), build=lambda: _built(plain, None)))


def _built(setup: Setup, adapter: Path | None) -> PreTrainedModel:
    """The model of the folder; with an adapter merged in float32 and cast once."""
    attention = setup.recipe.model.attention
    if adapter is None:
        return loading.load(setup.base, setup.dtype, attention)
    return build(setup.base, adapter, setup.dtype, attention)


def _positions(prepared: Prepared, names: list[str] | None) -> list[int]:
    """Which tasks to score: those named, or those that the run scored at the stage."""
    recipe, stage = prepared.setup.recipe, prepared.stage
    if names is not None:
        return [recipe.tasks.index(name) for name in dict.fromkeys(names)]
    seen = prepared.source.after is not None and stage.step > 0 and recipe.eval.tasks == "seen"
    return list(range(stage.step if seen else len(recipe.tasks)))


def _manifest(checkpoint: str, setup: Setup, source: Source, base: Setup | None) -> dict:
    """What the scores are made with: hashes of weights, data and plug-ins, the recipe, versions, device."""
    recipe = setup.recipe.model_dump(mode="json")
    if setup.suite:
        recipe["general"]["tasks"] = list(setup.suite)
    packages = ["torch", "transformers", "accelerate"]
    if setup.suite:
        packages.append("lm_eval")
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


def _begin(checkpoint: str, prepared: Prepared, out: RunFolder) -> None:
    """Check what a run's stage is made from, and claim the folder."""
    manifest = _manifest(checkpoint, prepared.setup, prepared.source, prepared.base)
    if prepared.source.run:
        prepared.setup.verify(prepared.source.run, prepared.stage.index, manifest["base"])
    _claim(out, manifest)


def _claim(out: RunFolder, manifest: dict) -> None:
    """Start a new output folder, or continue in one that has the same weights and scoring settings; more
    tasks may be added.
    """
    if out.is_run:
        raise Fault(f"--out: {out.path} is the folder of a run; give another one")
    out.clear_up()
    out.check_results()
    file = out.path / "manifest.json"
    if file.is_file():
        was = out.manifest
        before, now = _compared(was), _compared(manifest)
        faults = [
            f"{out.path} was started with {key} {before[key]!r}, now it is {now[key]!r}; give another --out, "
            "or remove the folder"
            for key in sorted(before.keys() & now.keys())
            if before[key] != now[key]
        ]
        if faults:
            raise Fault(*faults)
    out.write_manifest(manifest)


def _compared(manifest: dict) -> dict[str, Any]:
    """What must not change between commands that share a folder: weights, data, metrics, and every setting
    that could change a score."""
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


def _finish(checkpoint: str, experiment: Experiment, stage: Stage, scored_before: int) -> None:
    """Write summary.json and, if there are more scores than `scored_before`, the tasks' scores in the layout
    of lm-eval's result files."""
    setup, out = experiment.setup, experiment.store
    rows = out.scores
    own = [row for row in rows if row.stage == stage]
    tasks = [row for row in own if not row.general]
    general = before_and_after(rows, lambda row: row.stage == stage)
    scored = {row.task: {"metric": row.headline, **row.interval} for row in tasks}
    summary = {
        "checkpoint": checkpoint,
        "after": stage.after,
        "step": stage.step,
        "tasks": scored,
        "general": general,
        "delta_r": delta_r(general),
        "open_ended": judged.summarise(setup.recipe, out),
        "mean": mean(row.score for row in tasks),
    }
    write_json(out.path / "summary.json", summary)
    if tasks and len(rows) > scored_before:
        stamp = datetime.now().isoformat().replace(":", "-")
        file = out.path / "lm_eval" / stage.folder / f"results_{stamp}.json"
        write_json(file, lm_eval_layout(checkpoint, setup, tasks))

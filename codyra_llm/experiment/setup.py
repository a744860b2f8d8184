"""Turns a recipe into everything that a run needs, and checks it before any weights load; all faults are
reported together."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from codyra_llm.benchmarks.trace.mini.make import BASES, mini_data, mini_model
from codyra_llm.config import idle, plugins
from codyra_llm.config.recipe import Recipe, by_task
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Attempts, Fault
from codyra_llm.core.files import room_faults
from codyra_llm.core.parsing import expanded
from codyra_llm.core.tensors import own_device
from codyra_llm.data.batches import Batch, collate, default_tokens, micro_batches
from codyra_llm.data.encoding import Encoded, Encoder
from codyra_llm.data.records import read_split
from codyra_llm.data.rendering import ByTemplate, Render, plain
from codyra_llm.data.stream import Stream
from codyra_llm.evaluate import suite
from codyra_llm.evaluate.questions import find_questions
from codyra_llm.experiment.inspection import as_presented, prompt_faults, splits, try_metrics, unanswered
from codyra_llm.formats.adapter_files import vocabulary
from codyra_llm.lora.merge import merge
from codyra_llm.lora.proximal import warmup_steps
from codyra_llm.methods import sizes
from codyra_llm.methods.base import Method, Task
from codyra_llm.models import families, fused_norm, loading
from codyra_llm.models.attention import packed_attention
from codyra_llm.models.ends import answer_ends
from codyra_llm.models.tokenizer import chat_faults, load_tokenizer, tokenizer_folder, tokenizer_hash
from codyra_llm.models.weights import WeightReader, fingerprint, formats
from codyra_llm.runtime import precision, signals
from codyra_llm.store import observer
from codyra_llm.store.archive import Archive
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import Stage
from codyra_llm.train.task_data import TaskData

PROBE_TOKENS = 32  # general-ability probes have short answers


@dataclass
class Setup:
    """A resolved recipe and what it names."""

    recipe: Recipe
    method: Method
    base: Path
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    stream: Stream
    probes: dict[str, list[dict]]
    suite: dict[str, suite.Ability]  # general ability by lm-evaluation-harness
    prompts: dict[str, list[str]]  # open-ended, by file

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model trains and is evaluated."""
        return getattr(torch, self.recipe.model.dtype)

    def model(self, archive: Archive, after: int, without: int | None = None) -> PreTrainedModel:
        """The merged model after task `after` (-1: the base), on the CPU. Every model that is trained on or
        evaluated is made here. Updates are summed on the GPU if there is one, as in an export, so that on the
        same kind of device an export equals the evaluated model to the last bit."""
        model = loading.load(self.base, self.dtype, self.recipe.model.attention)
        merge(model, WeightReader(self.base), archive.terms(after, without), own_device())
        return model

    def verify(self, folder: RunFolder, after: int, base: str | None = None) -> None:
        """Raises one Fault where the updates of `folder` were made on other base weights or another tokenizer
        than the recipe's path now holds, or by another version of the method, and where the run has no model
        after task `after`. `base`: the hash of the weights, where it is known already."""
        faults = plugins.changed(folder.origins, self.origins, str(folder.path))
        archive, path = folder.archive(), self.recipe.model.path
        compared = (
            ("base weights", archive.base, base or fingerprint(self.base)),
            ("tokenizer files", folder.manifest.get("tokenizer"), tokenizer_hash(self.base)),
        )
        for what, was, now in compared:
            if was not in (None, now):
                faults.append(
                    f"{folder.path} was made on other {what} ({was[:12]}, now {str(now)[:12]}); restore the "
                    f"model at model.path ({path})"
                )
        if self.method.joint and after >= 0 and archive.is_empty(after):
            faults.append(
                f"{folder.path}: {self.method.name} learns all tasks at the last, so the run has no model "
                f"after {archive.tasks[after]}; choose the last task, or 'base'"
            )
        if faults:
            raise Fault(*faults)

    def load_stage(
        self, folder: RunFolder, stage: Stage, device: torch.device
    ) -> tuple[PreTrainedModel, Callable | None]:
        """The model that answers at `stage` of the run in `folder`, and, for methods that don't merge, the
        function that makes a batch's condition: `(prompts, task) -> Condition`."""
        archive = folder.archive()
        model = self.model(archive, stage.index).to(device).eval()
        fused_norm.use(model)
        if self.method.merges or stage.step == 0:
            return model, None
        state = folder.load_state(stage.index)
        self.method.install(model, self.task(model, archive, stage.index, state))
        model.eval()  # for modules that the method has added
        return model, lambda prompts, task: self.method.condition(
            model, prompts, task if self.method.task_id else None
        )

    def task(self, model: PreTrainedModel, archive: Archive, index: int, state: dict, most: int = 0) -> Task:
        """What the method may use at task `index`; `most`: tokens of a micro-batch, if not the recipe's."""

        def batches(examples: list[Encoded]) -> Iterator[Batch]:
            tokens = most or self.recipe.optim.micro_batch_tokens or default_tokens(model.device)
            packed, pad = packed_attention.used(model), self.tokenizer.pad_token_id
            for chosen in micro_batches([len(e) for e in examples], 1, tokens, packed)[0]:
                signals.check()
                observer.at(f"passes over data of task {self.recipe.tasks[index]}")
                yield collate(examples, chosen, [0.0] * len(chosen), pad, packed).to(model.device)

        own, newline = self.encoder, tuple(self.encoder.newline)
        ends, frame = own.ends, own.chat_frame
        return Task(index, archive, self.stream, own.encode, batches, state, ends, frame, newline)

    def test(self, index: int) -> list[dict]:
        """The records on which task `index` is scored."""
        return self.stream.records(index, self.recipe.eval.split)[: self.recipe.eval.max_examples]

    def new_tokens(self, index: int) -> int:
        """How many tokens an answer of task `index` may have."""
        return by_task(self.recipe.eval.max_new_tokens, self.recipe.tasks[index])

    @property
    def metrics(self) -> dict[str, list[str]]:
        """By task the metric of the score matrix, and all that are reported."""
        known, protocol = self.stream.benchmark, self.recipe.data.protocol
        return {
            task: [known.headline(task, protocol), *known.task(task).metrics] for task in self.recipe.tasks
        }

    @property
    def origins(self) -> dict[str, plugins.Origin]:
        """Where the method and the metrics that are not shipped come from."""
        names = [name for metrics in self.metrics.values() for name in metrics]
        return plugins.used(self.method.name, names)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer together that are possible in evaluation, at most the
        model's positions: a server refuses to start with more."""
        answers = [self.new_tokens(index) for index in range(len(self.recipe.tasks))]
        if self.prompts:
            answers.append(self.recipe.open_ended.max_new_tokens)
        asked = self.recipe.data.max_prompt_tokens + max(PROBE_TOKENS, *answers)
        positions = getattr(families.text_config(self.base), "max_position_embeddings", None)
        return min(asked, positions or asked)


def prepare(
    recipe: Recipe,
    open_ended: bool = True,
    adapter: Path | None = None,
    bfloat16: bool | None = None,
    runs: bool = True,
    learns: bool = True,
) -> Setup:
    """Resolve the recipe and check model, data, method and disk. `open_ended`: whether its prompts are to be
    answered, so that their files must be there. `adapter`: a folder whose tokenizer and chat template, if it
    has them, are used instead of the base's. `bfloat16`: whether it is fast on all processes; None: this
    process checks. `runs`: whether anything is trained or scored. A finished run, perhaps from another
    machine, can be exported and asked without its data and without a place to write to. `learns`: whether
    what is learnt is written to the output. Raises one Fault with everything that is wrong."""
    recipe, tried = recipe.resolved(), Attempts()
    method = METHODS[recipe.method.name](recipe.method, recipe.seed)
    base = tried(base_folder, recipe.model.path, recipe.model.revision)
    config = tokenizer = added = None
    if base:
        reads = tokenizer_folder(adapter, base)
        added = vocabulary(adapter) if adapter else None
        wrong = loading.check(base, recipe.data.chat_template, reads, added)
        tried.faults += wrong
        if not wrong:
            config = families.text_config(base)
            tried.faults += _fits(recipe, config) + method.check(config, recipe.model.attention)
            if recipe.model.attention:
                tried(loading.try_attention, base, recipe.model.attention)
            recipe = tried(_with_dtype, recipe, base, bfloat16) or recipe
            tokenizer = tried(load_tokenizer, reads)
    root = tried(data_root if runs else root_folder, recipe.data.root)
    render, wrong = _render(recipe, tokenizer)
    tried.faults += wrong
    stream = Stream(recipe.data, root, render)
    embedded = added or (config and config.vocab_size)  # how many tokens have an embedding
    encoder = Encoder(tokenizer, recipe.data, answer_ends(base, tokenizer), embedded) if tokenizer else None
    # Where there is no tokenizer there is a fault, and nobody gets this.
    setup = Setup(recipe, method, base, tokenizer, encoder, stream, {}, {}, {})  # pyright: ignore
    if runs:
        setup.probes, setup.suite = _general(tried, recipe, config)
        setup.prompts = tried(find_questions, recipe.open_ended) if open_ended else {}
        _try_run(tried, setup, config, learns)
    if tried.faults:
        raise Fault(*dict.fromkeys(tried.faults))
    return setup


def _try_run(tried: Attempts, setup: Setup, config: PreTrainedConfig | None, learns: bool) -> None:
    """Check what only training and scoring need: settings that fit together, disk, data, prompts, metrics."""
    recipe, method, stream = setup.recipe, setup.method, setup.stream
    tried.faults += [*_settings_that_exclude(recipe, method), *idle.settings(recipe, BASES)]
    if setup.base:
        # Where something is wrong already, there may be no model to take the size of.
        needed = 0 if tried.faults else sizes.bytes_to_write(recipe, setup.base, method, learns)
        tried.faults += room_faults(Path(recipe.output), needed)
    if stream.root is None:
        return
    _try_data(tried, recipe, method, stream)
    if setup.encoder:
        read = list(splits(recipe, stream, bool(method.trains)))
        presented = tried(as_presented, method, stream, setup.encoder, read) or read
        front = method.prompt_positions(len(recipe.tasks))
        tried.faults += tried(prompt_faults, recipe, presented, setup.encoder, config, front) or []
        tried(try_metrics, recipe, read)


def _try_data(tried: Attempts, recipe: Recipe, method: Method, stream: Stream) -> None:
    """Read everything that the run will read, and check that the schedule fits its steps."""
    last = len(recipe.tasks) - 1
    for index in range(len(recipe.tasks)):
        if method.trains or method.old_data:
            visited = tried(method.train_data, stream, index)
            early = method.joint and index < last  # a joint method trains only at the last task
            if visited and method.trains and not early:
                _, epochs = visited
                tried.faults += _warm_up(recipe, index, epochs, method.epochs_apart(stream, index))
        if method.trains and recipe.optim.validate_every:
            tried(stream.records, index, "eval")
        scored = tried(stream.records, index, recipe.eval.split) or []
        tried.faults += unanswered(recipe, index, scored)


def _general(
    tried: Attempts, recipe: Recipe, config: PreTrainedConfig | None
) -> tuple[dict[str, list[dict]], dict[str, suite.Ability]]:
    """What measures general ability, by name: mini-TRACE's own questions, and tasks of the harness."""
    general = recipe.general
    probes = _probes() if general.data == "mini" else {}
    harness = {}
    if general.data not in (None, "mini"):
        harness = tried(suite.find, general) or {}
    for ability in harness.values():
        tried(ability.try_out, getattr(config, "max_position_embeddings", None))
    tried.faults += _shared_names(recipe, {*harness, *probes})
    return probes, harness


def _settings_that_exclude(recipe: Recipe, method: Method) -> list[str]:
    """Settings of other sections that the method, or what is installed, does not support."""
    faults = []
    if recipe.model.quantization and not find_spec("bitsandbytes"):
        faults.append(
            f"model.quantization: '{recipe.model.quantization}' needs bitsandbytes, which is not installed; "
            f"install codyra-llm[bitsandbytes], or set it to null"
        )
    whole = method.archives_weights
    if whole and recipe.model.quantization:
        faults.append(
            f"model.quantization: '{recipe.model.quantization}' packs weights that stay frozen, and "
            f"{method.name} trains {method.trains}; set it to null"
        )
    if whole and recipe.optim.keep_best:
        faults.append(
            f"optim.keep_best: it keeps a second copy of all that trains, and {method.name} trains "
            f"{method.trains}; set it to false"
        )
    if method.shrinks and recipe.optim.keep_best:
        faults.append(
            f"optim.keep_best: {method.name} drives ranks to zero until its last step, and an earlier one "
            "would have them all; set it to false"
        )
    if method.averages and recipe.optim.keep_best:
        faults.append(
            f"optim.keep_best: {method.name} leaves an average over a task's steps, and none of them is "
            "kept; set it to false"
        )
    if recipe.data.batching == "packed" and not method.packs:
        faults.append(
            f"data.batching: method {method.name} needs every example in a row of its own, so they can't be "
            f"packed; use buckets"
        )
    if recipe.eval.backend == "vllm" and not method.merges:
        faults.append(
            f"eval.backend: vllm runs plain models, and a {method.name} model is none; set it to torch"
        )
    return faults


def _shared_names(recipe: Recipe, general: set[str]) -> list[str]:
    """Faults: tasks of the stream that are named like one of general ability."""
    return [
        f"data.tasks: '{name}' is a task of general ability too, and their scores would be taken for each "
        "other; rename it, or leave that one out of general.tasks"
        for name in recipe.tasks
        if name in general
    ]


def _render(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Render, list[str]]:
    """The function that writes chats, i.e. records with `messages`, of the tasks and of a general set, and
    the faults found with it."""
    general = getattr(recipe.method, "general", None)
    specs = {name: recipe.benchmark.task(name) for name in (*recipe.tasks, general) if name}
    chats = ", ".join(name for name, spec in specs.items() if spec.chat)
    every = [name for name, spec in specs.items() if spec.train_on == "assistant"]
    if not (chats and tokenizer):
        return plain, []
    if not tokenizer.chat_template:
        return plain, [
            f"model.path: {recipe.model.path} has no chat template to write the messages of {chats} with; "
            f"choose a chat model, or give columns"
        ]
    faults = chat_faults(Path(recipe.model.path), tokenizer)
    if faults:
        return plain, faults
    if every and not tokenizer.is_fast:
        return plain, [
            f"tasks.{every[0]}.train_on: the tokenizer of {recipe.model.path} does not say where its tokens "
            "stand in a text, so turns inside a chat can't be marked; set it to last, or choose another model"
        ]
    if recipe.data.chat_template:
        faults = [
            f"data.chat_template: the chats of {chats} are written by the template already, and their "
            "prompts would be once more; set it to false"
        ]
    return ByTemplate(tokenizer), faults


def _warm_up(recipe: Recipe, index: int, epochs: list[range], apart: int) -> list[str]:
    """Check that warm-up leaves some steps of every learning-rate schedule in the task."""
    asked, size = recipe.optim.warmup, recipe.optim.batch_size
    assert size is not None, "resolved() fills in the protocol's"
    whole = TaskData(recipe.tasks[index], index, [], epochs, [], apart)
    shortest = min(whole.phase(step, size)[1] for step in (0, whole.steps(size) - 1))
    if warmup_steps(asked, shortest) < shortest:
        return []
    return [
        f"optim.warmup: {asked:g} leaves none of the {shortest} steps of {recipe.tasks[index]} to the "
        "schedule; lower it, or give a share of the steps, below 1"
    ]


def _fits(recipe: Recipe, config: PreTrainedConfig) -> list[str]:
    """Faults: a rank, layers or projections that this base model can't have."""
    rank, count = getattr(recipe.method, "rank", 0), config.num_hidden_layers
    faults = []
    if rank > config.hidden_size:
        faults.append(
            f"method.rank: {rank} is more than the hidden size of the model, {config.hidden_size}, and no "
            "update of its weights can have a higher rank; lower it"
        )
    past = [layer for layer in getattr(recipe.method, "layers", None) or () if layer >= count]
    if past:
        faults.append(
            f"method.layers: {', '.join(map(str, past))} is past the model's last layer, {count - 1} (they "
            "are counted from 0); leave it out"
        )
    family = families.of(config)
    missing = [name for name in getattr(recipe.method, "targets", ()) if name not in family.projections]
    if missing:
        faults.append(
            f"method.targets: {', '.join(missing)} are not projections of {family.title}; choose from "
            f"{', '.join(family.projections)}"
        )
    return faults


def base_folder(path: str, revision: str | None = None) -> Path:
    """The folder of the base model that `path` names: one of mini-TRACE's, a folder, a file or a hub id."""
    if path in BASES:
        return mini_model(path)
    return loading.resolve(path, revision)


def _with_dtype(recipe: Recipe, base: Path, bfloat16: bool | None) -> Recipe:
    """The recipe with `model.dtype` chosen where it is auto: the one that the run started with, if it has;
    float32 on a CPU for a base in float32; otherwise bfloat16 if this machine has fast bfloat16, else
    float32."""
    if recipe.model.dtype != "auto":
        return recipe
    name = _dtype_of_run(Path(recipe.output)) or _fitting_dtype(base, bfloat16)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": name})})


def _dtype_of_run(output: Path) -> str | None:
    """The dtype that the run or evaluation in `output` began with, if there is one."""
    if not (output / "manifest.json").is_file():
        return None
    name = str(RunFolder(output).manifest.get("dtype")).removeprefix("torch.")
    return name if name in ("float32", "bfloat16") else None


def _fitting_dtype(base: Path, bfloat16: bool | None) -> str:
    """The dtype for a run that begins on this machine."""
    if own_device().type == "cpu" and "F32" in formats(base):
        return "float32"
    fast = precision.multiplies_bfloat16() if bfloat16 is None else bfloat16
    return "bfloat16" if fast else "float32"


def root_folder(root: str) -> Path:
    """The folder of tasks that `root` names; mini-TRACE is made on first use."""
    return mini_data() if root == "mini" else Path(expanded(root))


def data_root(root: str) -> Path:
    """The folder of tasks that `root` names, which must be there."""
    path = root_folder(root)
    if not os.path.isdir(path):
        raise Fault(
            f"data.root: there is no folder '{root}'; give the folder that holds <task>/train.json, "
            f"e.g. .../LLM-CL-Benchmark_500; codyra-llm data get trace gets TRACE"
        )
    return path


def _probes() -> dict[str, list[dict]]:
    """mini-TRACE's own questions of general ability, by name."""
    folder = mini_data() / "general"
    names = sorted(file.parent.name for file in folder.glob("*/test.json"))
    return {name: read_split(folder, name, "test") for name in names}

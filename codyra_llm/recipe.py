"""A recipe: the YAML file that describes one run, its schema, its overrides, and all of its faults at once."""

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from . import benchmark, recipes
from .benchmark import Benchmark
from .errors import Fault, nearest
from .evaluate.prompts import OpenEndedSection
from .methods import METHODS, MethodConfig
from .schema import Fraction, NotNegative, Positive, Strict, Tokens, sentences
from .untrusted import PathText, parse_yaml, read_yaml, shown

PROGRAM_KEYS = ("_", "launch")  # the two lines that make a recipe a Python program as well


class ModelSection(Strict):
    """The base model, and how it is computed."""

    path: PathText = Field(description="hub id, folder, .gguf file, or 'mini' (a small LLaMA that is made on first use)")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on a GPU, else float32")
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(None, description="default: sdpa where the "
                                                                            "family has it, else eager (gemma2)")
    quantization: Literal["nf4", "int8"] | None = Field(None, description="train on a base whose projections lie in 4 or "
                                                        "8 bits (bitsandbytes); evaluation and export don't")
    gradient_checkpointing: bool = Field(False, description="compute each block again in backward, which saves memory "
                                         "and takes time")
    fused: bool = Field(True, description="the hand-written LoRA functions; false: the same maths in plain autograd")


class DataSection(Strict):
    """The tasks, their order and how much of each is read."""

    benchmark: PathText = Field("trace", description="trace, or a folder with a benchmark.yaml (docs/own_data.md)")
    root: PathText | None = Field(None, description="folder that holds <task>/{train,eval,test}.json, or 'mini' (made on first "
                                                    "use); default: the benchmark's, where that is a folder of one's own")
    protocol: str | None = Field(None, description="whose lengths, epochs, batch size, schedule, loss average and accuracy rule "
                                                   "fill what is not given; of trace: trace or treelora; default: the first")
    tasks: list[str] | int = Field(1, description="names in order, or the number of one of the benchmark's orders")
    epochs: int | dict[str, int] | None = Field(None, description="1 to 1000, for all tasks, or by task; default: each "
                                                "task's own (docs/trace_protocol.md), 1 for tasks that are not the benchmark's")
    max_prompt_tokens: Tokens | None = Field(None, ge=8, description="BOS included; what is longer is cut")
    max_answer_tokens: Tokens | None = Field(None, ge=2, description="of a training answer, EOS included")
    truncation: Literal["left", "middle"] = Field("left", description="which part of a long prompt goes; left: TRACE")
    chat_template: bool = Field(False, description="put every prompt into the tokenizer's chat template; TRACE does not")
    max_train_examples: int | None = Field(None, ge=1, description="first N of each task")
    batching: Literal["auto", "buckets", "packed"] = Field("auto", description="buckets: rows of similar length, "
                                                           "padded; packed: one row without padding; auto: packed where a GPU "
                                                           "has a kernel for it. Does not change the result")

    @model_validator(mode="after")
    def _trace_is_elsewhere(self) -> "DataSection":
        if self.root is None and self.benchmark == benchmark.TRACE:
            raise ValueError("'root' is missing; add it: the folder that holds TRACE's tasks, or mini")
        return self


class OptimSection(Strict):
    """AdamW on each task; its moments start anew there unless the method carries them over."""

    lr: Positive | None = Field(None, description="learning rate")
    schedule: Literal["constant", "cosine"] | None = Field(None, description="of the learning rate within a task; cosine "
                                                           "ends at 0; no warm-up")
    batch_size: Tokens | None = Field(None, ge=1, description="examples per optimizer step, over all ranks")
    loss_average: Literal["token", "sample"] | None = Field(None, description="over all labelled tokens of the global "
                                                            "batch, or the mean of each example's mean")
    betas: tuple[Fraction, Fraction] | None = Field(None, description="AdamW's")
    weight_decay: NotNegative = Field(0.0, description="AdamW's, times the learning rate")
    max_grad_norm: Positive = Field(1.0, description="the gradient of all that trains is scaled down to this norm")
    micro_batch_tokens: Tokens | None = Field(None, ge=16, description="tokens per forward and rank, padding "
                                           "included; default 4096 on a CPU, 16384 on a GPU; halved where memory runs "
                                           "out. Does not change the result")
    validate_every: int | None = Field(None, ge=1, description="steps between losses on the eval split; default never")
    keep_best: bool = Field(False, description="end each task at the step with the lowest eval loss")

    @model_validator(mode="after")
    def _best_needs_validation(self) -> "OptimSection":
        if self.keep_best and not self.validate_every:
            raise ValueError("'keep_best' needs 'validate_every'; give the steps between validations")
        return self


class EvalSection(Strict):
    """The answers that are scored after each task; greedy."""

    tasks: Literal["seen", "all"] = Field("seen", description="all: unseen tasks too")
    zero_shot: bool = Field(False, description="also evaluate before the first task")
    split: Literal["test", "eval"] = Field("test", description="which examples; eval: for choosing settings")
    max_new_tokens: int | dict[str, int] | None = Field(None, description="1 to 2^20, for all tasks, or by task")
    max_examples: int | None = Field(None, ge=1, description="first N of each task")
    backend: Literal["torch", "vllm"] = Field("torch", description="vllm: an optional package, on one GPU of the first "
                                              "process")
    batch_tokens: Tokens | None = Field(None, ge=16, description="tokens (prompt and answer) that torch decodes at once; "
                                     "default 4096 on a CPU, 131072 on a GPU")


class GeneralSection(Strict):
    """What the model can do beside the tasks."""

    data: PathText | None = Field(None, description="mini: mini-TRACE's probes; hub: lm-evaluation-harness's own tasks; a "
                                               "folder: task YAMLs on local files, as docs/evaluation.md says; null: no "
                                               "measurement")
    tasks: list[str] | None = Field(None, min_length=1, description="names; default: all of the hub's suite, or all whose "
                                                                    "files are in the folder")
    limit: int | None = Field(None, ge=1, description="examples of each task, drawn by the seed, for a quick look")
    seed: int = Field(0, ge=0, lt=1 << 32, description="which examples `limit` draws; apart from the run's, so that all "
                      "runs answer the same ones")
    when: Literal["ends", "each"] = Field("ends", description="ends: before the first task and after the last; each: "
                                                              "after every task too")

    @model_validator(mode="after")
    def _mini_is_whole(self) -> "GeneralSection":
        if self.data == "mini" and (self.tasks or self.limit):
            raise ValueError("'tasks' and 'limit' are for hub and folders, mini has four small probes; leave them out")
        return self


class SaveSection(Strict):
    """Checkpoints inside a task, which a run that was stopped goes on from."""

    minutes: Positive | None = Field(10.0, description="between checkpoints inside a task; null: only when asked to stop")
    keep: int = Field(1, ge=1, description="checkpoints inside a task that stay")


class Recipe(Strict):
    """One run. Fields left at null are filled from the protocol by `resolved`."""

    model: ModelSection
    data: DataSection
    method: SerializeAsAny[MethodConfig]
    optim: OptimSection = OptimSection()
    eval: EvalSection = EvalSection()
    general: GeneralSection = GeneralSection()
    open_ended: OpenEndedSection = OpenEndedSection()
    save: SaveSection = SaveSection()
    seed: int = Field(1234, ge=0, lt=1 << 32, description="of the order of examples, adapters' start, dropout and draws")
    output: PathText = Field(description="run folder")
    hang_minutes: Positive = Field(30.0, description="a launch of several processes in which nothing moves for so long ends")
    trackers: list[str] = Field([], description="that Accelerate knows, which get losses and scores as they are written: "
                                                "tensorboard, wandb, trackio, mlflow, aim, ...; Accelerate says which")
    checkpoint: bool = Field(True, description="write the final merged model to <output>/checkpoint")

    @property
    def benchmark(self) -> Benchmark:
        """Read from its folder. Raises Fault where there is none, or a faulty one."""
        return benchmark.load(self.data.benchmark)

    @property
    def tasks(self) -> list[str]:
        return list(self.benchmark.orders[self.data.tasks]) if isinstance(self.data.tasks, int) else self.data.tasks

    @property
    def epochs(self) -> list[int]:
        return [by_task(self.data.epochs, task) for task in self.tasks]

    @model_validator(mode="after")
    def _names_are_consistent(self) -> "Recipe":
        # A finished run's recipe names its tasks, and is read without its benchmark where that is a folder.
        if isinstance(self.data.tasks, int) or self.data.benchmark == benchmark.TRACE:
            try:
                missing = self.benchmark.lacks(self.data)
            except Fault as fault:
                missing = fault.messages
            if missing:
                raise ValueError("\n".join(missing))
        tasks, faults = self.tasks, []
        if not tasks or len(set(tasks)) < len(tasks):
            faults.append(f"data.tasks: {tasks} must name at least one task, and each once")
        for key, value, most in (("data.epochs", self.data.epochs, 1000),
                                 ("eval.max_new_tokens", self.eval.max_new_tokens, 1 << 20)):
            if isinstance(value, dict):
                faults += [f"{key}: '{name}' is not a task of this recipe.{nearest(name, tasks)}"
                           for name in value if name not in tasks]
            numbers = value.values() if isinstance(value, dict) else [value]
            faults += [f"{key}: {n} must be at least 1, and at most {most:,d}" for n in numbers
                       if n is not None and not 1 <= n <= most]
        faults += [f"data.tasks: {shown(name)} becomes a file name; leave out '/', control characters and a '.' in front"
                   for name in tasks if not re.fullmatch(r"[^/\\.\x00-\x1f][^/\\\x00-\x1f]{0,99}", name)]
        faults += ["data.tasks: 'base' is the name of the stage before all tasks; rename it"] * ("base" in tasks)
        faults += [f"data.tasks: there are {len(tasks)}, and files of a run are numbered up to 99; leave some out"] * (len(tasks) > 100)
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def resolved(self) -> "Recipe":
        """The same recipe with every null that the benchmark knows filled in; valid, and equal to itself resolved. Raises
        Fault for names that the benchmark has not."""
        known = self.benchmark
        if missing := known.lacks(self.data):
            raise Fault(*missing)
        name = self.data.protocol or next(iter(known.protocols))
        protocol, root = known.protocols[name], self.data.root or str(benchmark.place(self.data.benchmark))
        given = self.data.epochs if isinstance(self.data.epochs, dict) else {}
        epochs = self.data.epochs if isinstance(self.data.epochs, int) else {
            t: given.get(t, known.task(t).epochs) for t in self.tasks}
        limit = self.eval.max_new_tokens
        limits = limit if isinstance(limit, int) else {
            t: (limit or {}).get(t, known.task(t).max_new_tokens or protocol.max_new_tokens) for t in self.tasks}
        return self.model_copy(update={
            "data": _filled(self.data, protocol, root=root, protocol=name, tasks=self.tasks, epochs=epochs),
            "optim": _filled(self.optim, protocol), "eval": _filled(self.eval, protocol, max_new_tokens=limits)})


def by_task(value: int | dict[str, int], task: str) -> int:
    """The value for one task of a setting that is one number or a number by task."""
    return value if isinstance(value, int) else value[task]


def _filled(section: BaseModel, protocol: Any, /, **known: Any) -> BaseModel:
    missing = {key: getattr(protocol, key) for key, value in section if value is None and hasattr(protocol, key)}
    return section.model_copy(update={**missing, **known})


def load(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a recipe, apply `a.b=value` overrides, validate. Raises one Fault with every mistake."""
    return parse(override(read(path), overrides), str(path))


def read(path: str | Path) -> dict:
    """The recipe file at `path`, or the shipped one of that name, as a mapping."""
    raw = read_yaml(find(path), "a recipe, such as recipes/quickstart.yaml")
    return {key: value for key, value in raw.items() if key not in PROGRAM_KEYS}


def find(path: str | Path) -> Path:
    """The recipe file at `path`, or the shipped recipe of that name."""
    shipped = Path(recipes.__path__[0])
    for candidate in (Path(path), shipped / Path(path).name, shipped / f"{path}.yaml"):
        if os.path.isfile(candidate):
            return candidate
    names = sorted(p.name for p in shipped.glob("*.yaml"))
    if os.path.isdir(path):
        raise Fault(f"'{path}' is a folder, not a recipe; give a YAML file. Shipped: {', '.join(names)}")
    raise Fault(f"there is no recipe '{path}'.{nearest(Path(path).name, names)} Shipped: {', '.join(names)}")


def override(raw: dict, overrides: list[str]) -> dict:
    """Apply `a.b=value` (value in YAML), in order. `method=NAME` starts the method's section afresh."""
    for key, value in split_overrides(overrides):
        assign(raw, key, value)
    return raw


def split_overrides(overrides: list[str]) -> list[tuple[str, Any]]:
    """Keys and values of `a.b=value` texts. Raises one Fault with all that are none."""
    faults = [f"'{item}' is not an override; write key=value, e.g. optim.lr=1e-4" for item in overrides
              if "=" not in item]
    pairs = []
    for key, _, text in (item.partition("=") for item in overrides if "=" in item):
        try:
            pairs.append((key.removeprefix("--"), parse_yaml(text, f"override {shown(key)}")))
        except Fault as fault:
            faults += fault.messages
    if faults:
        raise Fault(*faults)
    return pairs


def assign(raw: dict, key: str, value: Any) -> None:
    """Set `a.b` of a recipe's mapping."""
    *path, last = key.split(".")
    if not all([*path, last]) or len(path) > 8:
        raise Fault(f"{shown(key)} is not the key of a setting; write its sections joined by dots, e.g. optim.lr")
    node = raw
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise Fault(f"{key}: '{part}' is a value, not a section; override '{part}' itself")
    node[last] = {"name": value} if key == "method" and isinstance(value, str) else value


def parse(raw: dict, source: str = "recipe") -> Recipe:
    """A validated recipe from a mapping; every mistake of every section in one Fault."""
    faults, method = [], raw.get("method")
    if isinstance(method, str):
        method = {"name": method}
    config = METHODS["seqlora"].Config()  # stands in while the rest is validated
    if not isinstance(method, dict) or method.get("name") not in list(METHODS):  # any YAML
        name = method.get("name") if isinstance(method, dict) else method
        faults.append(f"method.name: {shown(name)} is not a method.{nearest(str(name)[:100], METHODS)} "
                      f"Known: {', '.join(METHODS)}")
    else:
        try:
            config = METHODS[method["name"]].Config.model_validate(method)
        except ValidationError as error:
            faults += sentences(error, METHODS[method["name"]].Config, ("method",))
    try:
        recipe = Recipe.model_validate({**raw, "method": config})
    except ValidationError as error:
        faults += sentences(error, Recipe)
    if faults:
        raise Fault(*(f"{source}: {fault}" for fault in faults))
    return recipe

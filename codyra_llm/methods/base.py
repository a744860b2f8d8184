"""The interface of all methods. The default of every hook is sequential LoRA; a method overrides only what differs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from ..lora.archive import Adapter, Archive, Update
from ..lora.layer import AdapterSpec, attach, sites
from ..models import PROJECTIONS
from ..seeds import generator

if TYPE_CHECKING:
    from ..data import Batch, Encoded, Stream
    from ..gradients import Gradients

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Strict(BaseModel):
    """A section of a recipe: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MethodConfig(Strict):
    """What every method has: its name."""

    name: str


class LoraConfig(MethodConfig):
    """The adapter of a LoRA method."""

    rank: int = Field(16, ge=1, description="rank r of every adapter")
    targets: list[str] = Field(list(PROJECTIONS), min_length=1, description="projections that get an adapter")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    @field_validator("targets")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        if unknown := [name for name in value if name not in PROJECTIONS]:
            raise ValueError(f"unknown projections {unknown}; choose from {', '.join(PROJECTIONS)}")
        if len(set(value)) < len(value):
            raise ValueError("a projection is named twice")
        return value


@dataclass(frozen=True)
class Task:
    """What a method may use when task `index` begins and ends."""

    index: int
    archive: Archive
    stream: "Stream"
    encode: Callable[[list[dict]], list["Encoded"]]
    batches: Callable[[list["Encoded"]], Iterator["Batch"]]  # all of them in micro-batches, on every rank alike
    state: dict[str, Tensor]  # what `end_task` of the task before returned

    def records(self, past: int | None = None) -> list[dict]:
        """Training records of an earlier task, or of this one."""
        return self.stream.records(self.index if past is None else past, "train")

    def sample(self, count: int, seed: int, past: int | None = None) -> list["Encoded"]:
        """`count` of these records, or all there are, drawn by (seed, task) alone: the same whenever asked for."""
        records = self.records(past)
        draw = generator("sample", seed, self.index if past is None else past)
        return self.encode([records[i] for i in torch.randperm(len(records), generator=draw)[:count].tolist()])


class Method:
    """Sequential LoRA with a fresh adapter per task, merged after it. The class attributes are what
    `codyra-llm methods` lists; the contract tests hold them against what the method does."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    trains: ClassVar[str] = "adapters"  # "" for nothing
    old_data: ClassVar[bool] = False  # reads earlier tasks' training examples
    task_id: ClassVar[bool] = False  # has to be told at test which task an example is of
    merges: ClassVar[bool] = True  # is a plain model after every task
    grows: ClassVar[bool] = False  # keeps more with every task than the archive of updates
    max_zero_stage: ClassVar[int] = 3
    mode: ClassVar[Literal["add", "replace"]] = "add"
    carries_optimizer: ClassVar[bool] = False

    def __init__(self, config: MethodConfig, seed: int):
        self.config, self.seed = config, seed

    def spec(self) -> AdapterSpec:
        """The adapter at every site."""
        raise TypeError(f"{self.name} has no adapter")

    def attach(self, model: nn.Module) -> None:
        """Put in what trains; called on a fresh model at the start of every task."""
        attach(model, self.config.targets, self.spec())

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Set the start of a task. No engine lives yet: weights may be written, passes over data may be made."""
        for name, layer in sites(model).items():
            layer.reset(self.seed, task.index, name)

    def param_groups(self, model: nn.Module, lr: float) -> list[dict]:
        """What trains, at which learning rate."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]

    def train_data(self, stream: "Stream", index: int) -> tuple[list[dict], list[range]]:
        """The records of task `index` (and of memory), and for each epoch which of them it visits."""
        records = stream.records(index, "train")
        return records, [range(len(records))] * stream.epochs[index]

    def loss(self, model: nn.Module, batch: "Batch") -> dict[str, Tensor]:
        """Named terms; the loop sums them and logs each. `batch.weights` already carries the global average."""
        return {"loss": batch.cross_entropy(model)}

    def penalty(self, model: nn.Module) -> dict[str, Tensor]:
        """Named terms of the parameters alone; the loop adds them to the loss once per optimizer step."""
        return {}

    def before_step(self, groups: list[dict], step: int, steps: int, schedule: str) -> None:
        """Set what an optimizer group carries for step `step` of `steps`, e.g. a threshold; `schedule` is the rate's."""

    def edit_gradients(self, gradients: "Gradients") -> None:
        """Change the step's gradients, summed over ranks and not yet clipped. Not under ZeRO."""

    def after_step(self, gradients: "Gradients") -> None:
        """Change the parameters behind the optimizer's step. Not under ZeRO."""

    def rewrite(self, step: int, steps: int) -> Callable[[Adapter], Adapter] | None:
        """A function that puts new factors in place of every adapter's before step `step`, or None: leave them."""

    def end_task(self, model: nn.Module, task: Task, gradients: "Gradients") -> dict[str, Tensor]:
        """What later tasks need beside the update, e.g. a Fisher matrix; saved, and given back as `Task.state`."""
        return {}

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """The update that task `index` leaves. No engine lives any more."""
        return Update(adapters, self.spec().scale, self.mode)


@torch.no_grad()
def restore(model: nn.Module, update: Update) -> None:
    """Put the factors of `update` back into the model's adapters, to go on training them."""
    layers = sites(model)
    for site, adapter in update.adapters.items():
        layers[site].lora_A.copy_(adapter.a)
        layers[site].lora_B.copy_(adapter.b)

"""A run in progress: its setup, folders and launch, and the backends that answer prompts at a stage."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator

from codyra_llm.config.recipe import Recipe
from codyra_llm.evaluate.generate import Answer, answers
from codyra_llm.evaluate.vllm import vllm_answers
from codyra_llm.experiment.setup import Setup
from codyra_llm.methods.base import Method
from codyra_llm.models.saved import write_model
from codyra_llm.runtime import launch
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import Stage


@dataclass
class Experiment:
    """A run in progress, or the evaluation of a checkpoint. Every process of the launch has one, with the
    launch's `acc`. Scores and answers go to `store`; models are built from the updates in `models`, which in
    a run is the same folder."""

    setup: Setup
    store: RunFolder
    acc: Accelerator
    models: RunFolder

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.setup.recipe

    @property
    def method(self) -> Method:
        return self.setup.method

    def stage(self, index: int) -> Stage:
        """The stage after task `index`; -1: the base."""
        return Stage.of(self.recipe.tasks, index)

    def answering(self, stage: Stage) -> AbstractContextManager[Callable[..., list[Answer]]]:
        """Within this block the model of `stage` answers: `ask(prompts, new, task)`, `new` tokens at most;
        `task` is the number of the prompts' task, or None."""
        return BACKENDS[self.recipe.eval.backend](self, stage)


@contextmanager
def torch_answering(experiment: Experiment, stage: Stage) -> Iterator[Callable]:
    """The model in this process answers. Each process answers its share, and all get all answers."""
    setup, acc = experiment.setup, experiment.acc
    model, conditions = setup.load_stage(experiment.models, stage, acc.device)

    def ask(texts: Sequence[str], new: int, task: int | None) -> list[Answer]:
        condition = conditions and partial(conditions, task=task)
        return answers(acc, model, setup.encoder, texts, new, setup.recipe.eval.batch_tokens, condition)

    yield ask
    # `ask` refers to them, and its caller may still hold it when the next model loads.
    model = conditions = None


@contextmanager
def vllm_answering(experiment: Experiment, stage: Stage) -> Iterator[Callable]:
    """The merged model answers by vLLM. The first process alone has an engine, on one GPU; the others wait
    for its answers."""
    setup = experiment.setup
    if not launch.is_first():
        yield partial(vllm_answers, None, setup.encoder)
        return
    from vllm import LLM

    with TemporaryDirectory(prefix=".vllm-", dir=setup.recipe.output) as parent:
        merged = str(Path(parent) / "model")
        model = setup.model(experiment.models.archive(), stage.index)
        write_model(model, setup.tokenizer, Path(merged))
        del model
        # vLLM claims a share of the whole GPU's memory, and refuses to start if less is free.
        torch.cuda.empty_cache()
        engine = LLM(
            model=merged,
            tokenizer=merged,
            dtype=str(setup.dtype).removeprefix("torch."),
            seed=setup.recipe.seed,
            max_model_len=setup.longest,
        )
        try:
            yield partial(vllm_answers, engine, setup.encoder)
        finally:
            engine.llm_engine.engine_core.shutdown()  # dropping the object alone leaves its memory claimed


BACKENDS = {"torch": torch_answering, "vllm": vllm_answering}

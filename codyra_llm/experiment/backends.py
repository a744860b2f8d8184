"""What answers prompts: the model in this process, or vLLM on a merged copy."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator

from codyra_llm.evaluate.generate import answers
from codyra_llm.evaluate.vllm import vllm_answers
from codyra_llm.experiment.setup import Setup
from codyra_llm.models.saved import write_model
from codyra_llm.store.folder import RunFolder


@contextmanager
def torch_answering(acc: Accelerator, setup: Setup, folder: RunFolder, after: int) -> Iterator[Callable]:
    """`answers(texts, new, task)` by the model after task `after`; `task` is the number of the texts' task,
    or None.
    """
    model, conditions = setup.stage(folder, after, acc.device)

    def ask(texts: Sequence[str], new: int, task: int | None) -> list[str]:
        return answers(
            acc,
            model,
            setup.encoder,
            texts,
            new,
            setup.recipe.eval.batch_tokens,
            conditions and partial(conditions, task=task),
        )

    yield ask
    model = conditions = None  # else whoever holds `ask` keeps them in memory next to the next model


@contextmanager
def vllm_answering(acc: Accelerator, setup: Setup, folder: RunFolder, after: int) -> Iterator[Callable]:
    """`answers(texts, new, task)` by the merged model after task `after`. The first process alone has an
    engine, on one GPU; the others wait for its answers."""
    if not acc.is_main_process:
        yield partial(vllm_answers, None, setup.encoder)
        return
    from vllm import LLM

    with TemporaryDirectory(prefix=".vllm-", dir=setup.recipe.output) as parent:
        merged = str(Path(parent) / "model")
        write_model(setup.model(folder.archive(), after), setup.tokenizer, Path(merged))
        # VLLM claims a share of the whole GPU's memory and refuses where less is free.
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

"""vLLM as a backend of evaluation: one engine per stage, on the merged model as `export` writes it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data import Encoder
from ..errors import Fault
from ..export import write_merged
from ..folder import RunFolder
from ..setup import Setup


def require() -> None:
    """Fault where vLLM is not installed. Does not import it: that takes seconds and claims the GPU."""
    if find_spec("vllm") is None:
        raise Fault("eval.backend: vllm is not installed; pip install codyra-llm[vllm], or set eval.backend=torch")


@contextmanager
def answering(acc: Accelerator, setup: Setup, folder: RunFolder, after: int) -> Iterator[Callable]:
    """`answers(texts, new, task)` by the merged model after task `after`. The first process alone has an engine, on one GPU;
    the others wait for its answers."""
    if not acc.is_main_process:
        yield partial(answers, None, setup.encoder)
        return
    from vllm import LLM

    with TemporaryDirectory(prefix=".vllm-", dir=setup.recipe.output) as parent:
        merged = str(Path(parent) / "model")
        write_merged(setup, folder.archive(), after, None, Path(merged))
        torch.cuda.empty_cache()  # vLLM claims a share of the whole GPU's memory and refuses where less is free
        engine = LLM(model=merged, tokenizer=merged, dtype=str(setup.dtype).removeprefix("torch."),
                     seed=setup.recipe.seed, max_model_len=setup.longest)
        try:
            yield partial(answers, engine, setup.encoder)
        finally:
            engine.llm_engine.engine_core.shutdown()  # dropping the object alone leaves its memory claimed


def answers(engine: Any | None, encoder: Encoder, texts: Sequence[str], new: int, task: int | None = None) -> list[str]:
    """The engine's answers to prompts, at most `new` tokens each, the same list on every rank.

    Ids go in and out, so prompts are cut and answers decoded as with torch. The tokenizer's EOS alone ends an answer:
    `ignore_eos` leaves out the further ones that a model's generation_config may name.
    """
    found: list[Any] = [None]
    if engine:
        from vllm import SamplingParams

        eos = encoder.tokenizer.eos_token_id
        greedy = SamplingParams(temperature=0, max_tokens=new, stop_token_ids=[eos], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": encoder.prompt(text)[0]} for text in texts]
        ids = [list(made.outputs[0].token_ids) for made in engine.generate(prompts, greedy, use_tqdm=False)]
        found = [encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return broadcast_object_list(found)[0]

"""vLLM as a backend of evaluation: one engine per stage, on the merged model as `export` writes it."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from accelerate.utils import broadcast_object_list

from codyra_llm.core.errors import Fault
from codyra_llm.data.encoding import Encoder
from codyra_llm.evaluate.generate import Answer
from codyra_llm.models.ends import ended
from codyra_llm.runtime import heartbeat


def require() -> None:
    """Raises Fault where vLLM is not installed. Does not import it: that takes seconds and claims the GPU."""
    if find_spec("vllm") is None:
        raise Fault(
            "eval.backend: vllm is not installed; pip install codyra-llm[vllm], or set eval.backend=torch"
        )


def vllm_answers(
    engine: Any | None, encoder: Encoder, texts: Sequence[str], new: int, task: int | None = None
) -> list[Answer]:
    """The engine's answers to prompts, at most `new` tokens each, the same list on every rank.

    Token ids go in and out, so that prompts are cut and answers decoded as with torch. The same tokens end an
    answer: with `ignore_eos` the engine looks for no others than `stop_token_ids`.
    """
    found: list[Any] = [None]
    if engine:
        from vllm import SamplingParams

        greedy = SamplingParams(
            temperature=0,
            max_tokens=new,
            stop_token_ids=sorted(encoder.ends),
            ignore_eos=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids, _ in encoder.prompts(texts)]
        made = [one.outputs[0] for one in engine.generate(prompts, greedy, use_tqdm=False)]
        ids = [list(one.token_ids) for one in made]
        # An end as the very last token that is allowed has the reason "length" too: vLLM looks at that first.
        cut = [one.finish_reason == "length" and not ended(one.token_ids, encoder.ends) for one in made]
        found = [list(map(Answer, encoder.texts(ids), cut))]
    with heartbeat.waiting():
        return broadcast_object_list(found)[0]

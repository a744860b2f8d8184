"""Decoding with recorded steps on a device that is not there: `run_recorded.py`, with the library of
`pretend/hooks.cpp` preloaded. Prints a line of JSON for each model: its name, the fault or null, whether its
answers are those of the CPU, how many steps were replayed, and how many prompts began in another one's place.
"""

import copy
import json
import traceback

import pretended
import pretended_graph
import torch
from fused import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from codyra_llm.evaluate.budget import Budget, Share
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.train.recorded import Recorder

NEW = 24
LENGTHS = (1, 2, 3, 5, 7, 9, 12, 12)
SCALED = {  # kinds of RoPE; the frequencies of the last two follow the longest position
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 16,
    },
    "dynamic": {"factor": 4.0},
}


def models() -> dict[str, PreTrainedConfig]:
    """The configs of all families, and of a LLaMA for each kind of RoPE. Answers go on past position 16,
    where some kinds change their frequencies."""
    found = dict(CONFIGS)
    for kind, settings in SCALED.items():
        config = copy.deepcopy(CONFIGS["llama"])
        config.max_position_embeddings = 16
        config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, **settings}
        found[f"llama, {kind}"] = config
    return found


def decoded(config: PreTrainedConfig) -> dict:
    """What recorded steps of this model answer, against the CPU."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    # Untied and random, so that tokens do not repeat themselves.
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    drawn = torch.Generator().manual_seed(2)
    prompts = [torch.randint(4, 60, (n,), generator=drawn).tolist() for n in LENGTHS]
    expected = generate_ids(model, prompts, NEW, -1)
    ends = [-1]
    if config.max_position_embeddings > 16:  # rows that end leave the batch, which is then recorded again
        ends.append(
            max({t for row in expected for t in row}, key=lambda t: sum(t in row for row in expected))
        )
    on_cpu = [answers(model, prompts, end, set()) for end in ends]
    early: set[int] = set()
    replayed = pretended_graph.replays
    with pretended.Pretending():
        model.to(pretended.DEVICE)
        found = [answers(model, prompts, end, early) for end in ends]
    return {"same": found == on_cpu, "early": len(early), "replays": pretended_graph.replays - replayed}


def answers(model: nn.Module, prompts: list[list[int]], end: int, early: set[int]) -> list[dict]:
    """The answers in one batch, and in two, of which the second's prompts may begin in the first: those are
    added to `early`."""
    found = []
    whole = list(range(len(prompts)))
    for cut in ([whole], [whole[::-2], whole[-2::-2]]):
        share, own = Share("prompts", prompts, cut, NEW, len(prompts)), {}

        def answer(chosen: list[int], share=share) -> list[list[int]]:
            return generate_ids(model, [prompts[i] for i in chosen], NEW, end, None, None, share)

        for chosen, ids in share.answered(Budget(10**9, 16), answer):
            own |= zip(chosen, ids, strict=True)
        found.append(own | share.early)
        early.update(share.early)
    return found


def main() -> None:
    pretended.install()
    pretended_graph.install()
    # A recording that stays: those of decoding come and go.
    other = Recorder([], lambda given: given, pretended.DEVICE).record(list)
    for name, config in models().items():
        row = {"model": name, "fault": None}
        try:
            row |= decoded(config)
            other()
        except Exception:  # told, with the others
            row["fault"] = traceback.format_exc()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""Memory runs out on one of two ranks while they answer: both go on with the same batches."""

import json
from pathlib import Path

import pytest
import torch

from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer
from codyra_llm.runtime.launch import accelerator, leave

TEXTS = ["What is the stance", "Answer: 7", "How many pens?", "Write a summary", "Say something else", "No"]


def answers(folder: Path, fails: int | None) -> list[list[str]]:
    """The answers to TEXTS, asked for three times; with `fails`, memory runs out in that rank's first
    batch."""
    from lm_eval.api.instance import Instance

    from codyra_llm.evaluate import generate, harness

    acc = accelerator()
    model, tokenizer = loading.load(folder, torch.float32).eval(), load_tokenizer(folder)
    live = harness.InMemoryLM(acc, model, tokenizer, tokens=90)
    plain, calls = generate.generate_ids, []

    def limited(*given):
        calls.append(1)
        if acc.process_index == fails and len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*given)

    generate.generate_ids = limited
    found = []
    for new in (4, 5, 6):
        settings = {"until": ["never"], "max_gen_toks": new, "do_sample": False}
        asked = []
        for i, text in enumerate(TEXTS):
            asked.append(Instance("generate_until", {}, (text, settings), i, ("t", i, 1)))
        found.append(live.generate_until(asked))
    generate.generate_ids = plain
    return found


@pytest.mark.distributed
def test_general_ability_goes_on_where_one_rank_had_to_halve_its_batches(tiny_llama, tmp_path, forked):
    def work(rank: int) -> None:
        (tmp_path / f"{rank}.json").write_text(json.dumps(answers(tiny_llama, fails=1)))
        leave()

    done = forked.ranks(work)
    assert done.returncode == 0, done.stderr
    expected = answers(tiny_llama, fails=None)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected

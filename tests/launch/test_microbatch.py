"""Out of memory halves the micro-batch and changes nothing else; what can't be halved is a Fault; all ranks
agree.
"""

from collections.abc import Callable
from itertools import count

import pytest
import torch
import yaml
from forked import Ended
from launches import assert_same_run, refused, sections

from codyra_llm.cli import main
from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.files import read_jsonl
from codyra_llm.data.batches import Batch
from codyra_llm.experiment import run
from codyra_llm.experiment.setup import prepare
from codyra_llm.models.attention import packed_attention
from codyra_llm.runtime.launch import accelerator
from codyra_llm.store.archive import Archive
from codyra_llm.train.trainer import Trainer


@pytest.fixture
def file(tiny_llama, toy_stream, tmp_path):
    (tmp_path / "codyra.yaml").write_text(yaml.safe_dump(sections(tiny_llama, toy_stream, "codyra")))
    return tmp_path / "codyra.yaml"


def out_of_memory_on_rank_1(forked, when: Callable[[int], bool], *words) -> Ended:
    """`run` with these words in two processes; in the second, memory runs out in the midst of each n-th loss
    for which `when(n)` holds."""
    plain, calls = Batch.cross_entropy, count(1)

    def cross_entropy(batch: Batch, model) -> torch.Tensor:
        loss = plain(batch, model)
        if when(next(calls)):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    def work(rank: int) -> None:
        if rank == 1:
            Batch.cross_entropy = cross_entropy
        main(["run", *map(str, words)])

    return forked.ranks(work)


@pytest.mark.distributed
def test_one_of_two_ranks_runs_out(file, tmp_path, forked):
    """The second rank, in the midst of its fifth micro-batch; the first has no trouble and does not wait for
    ever.
    """
    one = run.run(load_recipe(file, [f"output={tmp_path / 'one'}"])).path
    done = out_of_memory_on_rank_1(forked, lambda call: call == 5, file, f"output={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("out of memory, going on with optim.micro_batch_tokens at") == 1
    assert_same_run(one, tmp_path / "two", 0)
    tokens = [
        row["micro_batch_tokens"]
        for row in read_jsonl(tmp_path / "two" / "log.jsonl")
        if row["task"] == "ONE"
    ]
    assert tokens[0] == 60 > tokens[-1]


@pytest.mark.distributed
def test_one_of_two_ranks_can_not_go_on(file, tmp_path, forked):
    done = out_of_memory_on_rank_1(forked, lambda call: True, file, f"output={tmp_path / 'two'}")
    refused(done, "tokens alone does not fit")
    assert all(done.codes)
    assert not (tmp_path / "two" / "updates").exists()


@pytest.mark.distributed
def test_ranks_that_differ_in_kernels_cut_alike(file, tmp_path, forked):
    """GPUs of two kinds, of which one would pack and the other pad: ZeRO needs equally many micro-batches."""

    def work(rank: int) -> None:
        packed_attention.pays = lambda model, device: rank == 0
        acc, setup = accelerator(), prepare(load_recipe(file, []))
        model = setup.model(Archive(tmp_path / "none", "base"), -1)
        setup.method.attach(model)
        assert not Trainer(acc, setup.method, model, setup.recipe.optim, pad=0).packed
        packed_attention.pays = lambda model, device: True
        assert Trainer(acc, setup.method, model, setup.recipe.optim, pad=0).packed

    done = forked.ranks(work)
    assert done.codes == [0, 0], done.stderr

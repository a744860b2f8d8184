"""ilora_mixed in whole runs: its memory, the average that it archives, and the distance that it penalises."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny_recipe, weights

from codyra_llm.config.registry import METHODS
from codyra_llm.core.files import read_jsonl
from codyra_llm.data.batches import collate
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.layer import sites
from codyra_llm.lora.merge import merge
from codyra_llm.lora.shared import share_inputs
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.models.attention import packed_attention
from codyra_llm.models.weights import WeightReader
from codyra_llm.store.archive import Archive

THREE = {"data__tasks": ["ONE", "TWO", "THREE"], "eval__max_examples": 2, "checkpoint": False}


def test_ilora_mixed_without_memory_of_its_own_is_mixed_replay(tiny_llama, toy_stream, tmp_path):
    """γ = 0 and λ = 0: the same losses and gradients in every step, the same weights after every task."""
    same = {"method__rank": 4, "method__ratio": 0.5, "method__dropout": 0.1}
    ilora = runs.run(
        tiny_recipe(
            tiny_llama,
            toy_stream,
            tmp_path / "ilora",
            method="ilora_mixed",
            method__decay=0,
            method__weight=0,
            **same,
            **THREE,
        )
    )
    replay = runs.run(
        tiny_recipe(
            tiny_llama,
            toy_stream,
            tmp_path / "replay",
            method="replay",
            method__general=None,
            method__when="mixed",
            **same,
            **THREE,
        )
    )
    steps = [
        [(r["task"], r["loss"], r["grad_norm"]) for r in read_jsonl(f.path / "log.jsonl")]
        for f in (ilora, replay)
    ]
    assert steps[0] == steps[1] and len(steps[0]) == 6 + 2 * 4 + 2 * 5
    for name, tensors in weights(replay).items():
        assert all(torch.equal(weights(ilora)[name][key], tensor) for key, tensor in tensors.items()), name


def test_ilora_mixed_archives_the_average_and_goes_on_with_the_fast_adapter(
    tiny_llama, toy_stream, tmp_path, monkeypatch
):
    fast, at = [], "model.layers.1.mlp.up_proj"
    method = METHODS["ilora_mixed"]
    begin, after = method.begin_task, method.after_step

    def begun(self, model, task):
        begin(self, model, task)
        fast.append([sites(model)[at].lora_B.detach().double().clone()])

    def stepped(self, gradients):
        after(self, gradients)
        fast[-1].append(sites(gradients.model)[at].lora_B.detach().double().clone())

    monkeypatch.setattr(method, "begin_task", begun)
    monkeypatch.setattr(method, "after_step", stepped)
    run = runs.run(
        tiny_recipe(
            tiny_llama,
            toy_stream,
            tmp_path / "run",
            method="ilora_mixed",
            method__decay=0.8,
            method__ratio=0.5,
            **{**THREE, "data__tasks": ["ONE", "TWO"]},
        )
    )
    slow = fast[0][0]
    for task, (name, tensors) in zip(fast, weights(run).items(), strict=True):
        steps = len(task) - 1
        slow = 0.8**steps * slow + sum(0.2 * 0.8 ** (steps - k) * task[k] for k in range(1, steps + 1))
        torch.testing.assert_close(tensors[f"{at}.b"].double(), slow, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(slow, task[-1], atol=1e-3), name
    assert torch.equal(fast[1][0], fast[0][-1])
    rows = [r for r in read_jsonl(run.path / "log.jsonl") if r["task"] == "TWO"]
    assert all("consistency" in r for r in rows) and rows[-1]["consistency"] > 0


def drawn(model, draw: torch.Generator) -> Update:
    """Random factors for every site, as a task would archive them."""
    adapters = {}
    for site, module in sites(model).items():
        a = 0.3 * torch.randn(module.lora_A.shape, generator=draw)
        b = 0.1 * torch.randn(module.lora_B.shape, generator=draw)
        adapters[site] = Adapter(a, b, None)
    return Update(adapters, 1.0, "replace")


@pytest.mark.parametrize("packed", [False, True])
def test_ilora_mixed_distance_is_that_of_two_merged_models(packed, tiny_llama, toy_stream, tmp_path):
    setup = prepare(
        tiny_recipe(
            tiny_llama,
            toy_stream,
            tmp_path / "run",
            method="ilora_mixed",
            method__rank=3,
            method__weight=2.0,
            data__batching="packed" if packed else "buckets",
        )
    )
    method, archive, draw = (
        setup.method,
        Archive(tmp_path / "updates", "base"),
        torch.Generator().manual_seed(0),
    )
    model = setup.model(archive, -1)
    method.attach(model)
    slow, quick = drawn(model, draw), drawn(model, draw)
    archive.append("ONE", slow)
    share_inputs(model)
    state = {f"{site}.{key}": t for site, a in quick.adapters.items() for key, t in (("a", a.a), ("b", a.b))}
    method.begin_task(model, setup.task(model, archive, 1, state))
    encoded = setup.encoder.encode(method.train_data(setup.stream, 1)[0])
    chosen, share = [3, 21, 0, 20], [0.1, 0.2, 0.3, 0.4]
    for i in (0, 20):  # as of a chat, in which the assistant has spoken before
        encoded[i] = replace(encoded[i], turns=((1, 3),))
    if packed:
        packed_attention.use(model)
    found = method.loss(model.train(), collate(encoded, chosen, share, 0, packed))["consistency"]
    hidden = []
    for update in (quick, slow):
        plain = setup.model(archive, -1).eval()
        merge(plain, WeightReader(setup.base), [update], torch.device("cpu"))
        hidden.append(lambda ids, m=plain: m.model(input_ids=ids[None]).last_hidden_state[0])
    expected = 0
    for i, weight in zip(chosen, share, strict=True):
        if i >= 20:  # the examples of task TWO come first
            e = encoded[i]
            predictors = torch.tensor(e.labelled) - 1
            states = [h(torch.tensor(e.prompt + e.answer))[predictors] for h in hidden]
            expected += 2.0 * weight * (states[0] - states[1]).square().mean(1).sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found.backward()
    assert all(m.lora_B.grad.abs().sum() > 0 for m in sites(model).values())
    assert "consistency" not in method.loss(model.eval(), collate(encoded, chosen, share, 0, packed))

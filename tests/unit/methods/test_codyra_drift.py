"""codyra_drift as a method: what its state is, restarts within a task where it selects, and
what it keeps on a stream."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from codyra_llm.config.methods.sequential import CodyraConfig, CodyraDriftConfig
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256
from codyra_llm.data.encoding import Encoded
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.layer import sites
from codyra_llm.methods.parts.old_inputs import OldInputs, moments, sampled_moments
from codyra_llm.methods.parts.samples import self_sampled, self_sampled_chats
from codyra_llm.runtime import signals
from codyra_llm.store.archive import Archive
from codyra_llm.store.folder import RunFolder

SMALL = {"rank": 3, "samples": 40, "sample_tokens": 6, "sketch": 8}


def recipe(model, stream, out, **method):
    return parse_recipe(
        {
            "model": {"path": str(model)},
            "data": {"root": str(stream), "tasks": ["ONE", "TWO"], "epochs": 2},
            "method": {"name": "codyra_drift", **SMALL, **method},
            "optim": {"lr": 1e-2, "batch_size": 8},
            "eval": {"max_new_tokens": 2, "max_examples": 2},
            "output": str(out),
            "checkpoint": False,
        }
    )


@pytest.fixture
def setup(tiny_llama, toy_stream, tmp_path):
    return prepare(recipe(tiny_llama, toy_stream, tmp_path / "run"))


def test_ratio_s_budget_is_asked_for():
    with pytest.raises(Fault, match="give the share of drift that may stay"):
        CodyraDriftConfig(selection="ratio")
    with pytest.raises(Fault, match="'keep_drift' goes with selection 'ratio'"):
        CodyraDriftConfig(keep_drift=0.5)
    with pytest.raises(Fault, match="'threshold.dense' must be above 0 with selection 'ratio'"):
        CodyraDriftConfig(selection="ratio", keep_drift=0.5, threshold={"dense": 0.0})


@pytest.mark.parametrize("config", [CodyraDriftConfig, CodyraConfig])
def test_what_plain_lora_does_not_read_is_refused(config):
    with pytest.raises(Fault, match="no effect with selection 'none'.*: 'align', 'threshold'; remove"):
        config(selection="none", align=False, threshold={"budget": 0.3})


def test_sequences_are_drawn_by_the_model_and_split_over_ranks(setup):
    model = _plain(setup)
    all_of_them = self_sampled(model, 70, 5, seed=3)
    shares = [self_sampled(model, 70, 5, 3, rank, 2) for rank in range(2)]
    rows = sorted(e.prompt + e.answer for share in shares for e in share)
    assert rows == sorted(e.prompt + e.answer for e in all_of_them) and len(rows) == 70
    assert all(row[0] == model.config.bos_token_id and len(row) == 7 for row in rows)
    assert rows != sorted(e.prompt + e.answer for e in self_sampled(model, 70, 5, seed=4))


def test_drawn_tokens_follow_the_model_s_own_distribution(setup):
    """A head whose logits are a constant: the tokens' shares are its softmax, whatever the cache holds."""
    model = _plain(setup)
    with torch.no_grad():
        for p in model.model.norm.parameters():
            p.zero_()  # hidden states are 0, so logits are the bias
    model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), -50.0))
    with torch.no_grad():
        model.lm_head.bias[[5, 9]] = torch.tensor([0.0, 1.0])
    drawn = torch.tensor([(e.prompt + e.answer)[2:] for e in self_sampled(model, 400, 10, seed=0)])
    assert set(drawn.unique().tolist()) == {5, 9}
    assert (drawn == 9).float().mean().item() == pytest.approx(0.731, abs=0.03)


def test_chats_begin_with_the_template_and_answers_after_it(setup):
    """The token that the template writes after a user's text is drawn with a probability of a half, so most
    chats have an answer and some have none; over two ranks they are the same ones."""
    model = _plain(setup)
    with torch.no_grad():
        for p in model.model.norm.parameters():
            p.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), -50.0))
    with torch.no_grad():
        model.lm_head.bias[[5, 9]] = 0.0
    frame = [3, 4], [9]
    found = self_sampled_chats(model, frame, 64, 4, seed=0)
    whole = [e.prompt + e.answer for e in found]
    assert all(row[:2] == frame[0] and len(row) == 6 for row in whole)
    for example, row in zip(found, whole, strict=True):
        first = row.index(9) + 1 if 9 in row else 5
        assert len(example.prompt) == min(first, 5)
    assert {len(e.answer) for e in found} == {1, 2, 3}
    halves = [self_sampled_chats(model, frame, 64, 4, 0, rank, 2) for rank in (0, 1)]
    assert halves[0] + halves[1] == found


def test_moments_of_texts_and_chats_have_their_shares(setup, tmp_path):
    """A quarter of chats: three quarters of the moments are those of texts."""
    archive = Archive(tmp_path / "updates", "base")
    model = _adapted(setup, archive)
    frame = [3, 4], [9]
    task = replace(setup.task(model, archive, 0, {}), chat_frame=lambda: frame)
    config = setup.method.config.model_copy(update={"samples": 40, "sample_tokens": 6})
    mixed = sampled_moments(config, model, task, 0, chats=0.25, answer_share=0.5)
    texts = moments(config, model, task, self_sampled(model, 30, 6, 0))
    chats = moments(config, model, task, self_sampled_chats(model, frame, 10, 12, 0), 0.5)
    for name, (product, trace) in mixed.items():
        torch.testing.assert_close(product, 0.75 * texts[name][0] + 0.25 * chats[name][0])
        torch.testing.assert_close(trace, 0.75 * texts[name][1] + 0.25 * chats[name][1])
    without = replace(task, chat_frame=lambda: None)
    alone = moments(config, model, task, self_sampled(model, 40, 6, 0))
    for name, own in sampled_moments(config, model, without, 0, chats=0.25).items():
        torch.testing.assert_close(own, alone[name])


def _adapted(setup, archive):
    model = setup.model(archive, -1)
    setup.method.attach(model)
    for layer in sites(model).values():
        layer.reset(0)
    return model


def _plain(setup):
    return setup.model(Archive(setup.base / "nowhere", "base"), -1).eval()


def test_moments_are_means_over_sources(setup, tmp_path):
    """Against inputs read by hooks of one's own; two sources weigh alike, and the state gives them back."""
    archive = Archive(tmp_path / "updates", "base")
    model, plain = _adapted(setup, archive), setup.model(archive, -1).eval()
    task = setup.task(model, archive, 0, {})
    halves = task.encode(task.records()[:10]), task.encode(task.records()[10:])
    state = {}
    for half in halves:
        found = moments(setup.method.config, model, task, half)
        state = OldInputs(setup.method.config, state).state_with(found)
    kept = OldInputs(setup.method.config, state)
    site, rows = "model.layers.1.self_attn.o_proj", []
    plain.get_submodule(site).register_forward_pre_hook(lambda _, args: rows.append(args[0][0, 1:].double()))
    expected = 0
    for half in halves:
        rows.clear()
        for example in half:
            plain(input_ids=torch.tensor([example.prompt + example.answer]))
        x = torch.cat(rows)
        expected = expected + x.T @ x / len(x) / 2
    torch.testing.assert_close(kept[site].factor, expected, rtol=1e-4, atol=1e-6)
    sketched = kept["model.layers.1.mlp.down_proj"]
    assert sketched.factor.shape == (64, 8) and kept.sources == 2


def test_a_general_set_counts_as_one_more_old_task(setup, tmp_path):
    """Before the first task, in addition to the samples or alone; at the second one only the state counts."""
    archive = Archive(tmp_path / "updates", "base")
    model = _adapted(setup, archive)
    config = setup.method.config.model_copy(update={"general": "THREE", "chats": 0.0, "max_examples": 12})
    setup.method.config, task = config, setup.task(model, archive, 0, {})
    examples = task.general("THREE", 12, setup.method.seed)
    of_set = moments(config, model, task, examples, config.answer_share)
    of_samples = moments(config, model, task, self_sampled(model, 40, 6, setup.method.seed))
    everything = {tuple(e.prompt + e.answer) for e in task.encode(setup.stream.extra("THREE"))}
    assert len(examples) == 12 and {tuple(e.prompt + e.answer) for e in examples} <= everything
    for samples, sources in ((40, [of_samples, of_set]), (0, [of_set])):
        setup.method.config = config.model_copy(update={"samples": samples})
        setup.method.begin_task(model, task)
        old = setup.method._old
        assert old.sources == len(sources)
        for name, (product, trace) in old._sums.items():
            torch.testing.assert_close(product, sum(source[name][0] for source in sources))
            torch.testing.assert_close(trace, sum(source[name][1] for source in sources))
    state = old.state_with(of_samples)
    setup.method.begin_task(model, setup.task(model, archive, 1, state))
    assert setup.method._old.sources == 2


def test_a_general_set_is_found_and_stays_the_same(tiny_llama, toy_stream, tmp_path):
    """Before weights load, and when the run is resumed."""
    with pytest.raises(Fault, match="method.general: .*GONE.*give a set that is there, or null for none"):
        prepare(recipe(tiny_llama, toy_stream, tmp_path / "run", general="GONE"))
    with pytest.raises(Fault, match="method.general: 'TWO' is one of data.tasks"):
        prepare(recipe(tiny_llama, toy_stream, tmp_path / "run", general="TWO"))
    data = shutil.copytree(toy_stream, tmp_path / "data")
    wanted = recipe(tiny_llama, data, tmp_path / "run", general="THREE")
    done = runs.run(wanted)
    assert done.manifest["method_data"] == {"THREE/train.json": file_sha256(data / "THREE" / "train.json")}
    rows = json.loads((data / "THREE" / "train.json").read_text(encoding="utf-8"))
    (data / "THREE" / "train.json").write_text(json.dumps(rows[1:]), encoding="utf-8")
    with pytest.raises(Fault, match="THREE/train.json was .*, and is .* now"):
        runs.run(wanted)


def test_answers_have_their_share_of_the_moments(setup, tmp_path):
    """Against two means of inputs that hooks of one's own have read: at tokens that predict an answer's, and
    at all others."""
    archive = Archive(tmp_path / "updates", "base")
    model, plain = _adapted(setup, archive), setup.model(archive, -1).eval()
    task = setup.task(model, archive, 0, {})
    examples = task.encode(task.records()[:10])
    found = moments(setup.method.config, model, task, examples, answer_share=0.7)
    site, answers, others = "model.layers.1.self_attn.o_proj", [], []
    seen = []
    plain.get_submodule(site).register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    for example in examples:
        plain(input_ids=torch.tensor([example.prompt + example.answer]))
        read, first = seen.pop(), len(example.prompt) - 1
        answers.append(read[first:-1])
        others += [read[1:first], read[-1:]]
    a, o = torch.cat(answers), torch.cat(others)
    expected = 0.7 * a.T @ a / len(a) + 0.3 * o.T @ o / len(o)
    torch.testing.assert_close(found[site][0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[site][1], expected.trace(), rtol=1e-4, atol=1e-6)


def test_moments_where_the_first_token_alone_predicts(setup, tmp_path):
    """BOS and an answer of one token: BOS is left out, so no token is left to have the answers' share."""
    archive = Archive(tmp_path / "updates", "base")
    model = _adapted(setup, archive)
    task, examples = setup.task(model, archive, 0, {}), [Encoded([0], [5], cut=False)]
    plain = moments(setup.method.config, model, task, examples)
    weighted = moments(setup.method.config, model, task, examples, answer_share=0.7)
    for name, found in plain.items():
        torch.testing.assert_close(weighted[name], found)


def test_the_next_task_holds_nothing_but_the_stored_sums(setup, tmp_path):
    """What is kept for a 7B is most of a gigabyte: no copy of it in float64, before a moment is asked for."""
    archive = Archive(tmp_path / "updates", "base")
    model = setup.model(archive, -1)
    setup.method.attach(model)
    task = setup.task(model, archive, 0, {})
    found = moments(setup.method.config, model, task, task.encode(task.records()[:4]))
    state = OldInputs(setup.method.config, {}).state_with(found)
    assert {value.dtype for key, value in state.items() if key.endswith("product")} == {torch.float32}
    setup.method.begin_task(model, setup.task(model, archive, 1, state))
    for name, (product, _) in setup.method._old._sums.items():
        assert product is state[f"{name}.product"]
    assert not setup.method._found


@pytest.mark.parametrize(
    "method",
    [
        {"selection": "ratio", "keep_drift": 0.5},
        {"selection": "threshold", "threshold": {"budget": 0.3}},
        {"selection": "random", "keep": 0.5, "align": False},
    ],
)
def test_stopped_after_the_choice_and_restarted(method, tiny_llama, toy_stream, tmp_path, monkeypatch):
    """The masks of what is to go are part of a checkpoint; what was chosen is gone in the update."""
    straight = runs.run(recipe(tiny_llama, toy_stream, tmp_path / "straight", **method))
    log = RunFolder.log

    def asking(folder, row):
        log(folder, row)
        if (row.task, row.step) == ("TWO", 4):  # of 6: the choice is made before the fourth
            signals.ask("a test")

    with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
        patch.setattr(signals, "_asked", [])
        patch.setattr(RunFolder, "log", asking)
        runs.run(recipe(tiny_llama, toy_stream, tmp_path / "stopped", **method))
    again = runs.run(recipe(tiny_llama, toy_stream, tmp_path / "stopped", **method))
    for index in range(2):
        one, two = (folder.archive().load(index).adapters for folder in (straight, again))
        for site, adapter in one.items():
            assert all(torch.equal(a, b) for a, b in zip(adapter, two[site], strict=True)), site
    kept = sum(len(adapter.a) for adapter in one.values())
    assert 0 < kept < 3 * len(one)
    assert [row.score for row in straight.scores] == [row.score for row in again.scores]


@pytest.mark.parametrize("steps, choice", [(1, None), (2, 1), (3, 1), (4, 2)])
def test_the_choice_is_made_among_trained_ranks(setup, steps, choice):
    """In a task of few steps too; before the first step there is nothing to choose from."""
    config = CodyraDriftConfig(selection="ratio", keep_drift=0.5)
    method = METHODS["codyra_drift"](config, 0)
    method._old = {"some": "moments"}
    chosen = [step for step in range(steps) if method.rewrite(step, steps)]
    assert chosen == ([] if choice is None else [choice])


def test_ranks_are_dropped_in_a_task_of_two_steps(tiny_llama, toy_stream, tmp_path):
    """The masks act from the step on before which they are made."""
    method = {"selection": "ratio", "keep_drift": 0.1, "samples": 8}
    made = recipe(tiny_llama, toy_stream, tmp_path / "run", **method)
    data = made.data.model_copy(update={"epochs": 1, "max_train_examples": 16})
    run = runs.run(made.model_copy(update={"data": data}))
    assert max(json.loads(line)["steps"] for line in (run.path / "log.jsonl").read_text().splitlines()) == 2
    kept = [len(adapter.a) for adapter in run.archive().load(1).adapters.values()]
    assert 0 < sum(kept) < 3 * len(kept)


def test_the_parts_alone(tiny_llama, toy_stream, tmp_path):
    """Without samples the first task is plain LoRA; without penalty and merge, all of it is."""
    off = {"drift_weight": 0.0, "merge_weight": 0.0, "samples": 0}
    plain = runs.run(recipe(tiny_llama, toy_stream, tmp_path / "plain", **off))
    fresh = runs.run(
        parse_recipe(
            {
                **json.loads((plain.path / "recipe.json").read_text()),
                "method": {"name": "seqlora", "rank": 3, "fresh": True},
                "output": str(tmp_path / "fresh"),
            }
        )
    )
    full = runs.run(recipe(tiny_llama, toy_stream, tmp_path / "full", samples=0))
    for index, same in ((0, True), (1, False)):
        a, b, c = (f.archive().load(index).adapters for f in (plain, fresh, full))
        assert all(torch.equal(a[site].a, b[site].a) and torch.equal(a[site].b, b[site].b) for site in a)
        assert all(torch.equal(a[site].a, c[site].a) for site in a) == same


def test_what_it_keeps_is_foreseen(setup):
    model = _plain(setup)
    setup.method.attach(model)
    (sentence,) = METHODS["codyra_drift"](setup.method.config, 0).remarks(model, [6], "constant")
    numbers = 2 * (3 * 32 * 32 + 64 * 8)  # two layers; three inputs of 32, one of 64
    assert sentence.startswith(f"second moments of 8 inputs: {4 * numbers / 1e9:.2f} GB of state")

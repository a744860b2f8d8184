"""EWC, GEM, A-GEM, OGD, LwF: each against its closed form, against seqlora where it has nothing to do."""

import copy

import numpy as np
import pytest
import torch
from helpers import tiny_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import distillation_by_definition
from scipy.optimize import minimize
from torch.nn import functional
from transformers import AutoModelForCausalLM

from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.core.tensors import flat
from codyra_llm.data.batches import collate
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.layer import sites, snapshot, stand_in
from codyra_llm.lora.merge import merge
from codyra_llm.lora.shared import share_inputs
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.projection.gem import multipliers
from codyra_llm.methods.projection.ogd import extended, project, true_logits
from codyra_llm.models import families
from codyra_llm.models.weights import WeightReader
from codyra_llm.runtime.launch import accelerator
from codyra_llm.store.archive import Archive
from codyra_llm.train.trainer import Trainer


@pytest.fixture
def begun(toy_stream, tmp_path, tiny_llama):
    """Function from a method, its settings and state to (model, task TWO, trainer), as they are when TWO
    begins: after a first task whose update is random, so that nothing is zero."""

    def begin(name, state=None, base=tiny_llama, tokens=4096, average="token", **config):
        setup = prepare(
            tiny_recipe(
                base,
                toy_stream,
                tmp_path / "run",
                method=name,
                method__rank=3,
                optim__micro_batch_tokens=tokens,
                optim__loss_average=average,
                **{f"method__{field}": value for field, value in config.items()},
            )
        )
        method, acc, archive = setup.method, accelerator(), Archive(tmp_path / base.name, "base")
        model = setup.model(archive, -1)
        method.attach(model)
        if not archive.files:
            draw = torch.Generator().manual_seed(0)
            archive.append(
                "ONE",
                Update(
                    {
                        site: Adapter(
                            0.3 * torch.randn(m.lora_A.shape, generator=draw),
                            0.1 * torch.randn(m.lora_B.shape, generator=draw),
                            None,
                        )
                        for site, m in sites(model).items()
                    },
                    1.0,
                    "replace",
                ),
            )
        share_inputs(model)
        task = setup.task(model, archive, 1, state or {})
        method.begin_task(model, task)
        trainer = Trainer(acc, method, model, setup.recipe.optim, setup.tokenizer.pad_token_id)
        return model.train(), task, trainer

    return begin


def factors(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def plain_loss(model, example):
    """Mean cross entropy of one example by transformers' logits alone; what the answer's logits are."""
    ids = torch.tensor([example.prompt + example.answer])
    logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
    return functional.cross_entropy(logits, torch.tensor(example.answer)), logits


# -- all of them
# ------------------------------------------------------------------------------------------------------------


def test_gradients_on_request(begun):
    """Of the mean loss as training averages it, without dropout, whatever the micro-batches; the step's own
    stay.
    """
    for average, tokens in (("token", 16), ("sample", 4096)):
        model, task, trainer = begun("seqlora", dropout=0.5, average=average, tokens=tokens)
        examples = task.sample(7, 0) + task.sample(3, 0, past=0)
        for p in trainer.gradients.parameters:
            p.grad = torch.ones_like(p)
        got = trainer.gradients.mean(examples)
        assert all(torch.equal(grad, torch.ones_like(grad)) for grad in trainer.gradients.step)
        assert all(layer.training for layer in sites(model).values())
        share = [len(e.answer) if average == "token" else 1 for e in examples]
        loss = sum(n * plain_loss(model.eval(), e)[0] for n, e in zip(share, examples, strict=True)) / sum(
            share
        )
        for own, exact in zip(got, torch.autograd.grad(loss, trainer.gradients.parameters), strict=True):
            torch.testing.assert_close(own, exact, rtol=1e-3, atol=1e-6)


def test_a_sample_is_a_function_of_seed_and_task(begun):
    _, task, _ = begun("seqlora")
    assert task.sample(5, 1) == task.sample(9, 1)[:5] == task.sample(5, 1, past=1)
    assert task.sample(5, 1) != task.sample(5, 2)

    def key(e):
        return (e.prompt, e.answer)

    assert sorted(map(key, task.sample(999, 1))) == sorted(map(key, task.encode(task.records())))


# -- EWC
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [16, 4096])
def test_fisher_is_the_mean_square_of_each_examples_gradient(tokens, begun):
    old = {name: torch.rand_like(p) for name, p in factors(begun("seqlora")[0]).items()}
    model, task, trainer = begun("ewc", old, tokens=tokens, examples=6, decay=0.25, dropout=0.5)
    got = trainer.method.end_task(model, task, trainer.gradients)
    expected = {name: 0.25 * value for name, value in old.items()}
    for example in task.sample(6, trainer.method.seed):
        grads = torch.autograd.grad(plain_loss(model.eval(), example)[0], list(factors(model).values()))
        for name, grad in zip(factors(model), grads, strict=True):
            expected[name] += grad**2 / 6
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-8)


def test_the_penalty_pulls_to_where_the_task_began(begun):
    """λ F (θ - θ*), once per step whatever the number of micro-batches, and zero at the start."""
    fisher = {name: torch.rand_like(p) for name, p in factors(begun("seqlora")[0]).items()}
    steps = []
    for name, tokens in (("seqlora", 4096), ("ewc", 4096), ("ewc", 16)):
        model, task, trainer = begun(
            name, fisher, tokens=tokens, **({"weight": 3.0} if name == "ewc" else {})
        )
        if name == "ewc":
            assert trainer.method.penalty(model)["ewc"].item() == 0
        shift = {
            key: 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            for key, p in factors(model).items()
        }
        with torch.no_grad():
            for key, p in factors(model).items():
                p += shift[key]
        trainer._attempt(task.sample(8, 0), list(range(8)))
        steps.append(trainer.gradients.step)
    pull = [3.0 * fisher[key] * shift[key] for key in fisher]
    for plain, once, many, wanted in zip(*steps, pull, strict=True):
        torch.testing.assert_close(once - plain, wanted, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(many - plain, wanted, rtol=1e-3, atol=1e-5)


# -- GEM, A-GEM
# ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_gem_finds_the_nearest_gradient_without_conflict(t, seed):
    draw = np.random.default_rng(seed)
    matrix, g = draw.normal(size=(t, 8)) * 10.0 ** draw.uniform(-4, 2), draw.normal(size=8)
    v = multipliers(matrix @ matrix.T, matrix @ g, 0.0, 1e-9)
    found = g + v @ matrix
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    assert (unit @ found).min() > -1e-6
    positive = {"type": "ineq", "fun": lambda x: unit @ x, "jac": lambda x: unit}
    best = minimize(
        lambda x: ((x - g) ** 2).sum() / 2,
        g,
        method="SLSQP",
        jac=lambda x: x - g,
        constraints=positive,
        options={"ftol": 1e-12},
    )
    np.testing.assert_allclose(found, best.x, atol=1e-5)
    if (matrix @ g).min() >= 0:
        assert not v.any()


@pytest.mark.parametrize(("margin", "epsilon"), [(0.0, 1e-3), (0.5, 1e-3), (0.5, 0.3)])
def test_gem_solves_its_dual(margin, epsilon):
    """With margin and ridge, and with two memories alike, by a second solver on the dual as it is written."""

    def dual(v, p, products):
        return v @ p @ v / 2 + products @ v, p @ v + products

    draw = np.random.default_rng(0)
    for _ in range(10):
        matrix, g = draw.normal(size=(4, 6)), draw.normal(size=6)
        matrix[3] = matrix[0]
        gram, products = matrix @ matrix.T, -abs(matrix @ g)
        p = gram + epsilon * gram.diagonal().mean() * np.eye(4)
        best = minimize(
            dual,
            np.ones(4),
            (p, products),
            jac=True,
            bounds=[(margin, None)] * 4,
            method="L-BFGS-B",
            options={"ftol": 1e-16, "gtol": 1e-10},
        )
        np.testing.assert_allclose(multipliers(gram, products, margin, epsilon), best.x, atol=1e-4)


class Given:
    """Gradients as a method sees them, of two tensors, with references that are given."""

    def __init__(self, step, *references):
        self.step, self.references = [s.clone() for s in step], references

    def mean(self, examples):
        return self.references[examples[0]]


def surgeon(name, memories=1, **config):
    method = METHODS[name](METHODS[name].Config(**config), 0)
    method._memories, method._index, method._step = [[k] for k in range(memories)], 1, 0
    return method


PAIR = [torch.tensor([[-1.0, 2.0]]), torch.tensor([0.5])]


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_a_conflict_is_taken_out_over_all_tensors_together(name):
    """m = ((1, 0), 0), g = ((-1, 2), ½): the published code with its signs turned round doubles g·m to -2. In
    the second case the first tensor alone is in conflict, but the vector of all is not."""
    config = {"margin": 0, "epsilon": 1e-9} if name == "gem" else {}
    gradients = Given(PAIR, [torch.tensor([[1.0, 0.0]]), torch.zeros(1)])
    surgeon(name, **config).edit_gradients(gradients)
    torch.testing.assert_close(gradients.step, [torch.tensor([[0.0, 2.0]]), torch.tensor([0.5])])
    agreeing = Given(PAIR, [torch.tensor([[1.0, 0.0]]), torch.tensor([3.0])])
    surgeon(name, **config).edit_gradients(agreeing)
    assert all(map(torch.equal, agreeing.step, PAIR))


@given(st.floats(0, 2), st.integers(0, 2**31))
def test_gem_with_one_memory_has_a_closed_form(margin, seed):
    draw = torch.Generator().manual_seed(seed)
    m, g = ([torch.randn(2, 3, generator=draw), torch.randn(4, generator=draw)] for _ in range(2))
    gradients = Given(g, m)
    surgeon("gem", margin=margin, epsilon=1e-9).edit_gradients(gradients)
    before, after = (flat(x) @ flat(m) for x in (g, gradients.step))
    expected = (
        before if before >= 0 else torch.maximum(torch.tensor(0.0), before + margin * flat(m).square().sum())
    )
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_memory_is_of_the_tasks_before_and_drawn_anew_each_step(begun):
    _, task, trainer = begun("gem", memory=5, batch=3)
    method, seen = trainer.method, []
    assert method._memories == [task.sample(5, method.seed, past=0)] and method.old_data
    for step in (0, 1, 0):
        method.before_step([], step, 9, "constant")
        seen.append(method.draw(list(range(20)), 0))
    assert seen[0] == seen[2] != seen[1] and all(len(s) == 3 for s in seen)


# -- OGD
# ------------------------------------------------------------------------------------------------------------


def test_the_basis_is_orthonormal_and_takes_no_duplicate():
    draw = torch.Generator().manual_seed(0)
    rows = list(
        torch.randn(5, 400, generator=draw) + 20
    )  # nearly parallel, which one pass of Gram-Schmidt would feel
    basis = extended(torch.zeros(0, 400), rows[:3], 3)
    basis = extended(basis, [3 * rows[1], *rows[3:], rows[0] - 7 * rows[4], rows[2] * (1 + 1e-6)], 6)
    assert basis.shape == (5, 400)
    torch.testing.assert_close(basis @ basis.T, torch.eye(5), rtol=0, atol=1e-5)
    for row in rows:
        assert project(row, basis).norm() < 1e-4 * row.norm()
    vector = 1e3 * torch.randn(400, generator=draw) + 1e4 * rows[0]
    left = project(vector, basis)
    assert (basis @ left).abs().max() < 1e-5 * left.norm()
    exact = vector.double() - torch.linalg.lstsq(basis.T.double(), vector.double()).solution @ basis.double()
    torch.testing.assert_close(left.double(), exact, rtol=1e-3, atol=0.2)


def test_what_adam_applies_is_orthogonal(begun):
    """Gradients and steps; without the second projection AdamW leaves the complement."""
    size = sum(p.numel() for p in factors(begun("seqlora")[0]).values())
    basis = torch.linalg.qr(torch.randn(size, 4, generator=torch.Generator().manual_seed(0)))[
        0
    ].T.contiguous()
    escaped = {}
    for whole_method in (True, False):
        _, task, trainer = begun("ogd", {"basis": basis}, examples=4)
        if not whole_method:
            trainer.method.after_step = lambda gradients: None
        start, examples = flat(trainer.gradients.parameters).detach().clone(), task.sample(8, 0)
        for _ in range(3):
            trainer._attempt(examples, list(range(8)))
            trainer.method.edit_gradients(trainer.gradients)
            grads = flat(trainer.gradients.step)
            assert (basis @ grads).abs().max() < 1e-5 * grads.norm()
            trainer.engine.step()
            trainer.method.after_step(trainer.gradients)
        gone = flat(trainer.gradients.parameters).detach() - start
        assert gone.norm() > 0.1
        escaped[whole_method] = ((basis @ gone).abs().max() / gone.norm()).item()
    assert escaped[True] < 1e-5 and escaped[False] > 1e-3


def test_the_basis_is_of_the_answers_logits(begun, tiny_gemma2):
    for base in (None, tiny_gemma2):
        model, task, trainer = begun("ogd", examples=4, dropout=0.5, **({"base": base} if base else {}))
        if base:
            model.config.final_logit_softcapping = 0.5  # which logits this small feel
        got = trainer.method.end_task(model, task, trainer.gradients)["basis"]
        vectors = []
        for example in task.sample(4, trainer.method.seed):
            _, logits = plain_loss(model.eval(), example)
            total = logits.gather(1, torch.tensor(example.answer)[:, None]).sum()
            one = collate([example], [0], [1.0], 0)
            torch.testing.assert_close(true_logits(model, one), total, rtol=1e-4, atol=1e-5)
            vectors.append(flat(torch.autograd.grad(total, list(factors(model).values()))))
        assert 1 <= len(got) <= 4
        assert max(project(v, got).norm() / v.norm() for v in vectors) < 2e-3
        assert torch.linalg.matrix_rank(torch.stack(vectors), rtol=1e-3) == len(got)


def test_a_basis_that_is_too_large_is_refused(begun):
    with pytest.raises(Fault, match=r"9 directions .* for each of 2 tasks .* method.max_gigabytes \(1e-06\)"):
        begun("ogd", examples=9, max_gigabytes=1e-6)


# -- LwF
# ------------------------------------------------------------------------------------------------------------


def test_lwf_is_two_models(begun, tiny_gemma2):
    """Loss and gradient against two merged copies and plain autograd in float64, softcap included; padding,
    dropout of the teacher and the order of examples change nothing."""
    model, task, trainer = begun("lwf", base=tiny_gemma2, weight=0.7, temperature=3.0)
    model.double().config.final_logit_softcapping = 0.5  # which logits this small feel
    trainer.method.begin_task(model, task)
    before, examples = copy.deepcopy(model), task.sample(4, 0) + task.sample(2, 0, past=0)
    share = [0.1, 0.2, 0.3, 0.05, 0.15, 0.2]
    batch = collate(examples, range(6), share, 0)
    start = trainer.method.loss(model, batch)
    assert start["lwf"].abs() < 1e-12
    assert all(
        g.abs().max() < 1e-12 for g in torch.autograd.grad(start["lwf"], list(factors(model).values()))
    )
    with torch.no_grad():
        for p in factors(model).values():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.shape[0])).double()
    terms = trainer.method.loss(model, batch)
    got = torch.autograd.grad(sum(terms.values()), list(factors(model).values()))
    ce = kl = 0.0
    for example, weight in zip(examples, share, strict=True):
        loss, z = plain_loss(model, example)
        ce += weight * len(example.answer) * loss
        kl += 0.7 * distillation_by_definition(
            z, plain_loss(before, example)[1].detach(), torch.full((len(z),), weight).double(), 3.0
        )
    torch.testing.assert_close(terms, {"loss": ce, "lwf": kl}, rtol=1e-6, atol=1e-9)
    assert kl > 1e-3 and families.softcap(model) == 0.5
    for own, exact in zip(got, torch.autograd.grad(ce + kl, list(factors(model).values())), strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-5, atol=3e-8)


def test_a_stand_in_is_the_merged_model_of_its_stage(begun, tiny_llama):
    """Within, logits of what stands in, without dropout; outside, nothing has changed, cached copies
    included.
    """
    model, task, _ = begun("seqlora", dropout=0.5)
    teacher, ids = snapshot(model), torch.arange(4, 16).view(1, 12)
    assert not any(f.requires_grad for site in teacher.values() for f in site if f is not None)
    with torch.no_grad():
        for p in factors(model).values():
            p.mul_(0.5)
        own = model.eval()(input_ids=ids).logits
        model.train()
        for _ in range(2):
            with stand_in(model, teacher):
                taught = model(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tiny_llama)
    merge(merged, WeightReader(tiny_llama), task.archive.terms(0), torch.device("cpu"))
    torch.testing.assert_close(taught, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert (taught - own).abs().max() > 1e-2
    assert torch.equal(model.eval()(input_ids=ids).logits, own)
    with pytest.raises(KeyboardInterrupt), stand_in(model, teacher):
        raise KeyboardInterrupt
    assert torch.equal(model(input_ids=ids).logits, own)

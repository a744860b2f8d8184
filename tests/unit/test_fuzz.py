"""Whatever a file holds, it is accepted or a Fault is raised, never another exception. Oracle: that property.

CODYRA_FUZZ=100 tries a hundred times as many examples, with random seeds.
"""

import copy
import json
import os
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import load_recipe, parse_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.data.encoding import Encoder
from codyra_llm.data.records import read_split
from codyra_llm.evaluate.statistics import predictions
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer
from codyra_llm.models.weights import INDEX, WeightReader
from codyra_llm.store.archive import Archive
from codyra_llm.sweep.spec import load_sweep

TIMES = int(os.environ.get("CODYRA_FUZZ", "1"))
ODD = [
    "",
    "\0",
    "a\nb",
    "../x",
    "~nobody/x",
    "$HOME",
    "x" * 300,
    "\ud800",
    "\ufeff",
    "1e400",
    "yes",
    "<<",
    "!!python/x",
    "<b>",
    "mini",
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    1e308,
    1e-320,
    float("nan"),
    float("-inf"),
    True,
    None,
    [],
    {},
    [[]],
    [None],
    {"name": "codyra"},
    {"name": []},
    "auto",
    0.5,
    "0.5",
    [1, 1],
    {"a": {"a": {}}},
]
SYNTAX = [b"[", b"{", b'"', b"'", b"&a ", b"*a", b": ", b"- ", b"!!", b"9"]
TEXT = st.text(st.characters(exclude_categories=()), max_size=6)
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def tried(examples):
    """Settings of a property: the same examples every time, unless many are asked for."""
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def places(value):
    """(container, key) of everything inside a value."""
    for key in list(value if isinstance(value, dict) else range(len(value))):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


@st.composite
def changed(draw, good):
    """A plain value with one to three changes: something replaced, left out, added or renamed."""
    value, values = [copy.deepcopy(good)], VALUES.map(copy.deepcopy)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        container, key = found[draw(st.integers(0, len(found) - 1))]
        change = draw(st.sampled_from(["replace", "leave out", "add", "rename"]))
        if change == "replace" or container is value:
            container[key] = draw(values)
        elif change == "leave out":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, draw(values))
        elif change == "add":
            container[draw(TEXT | st.sampled_from(["rank", "name", "a"]))] = draw(values)
        else:
            container[draw(TEXT)] = container.pop(key)
        if not isinstance(value[0], (dict, list)):
            break
    return value[0]


@st.composite
def damaged(draw, good):
    """Bytes with one to four changes: some replaced, left out, added or repeated, or the end cut off."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, len(data))), draw(st.integers(1, 8))
        change = draw(st.sampled_from(["replace", "leave out", "add", "repeat", "cut"]))
        piece = draw(st.binary(min_size=1, max_size=n) | st.sampled_from(SYNTAX))
        if change == "replace":
            data[at : at + len(piece)] = piece
        elif change == "leave out":
            del data[at : at + n]
        elif change == "add":
            data[at:at] = piece * draw(st.sampled_from([1, 1, 1, 2000]))
        elif change == "repeat":
            data[at:at] = data[max(at - 40, 0) : at]
        else:
            del data[at:]
    return bytes(data)


def spoilt(good, write):
    """Bytes of a plain value that was changed, or of a good one that were damaged."""
    return changed(good).map(write) | damaged(write(good))


def as_yaml(value):
    return yaml.safe_dump(value).encode()


def as_json(value):
    return json.dumps(value).encode()


def accepted(action, *args):
    """What the action gives, or None where it says in sentences what is wrong."""
    try:
        return action(*args)
    except Fault as fault:
        assert fault.messages and all(message.strip() for message in fault.messages)
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def raw(tiny_llama, toy_stream, folder):
    """A recipe with every key of every section, resolved."""
    return (
        parse_recipe(
            {
                "model": {"path": str(tiny_llama)},
                "data": {"root": str(toy_stream), "tasks": ["ONE", "TWO"]},
                "method": {"name": "codyra", "rank": 4},
                "output": str(folder / "out"),
            }
        )
        .resolved()
        .model_dump(mode="json")
    )


@tried(120)
@given(data=st.data())
def test_recipes(data, raw, folder):
    method = data.draw(st.sampled_from(list(METHODS)))
    recipe = raw | {
        "method": METHODS[method]
        .Config(**({"selection": "threshold"} if method == "codyra" else {}))
        .model_dump(mode="json")
    }
    (folder / "r.yaml").write_bytes(data.draw(spoilt(recipe, as_yaml)))
    if found := accepted(load_recipe, folder / "r.yaml"):
        json.dumps(found.resolved().model_dump(mode="json"), ensure_ascii=False).encode()
        same = (found.model.path, found.data.root, found.general.data) == (
            raw["model"]["path"],
            raw["data"]["root"],
            None,
        )
        if same and found.method.name != "rcl":  # rcl looks for other folders
            accepted(prepare, found)
    assert not (folder / "out").exists()


@tried(60)
@given(
    overrides=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "optim.lr",
                    "method",
                    "method.rank",
                    "data.tasks",
                    "data.epochs",
                    "output",
                    "eval",
                    "a.b",
                    ".",
                    "",
                ]
            )
            | TEXT,
            VALUES.map(lambda v: yaml.safe_dump(v, default_flow_style=True)) | TEXT,
        ).map("=".join)
        | TEXT,
        max_size=3,
    )
)
def test_overrides(overrides, raw):
    if found := accepted(lambda: parse_recipe(override(copy.deepcopy(raw), overrides))):
        assert parse_recipe(found.model_dump(mode="json")) == found  # as a run's recipe.json is read


@tried(40)
@given(data=st.data())
def test_sweeps(data, raw, folder):
    (folder / "base.yaml").write_bytes(as_yaml(raw))
    good = {
        "recipe": str(folder / "base.yaml"),
        "output": str(folder / "out"),
        "set": {"optim.lr": 1e-3},
        "baseline": "a",
        "arms": {"a": {"method": "seqlora"}, "b": {"method": "ewc", "method.weight": 3}},
        "grid": {"seed": [1, 2]},
        "tune": {"by": "op", "set": {"seed": 3}, "tries": {"a": [{}], "b": [{"optim.lr": 1}]}},
    }
    (folder / "s.yaml").write_bytes(data.draw(spoilt(good, as_yaml)))
    if found := accepted(load_sweep, folder / "s.yaml"):
        places = [run.folder.path for run in [*found.tries, *found.runs()]]
        assert len(set(places)) == len(places) and all(place.is_relative_to(found.output) for place in places)
    assert not (folder / "out").exists()


RECORDS = [
    {"prompt": "Say A:", "answer": "A"},
    {"prompt": "Größe?\n", "answer": "态度 B"},
    {"prompt": "x", "answer": "1", "id": 3},
]


@tried(150)
@given(content=spoilt(RECORDS, as_json))
def test_data(content, folder, raw, tiny_llama):
    (folder / "T").mkdir(exist_ok=True)
    (folder / "T" / "train.json").write_bytes(content)
    if found := accepted(read_split, folder, "T", "train"):
        json.dumps(found, ensure_ascii=False).encode()
        encoder = Encoder(load_tokenizer(tiny_llama), parse_recipe(raw).data)
        assert all(encoder.prompt(r["prompt"]) and encoder.answer(r["answer"]) for r in found)


@tried(80)
@given(
    content=spoilt(
        [{"prompt": "What is 2+2?", "prediction": "4. <NUM_LIT:4>", "answer": "4 ist. Gut"}] * 2, as_json
    ),
    task=st.sampled_from([*load_benchmark("trace").tasks, "other"]),
)
def test_predictions(content, task, folder):
    (folder / "p.json").write_bytes(content)
    if rows := accepted(lambda file: list(predictions(file)), folder / "p.json"):
        found = load_benchmark("trace").score(
            task, *([row[key] for row in rows] for key in ("prompt", "prediction", "answer"))
        )
        assert all(0 <= value <= 100.0001 for values in found.values() for value in values)


def split_header(content):
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@st.composite
def safetensors(draw, good):
    """A safetensors file whose header was changed, or whose bytes were damaged."""
    header, data = split_header(good)
    if draw(st.booleans()):
        return draw(damaged(good))
    text = json.dumps(draw(changed(header))).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        INDEX,
        "model.safetensors",
        "generation_config.json",
    ],
)
def test_model_folders(name, tiny_llama, folder):
    weights = WeightReader(tiny_llama).handle_of
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "model.safetensors")})
    good = index.encode() if name == INDEX else (tiny_llama / name).read_bytes()

    @tried(25)
    @given(content=safetensors(good) if name.endswith(".safetensors") else spoilt(json.loads(good), as_json))
    def holds(content):
        copied = shutil.copytree(tiny_llama, folder / "model", dirs_exist_ok=True)
        (copied / name).write_bytes(content)
        try:
            found = accepted(loading.resolve, str(copied))
            if found and not loading.check(found) and (model := accepted(loading.load, found, torch.float32)):
                assert sum(p.numel() for p in model.parameters()) > 0
        finally:
            shutil.rmtree(copied)

    holds()


@tried(60)
@given(data=st.data())
def test_updates(data, folder):
    updates = folder / "updates"
    shutil.rmtree(updates, ignore_errors=True)
    site, adapter = (
        "model.layers.0.self_attn.q_proj",
        Adapter(torch.ones(2, 32), torch.ones(32, 2), torch.ones(2)),
    )
    archive = Archive(updates, "f" * 64)
    archive.append("ONE", Update({site: adapter}, 0.5))
    file = archive.append("TWO", Update({site: adapter}, 0.5))
    file.write_bytes(data.draw(safetensors(file.read_bytes())))
    opened = accepted(Archive, updates, "f" * 64)
    if opened and (terms := accepted(opened.terms, 1)):
        assert all(torch.equal(term.adapters[site].a, adapter.a) for term in terms if term.adapters)

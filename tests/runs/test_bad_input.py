"""Wrong input of every kind, as a user meets it: the rows of docs/bad_input.md, one test each. Oracle: the
page.
"""

import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT
from safetensors.torch import load_file, save_file

from codyra_llm.cli import main
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.experiment import run as runs
from codyra_llm.models.weights import INDEX

PAGE = ROOT / "docs" / "bad_input.md"
TABLE = PAGE.read_text("utf-8").partition("## Recipes")[2].replace("`", "")  # before it bounds, no sentences
DOCUMENTED = dict(re.findall(r"^\| (?!what is wrong|-)(.+?) \| (.+?) \|$", TABLE, re.MULTILINE))
ROWS = {}


def row(wrong):
    """A function of a `Place` that makes the input of a row and returns the arguments of the command."""
    return lambda make: ROWS.setdefault(wrong, make)


class Place:
    """A folder with a good recipe, good data and a good model, to be spoilt."""

    def __init__(self, folder, model, data, run):
        self.folder, self.data, self.out, self.run = folder, folder / "data", folder / "out", run
        self.model, self.base = folder / "model", run.parent / "base" / "model.safetensors"
        shutil.copytree(data, self.data)
        shutil.copytree(model, self.model)
        self.raw = {
            "model": {"path": str(self.model)},
            "data": {"root": str(self.data), "tasks": ["ONE", "TWO"]},
            "method": {"name": "codyra", "rank": 4},
            "output": str(self.out),
        }

    def write(self, name, content):
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content) if isinstance(content, bytes) else file.write_text(
            content, encoding="utf-8"
        )
        return file

    def recipe(self, text=None, *overrides, **sections):
        """`plan` of the recipe with other sections, or of a text with `$recipe` in it."""
        good = yaml.safe_dump(self.raw | sections)
        text = good if text is None else text if isinstance(text, bytes) else text.replace("$recipe", good)
        return ["plan", self.write("r.yaml", text), *overrides]

    def records(self, content, split="train"):
        """`plan` with that in the file of one split."""
        self.write(
            f"data/ONE/{split}.json", content if isinstance(content, (str, bytes)) else json.dumps(content)
        )
        return self.recipe()

    def config(self, file="config.json", **values):
        """`plan` with a model whose config has other values."""
        path = self.model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return self.recipe()

    def weights(self, change):
        """`plan` with a model whose tensors were changed."""
        tensors = load_file(self.model / "model.safetensors")
        change(tensors)
        save_file(tensors, self.model / "model.safetensors")
        return self.recipe()

    def bytes(self, change):
        """`plan` with a model whose weight file was changed byte by byte."""
        file = self.model / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))
        return self.recipe()

    def index(self, content):
        (self.model / "model.safetensors").rename(self.model / "model-1.safetensors")
        (self.model / INDEX).write_text(json.dumps(content))
        return self.recipe()

    def predictions(self, content):
        return [
            "score",
            "FOMC",
            self.write("p.json", content if isinstance(content, str) else json.dumps(content)),
        ]

    def sweep(self, text=None, **sections):
        self.recipe()
        good = {
            "recipe": str(self.folder / "r.yaml"),
            "output": str(self.out),
            "arms": {"seqlora": {"method": "seqlora"}},
        }
        return ["sweep", self.write("s.yaml", yaml.safe_dump(good | sections) + (text or ""))]

    def spoilt_run(self, change):
        """A finished run, changed."""
        copied = Path(shutil.copytree(self.run, self.folder / "run"))
        change(copied)
        return copied


def cut(name):
    """A change of a run: the second half of a file is lost."""
    return lambda run: os.truncate(run / name, (run / name).stat().st_size // 2)


def flip(name):
    """A change of a run: the last letter of a file is another."""

    def change(run):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])

    return change


# Recipes
row("a key that is there twice")(lambda p: p.recipe("$recipeseed: 1\nseed: 2\n"))
row("an unknown key")(lambda p: p.recipe(optim={"lrr": 1}))
row("a missing section")(lambda p: (p.raw.pop("data"), p.recipe())[-1])
row("text where a number belongs")(lambda p: p.recipe(optim={"lr": "fast"}))
row("true where a number belongs")(lambda p: p.recipe(data=p.raw["data"] | {"epochs": {"ONE": True}}))
row("a list where text belongs")(lambda p: p.recipe(model={"path": [1, 2]}))
row("a value where a section belongs")(lambda p: p.recipe(optim=3))
row("a negative number")(lambda p: p.recipe(optim={"batch_size": -1}))
row("a negative seed")(lambda p: p.recipe(seed=-1))
row("a number that would exhaust memory")(lambda p: p.recipe(method={"name": "codyra", "rank": 10**9}))
row("a rank that no weight can have")(lambda p: p.recipe(method={"name": "codyra", "rank": 33}))
row("a number that would never end")(lambda p: p.recipe(data=p.raw["data"] | {"epochs": 10**12}))
row("a revision of a folder")(lambda p: p.recipe(model={"path": str(p.model), "revision": "main"}))
row("a key without the one that it belongs to")(lambda p: p.recipe(general={"limit": 5}))
row("a number of more than 64 bits")(lambda p: p.recipe(seed=1 << 64))
row("a number of 5000 digits")(lambda p: p.recipe("$recipeseed: " + "9" * 5000))
row("nan")(lambda p: p.recipe(optim={"lr": float("nan")}))
row("a number above what floats hold")(lambda p: p.recipe("$recipeoptim: {lr: 1e400}"))
row("a YAML tag that runs code")(
    lambda p: p.recipe(f"$recipeseed: !!python/object/apply:os.mkdir ['{p.out}']\n")
)
row("aliases that multiply")(
    lambda p: p.recipe(
        "".join(
            [f"a0: &a0 [{'x, ' * 10}]\n", *(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 10}]\n" for i in range(9))]
        )
    )
)
row("an alias within itself")(lambda p: p.recipe("a: &a [*a]"))
row("sections nested without end")(lambda p: p.recipe("seed: " + "[" * 5000))
row("a key that is not text")(lambda p: p.recipe("$recipe3: 4\n"))
row("a file that is not YAML")(lambda p: p.recipe("model: {path: x"))
row("a file in UTF-16")(lambda p: p.recipe("seed: 1".encode("utf-16")))
row("an empty file")(lambda p: p.recipe(""))
row("a file of a megabyte")(lambda p: p.recipe("# " + "x" * (1 << 20)))
row("a folder in place of a recipe")(lambda p: ["plan", p.data])
row("a recipe that isn't there")(lambda p: ["plan", "quikstart"])
row("half of a surrogate pair in text")(lambda p: p.recipe('$recipeoutput2: "\\ud800"\n'))
row("a NUL byte in a path")(lambda p: p.recipe(output=f"{p.out}\0"))
row("a path that no file system takes")(lambda p: p.recipe(data={"root": "x" * 300}))
row("a task named like a path")(lambda p: p.recipe(data=p.raw["data"] | {"tasks": ["../ONE"]}))
row("a task that is named twice")(lambda p: p.recipe(data=p.raw["data"] | {"tasks": ["ONE", "ONE"]}))
row("an unknown method")(lambda p: p.recipe(method={"name": "codira"}))
row("a warm-up that never ends")(
    lambda p: p.recipe(optim={"warmup": 100}, data=p.raw["data"] | {"tasks": ["ONE"]})
)
row("a warm-up of half a step")(lambda p: p.recipe(optim={"warmup": 1.5}))
row("layers that are none")(lambda p: p.recipe(method={"name": "seqlora", "layers": "last"}))
row("a layer that the model lacks")(lambda p: p.recipe(method={"name": "seqlora", "layers": "0-2"}))
row("a plug-in that isn't there")(lambda p: [*p.recipe(), "--plugin", "nowhere.py"])
row("a plug-in with a mistake")(lambda p: [*p.recipe(), "--plugin", p.write("m.py", "import os\n\nx = y\n")])
row("a plug-in that registers nothing")(lambda p: [*p.recipe(), "--plugin", p.write("m.py", "x = 1\n")])
row("a benchmark with code that you have not named")(
    lambda p: p.recipe(
        data={"benchmark": str(p.write("own/benchmark.yaml", "metrics: own.py\ntasks: {}\n").parent)}
    )
)
row("a plug-in with the name of ours")(
    lambda p: [
        *p.recipe(),
        "--plugin",
        p.write("m.py", "from codyra_llm.config.registry import METHODS\nMETHODS['ewc'] = None\n"),
    ]
)
row("an override without a value")(lambda p: p.recipe(None, "seed"))
row("an override without a key")(lambda p: p.recipe(None, "=3"))
row("an override below a value")(lambda p: p.recipe(None, "output.lr=1"))
row("an override that is not YAML")(lambda p: p.recipe(None, "optim.betas=[0.9"))
row("an output that is a file")(lambda p: p.recipe(output=str(p.write("taken", "x"))))
row("an output below a file")(lambda p: p.recipe(output=str(p.write("taken", "x") / "run")))
row("an output that can't be written")(lambda p: p.recipe(output="/proc/run"))

# Data
GOOD = {"prompt": "a", "answer": "b"}
row("a data folder that isn't there")(lambda p: p.recipe(data={"root": "nowhere"}))
row("a task that the data lacks")(lambda p: p.recipe(data=p.raw["data"] | {"tasks": ["ONNE"]}))
row("a folder in place of a split")(
    lambda p: ((p.data / "ONE/test.json").unlink(), (p.data / "ONE/test.json").mkdir(), p.recipe())[-1]
)
row("a split that isn't there")(lambda p: ((p.data / "ONE/test.json").unlink(), p.recipe())[-1])
row("data that is not UTF-8")(lambda p: p.records(b'[{"prompt": "\xff"}]'))
row("data that is not JSON")(lambda p: p.records('[{"prompt": "a" "answer": "b"}]'))
row("data that is not a list")(lambda p: p.records(GOOD))
row("an empty list")(lambda p: p.records([]))
row("a record that is not an object")(lambda p: p.records([GOOD, ["a", "b"]]))
row("a record without an answer")(lambda p: p.records([{"prompt": "a", "anser": "b"}]))
row("a record that has a key twice")(lambda p: p.records('[{"prompt": "a", "prompt": "b", "answer": "c"}]'))
row("a fraction as prompt")(lambda p: p.records([{"prompt": 3.5, "answer": "b"}]))
row("a list as answer")(lambda p: p.records([{"prompt": "a", "answer": ["b", "c"]}]))
row("an object as answer")(lambda p: p.records([{"prompt": "a", "answer": {"text": "b"}}]))
row("null as prompt")(lambda p: p.records([{"prompt": None, "answer": "b"}]))
row("an empty answer to learn")(lambda p: p.records([{"prompt": "a", "answer": ""}]))
row("a test split without any answer")(lambda p: p.records([{"prompt": "a", "answer": ""}], "test"))
row("an eval split that is the test split, where settings are chosen on it")(
    lambda p: (
        (p.data / "ONE/eval.json").write_bytes((p.data / "ONE/test.json").read_bytes()),
        p.recipe(None, "optim.validate_every=1"),
    )[-1]
)
row("half of a surrogate pair in a record")(lambda p: p.records('[{"prompt": "\\ud800", "answer": "b"}]'))
row("a NUL byte in a record")(lambda p: p.records('[{"prompt": "a\\u0000", "answer": "b"}]'))
row("a raw NUL byte")(lambda p: p.records(b'[{"prompt": "a\0", "answer": "b"}]'))
row("a record of 10 MB")(lambda p: p.records([{"prompt": "word " * 2_000_000, "answer": "b"}]))
row("JSON nested without end")(lambda p: p.records("[" * 100_000 + "]" * 100_000))
row("a folder of general ability without any")(lambda p: p.recipe(general={"data": str(p.data / "ONE")}))
row("a YAML file that is not a task of general ability")(lambda p: p.recipe(general={"data": str(p.folder)}))

# Models
row("a model that isn't there")(lambda p: p.recipe(model={"path": "./nowhere"}))
row("a model folder without config.json")(lambda p: ((p.model / "config.json").unlink(), p.recipe())[-1])
row("a config.json that is torn")(
    lambda p: ((p.model / "config.json").write_text('{"model_type": "ll'), p.recipe())[-1]
)
row("a config.json that is not a mapping")(
    lambda p: ((p.model / "config.json").write_text("[]"), p.recipe())[-1]
)
row("a family that is not supported")(lambda p: p.config(model_type="gpt2"))
row("weights that are stored quantised")(lambda p: p.config(quantization_config={"quant_method": "gptq"}))
row("text as hidden size")(lambda p: p.config(hidden_size="wide"))
row("no attention heads")(lambda p: p.config(num_attention_heads=0))
row("a billion layers")(lambda p: p.config(num_hidden_layers=10**9))
row("a layer more than there are weights")(lambda p: p.config(num_hidden_layers=3))
row("a weight of another shape")(
    lambda p: p.weights(lambda t: t.update({"model.norm.weight": torch.ones(31)}))
)
row("a weight of integers")(
    lambda p: p.weights(lambda t: t.update({"model.norm.weight": torch.ones(32).char()}))
)
row("only pickled weights")(
    lambda p: ((p.model / "model.safetensors").rename(p.model / "model.bin"), p.recipe())[-1]
)
row("a pickle named safetensors")(
    lambda p: (torch.save({"a": torch.ones(1)}, p.model / "model.safetensors"), p.recipe())[-1]
)
row("a weight file that was cut off")(lambda p: p.bytes(lambda data: data[:-10]))
row("a header longer than its file")(
    lambda p: p.bytes(lambda data: (1 << 40).to_bytes(8, "little") + data[8:])
)
row("an empty weight file")(lambda p: p.bytes(lambda data: b""))
row("an index that names a file outside")(lambda p: p.index({"weight_map": {"a": "../../x.safetensors"}}))
row("an index that names an absolute path")(lambda p: p.index({"weight_map": {"a": "/etc/x.safetensors"}}))
row("an index without a map")(lambda p: p.index({"weight_map": ["model.safetensors"]}))
row("a shard that is missing")(
    lambda p: p.index({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
)
row("a tokenizer.json that is torn")(
    lambda p: ((p.model / "tokenizer.json").write_text('{"version": '), p.recipe())[-1]
)
row("a tokenizer.json of something else")(
    lambda p: ((p.model / "tokenizer.json").write_text("{}"), p.recipe())[-1]
)
row("a model without a tokenizer")(lambda p: ((p.model / "tokenizer.json").unlink(), p.recipe())[-1])
row("a tokenizer with more tokens than the model")(
    lambda p: (
        p.weights(
            lambda t: t.update(
                {n: t[n][:300].clone() for n in ("model.embed_tokens.weight", "lm_head.weight")}
            )
        ),
        p.config(vocab_size=300),
    )[-1]
)
row("no chat template where one is asked for")(lambda p: p.recipe(None, "data.chat_template=true"))
row("a chat template that fails")(
    lambda p: (
        (p.model / "chat_template.jinja").write_text("{{ 1 / none.x }}"),
        p.recipe(None, "data.chat_template=true"),
    )[-1]
)
row("NaN in the weights")(
    lambda p: (p.weights(lambda t: t["model.norm.weight"].fill_(math.nan)), ["generate", p.model, "x"])[-1]
)
row("infinite weights")(
    lambda p: (p.weights(lambda t: t["lm_head.weight"][3].fill_(math.inf)), ["generate", p.model, "x"])[-1]
)
row("no room for a prompt")(lambda p: ["generate", p.model, "x", "--max-new-tokens", 250])
row("a file that is not GGUF")(lambda p: p.recipe(model={"path": str(p.write("x.gguf", "no GGUF at all"))}))
row("a GGUF file that is torn")(
    lambda p: p.recipe(model={"path": str(p.write("x.gguf", b"GGUF\3\0\0\0" + bytes(8) + b"\5" + bytes(7)))})
)

# Run folders
row("an update on another base")(
    lambda p: [
        "export",
        p.spoilt_run(
            lambda run: shutil.copy(run / "updates/01-TWO.safetensors", run / "updates/00-ONE.safetensors")
        ),
        p.out,
    ]
)
row("an update that was cut off")(
    lambda p: ["export", p.spoilt_run(cut("updates/01-TWO.safetensors")), p.out]
)
row("an update that was changed")(
    lambda p: ["export", p.spoilt_run(flip("updates/01-TWO.safetensors")), p.out]
)
row("a run's recipe that was changed")(lambda p: ["export", p.spoilt_run(flip("recipe.json")), p.out])
row("scores that were changed")(lambda p: ["report", p.spoilt_run(flip("scores.jsonl"))])
row("scores that were lost")(lambda p: ["report", p.spoilt_run(lambda run: (run / "scores.jsonl").unlink())])
row("hashes that were cut off")(lambda p: ["report", p.spoilt_run(cut("seals.json"))])
row("base weights that were changed")(
    lambda p: (
        p.weights(lambda t: t["model.norm.weight"].add_(1)),
        shutil.copy(p.model / "model.safetensors", p.base),
        ["generate", f"{p.run}@ONE", "x"],
    )[-1]
)
row("a folder that is not a run")(lambda p: ["report", p.data])
row("a report of an unknown kind")(lambda p: ["report", p.run, "--out", p.out.with_suffix(".pdff")])
row("a figure that doesn't exist")(
    lambda p: ["report", p.run, "--out", p.out.with_suffix(".pdf"), "--figure", "matrx"]
)
row("a sweep of which nothing is finished")(
    lambda p: [
        "report",
        (p.write("out2/seqlora/seed=1/recipe.json", (p.run / "recipe.json").read_text())).parents[2],
        "--out",
        p.out.with_suffix(".tex"),
    ]
)

# Predictions and sweeps
row("predictions that aren't there")(lambda p: ["score", "FOMC", "nowhere.json"])
row("a folder in place of predictions")(lambda p: ["score", "FOMC", p.data])
row("predictions that are not JSON")(lambda p: p.predictions("[{"))
row("predictions that are not a list")(lambda p: p.predictions({}))
row("a prediction that is not text")(
    lambda p: p.predictions([{"prompt": "a", "prediction": None, "answer": "b"}])
)
row("a prediction of 1 MB")(
    lambda p: p.predictions([{"prompt": "a", "prediction": "word " * 200_000, "answer": "b"}])
)
row("predictions nested without end")(lambda p: p.predictions("[" * 100_000))
row("a sweep without arms")(lambda p: p.sweep(arms={}))
row("a sweep with a key twice")(lambda p: p.sweep("output: x\n"))
row("a sweep of a million runs")(
    lambda p: p.sweep(grid={"seed": list(range(1000)), "data.max_train_examples": list(range(1, 1001))})
)
row("an arm that is not a folder's name")(lambda p: p.sweep(arms={"../x": {}}))
row("a sweep of a recipe that isn't there")(lambda p: p.sweep(recipe="quikstart"))
row("a setting that a run would refuse")(lambda p: p.sweep(set={"data.root": "nowhere"}))


@pytest.fixture(scope="module")
def finished(tiny_llama, toy_stream, tmp_path_factory):
    """A small run that is finished, on a model of its own."""
    folder = tmp_path_factory.mktemp("finished")
    model = shutil.copytree(tiny_llama, folder / "base")
    return runs.run(
        parse_recipe(
            {
                "model": {"path": str(model)},
                "data": {"root": str(toy_stream), "tasks": ["ONE", "TWO"], "epochs": 1},
                "method": {"name": "seqlora", "fresh": True, "rank": 2},
                "optim": {"lr": 1e-2, "batch_size": 8},
                "eval": {"max_new_tokens": 2},
                "output": str(folder / "done"),
                "checkpoint": False,
            }
        )
    ).path


@pytest.fixture
def place(tiny_llama, toy_stream, finished, tmp_path):
    place = Place(tmp_path, tiny_llama, toy_stream, finished)
    yield place
    shutil.copy(tiny_llama / "model.safetensors", place.base)


def call(capsys, *args):
    """(exit code, lines on standard error) of one command."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in args])
    return caught.value.code, capsys.readouterr().err.splitlines()


def test_the_page_has_a_row_for_every_test():
    assert len(ROWS) > 100 and set(DOCUMENTED) == set(ROWS)


@pytest.mark.parametrize("wrong", ROWS)
def test_said_in_one_sentence_and_nothing_is_written(wrong, place, capsys):
    args = ROWS[wrong](place)
    before, began = sorted(place.folder.rglob("*")), time.monotonic()
    code, lines = call(capsys, *args)
    assert code == 2 and len(lines) == 1, lines
    said = DOCUMENTED.get(wrong, "?").replace("\\|", "|")
    assert re.fullmatch("error: .*" + re.escape(said).replace("…", ".*") + ".*", lines[0]), lines[0]
    assert len(lines[0]) < 900 and not re.search(r"Traceback|Error\(|<class|[\x00-\x1f]", lines[0])
    assert (
        sorted(place.folder.rglob("*")) == before and not place.out.exists() and time.monotonic() - began < 20
    )


def test_byte_order_marks_line_ends_and_links_do_no_harm(place, capsys):
    place.records(b"\xef\xbb\xbf" + json.dumps([GOOD] * 3, indent=1).replace("\n", "\r\n").encode())
    _, file = place.recipe()
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    weights = place.model / "model.safetensors"
    weights.rename(place.folder / "blob")
    weights.symlink_to(place.folder / "blob")
    assert call(capsys, "plan", file) == (0, []) and not place.out.exists()


def test_all_that_is_wrong_is_told_at_once(place, capsys):
    place.records([{"prompt": 3.5, "answer": ""}])
    (place.model / "tokenizer.json").unlink()
    code, lines = call(capsys, *place.recipe(output="/proc/run"))
    assert code == 2 and len(lines) == 4 and all(line.startswith("error: ") for line in lines)

"""README.md and docs/*.md: commands run or parse, recipes are valid, links lead somewhere, generated parts
are current.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import BLOCK, PAGES, PROGRAMS, ROOT, check, named, plugin

from codyra_llm.cli import main
from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import parse_yaml
from codyra_llm.runtime import signals
from codyra_llm.store.folder import RunFolder
from codyra_llm.sweep.spec import load_sweep

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a checkout")
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:" + "|".join(map(re.escape, PROGRAMS)) + r") [^`]+)`")
PLACEHOLDERS = {
    "…": "recipes/quickstart.yaml",
    "RECIPE": "recipes/quickstart.yaml",
    "linear|block|step": "linear",
}

# How a command of an `sh` block is really run: what is put after the recipe, after the command, or in place
# of words.
FEW = [
    "model.path=models/smollm2-135m",
    "data.epochs=1",
    "data.max_prompt_tokens=48",
    "data.max_answer_tokens=8",
    "optim.batch_size=4",
    "eval.max_examples=2",
    "eval.max_new_tokens=3",
    "general.data=null",
]
TINY = ["data.root=data/LLM-CL-Benchmark_500", "data.tasks=[FOMC,ScienceQA]", *FEW]
# Of quickstart's method, where a command names no other: how many sequences the base writes by itself.
QUICK = [*TINY, "method.samples=8"]
AFTER = {
    "evaluate": ["data.max_prompt_tokens=48", "eval.max_examples=2", "eval.max_new_tokens=3"],
    "sweep": ["--report"],
    "bench": ["--rounds", "1", "--device", "cpu"],
}
SHAPES = {
    "linear": ["--shape", "12,8,20,3"],
    "block": ["--shape", "2,6,3", "--model", "models/smollm2-135m"],
    "head": ["--shape", "48,8,40,16"],
    "step": ["--batch", "2", "--examples", "2"],
}
INSTEAD = {
    "google/gemma-2b-it": "models/smollm2-135m",
    "some/adapter": "peft",
    "some/model": "models/smollm2-135m",
    "data/general": "mini",
    "CHECKPOINT": "models/smollm2-135m",
    "TASK": "letters",
}
ONLY_PARSED = {
    "model get": "fetches a package",
    "data get": "fetches TRACE",
    "git clone": "fetches a repository",
    "--general hub": "the hub's data",
    "--push": "writes to the hub",
    "bench gpu": "takes minutes; test_bench_gpu.py runs its small shapes",
}


def blocks(language):
    return [
        (page.name, found[2])
        for page in PAGES
        for found in BLOCK.finditer(page.read_text())
        if found[1] == language
    ]


def lines(kind):
    """(page, command) of every command in `sh` blocks, or of those in the text."""
    if kind == "sh":
        found = [
            (page, line) for page, text in blocks("sh") for line in text.replace("\\\n", " ").splitlines()
        ]
        return [(page, shlex.split(line, comments=True)) for page, line in found if line.strip()]
    text = [(page.name, BLOCK.sub("", page.read_text())) for page in PAGES]
    found = [(page, shlex.split(code, comments=True)) for page, body in text for code in INLINE.findall(body)]
    return [(page, [PLACEHOLDERS.get(word, word) for word in words]) for page, words in found]


@pytest.fixture(scope="module")
def place(tiny_llama, tmp_path_factory):
    """A folder that looks as the pages suppose: recipes, a model, data, named files of the pages, and a
    finished run, made by README's first command."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("recipes", "docs", "launch.sh", "constraints.txt", "pyproject.toml", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for task in load_benchmark("trace").tasks:
        (folder / "data/LLM-CL-Benchmark_500" / task).mkdir(parents=True)
        for split, numbers in (("train", range(8)), ("eval", range(8, 10)), ("test", range(10, 13))):
            rows = [{"prompt": f"{task} {i}: A, B or C?", "answer": "ABC"[i % 3]} for i in numbers]
            (folder / "data/LLM-CL-Benchmark_500" / task / f"{split}.json").write_text(json.dumps(rows))
    shutil.copytree(tiny_llama, folder / "models/smollm2-135m")
    for language in ("python", "yaml"):
        for _, text in blocks(language):
            if found := re.match(r"# (\w+\.(?:py|yaml))\n", text):
                (folder / found[1]).write_text(text)
    (folder / "hosts").write_text("localhost slots=2\n")
    (folder / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "predictions.json").write_text('[{"prompt": "p", "prediction": "A", "answer": "A"}]')
    done = subprocess.run(
        ["./launch.sh", "recipes/quickstart.yaml", *QUICK],
        cwd=folder,
        env=environment(),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "runs/quickstart", folder / "runs/x")
    for arm in ("one", "two"):  # a sweep's folder
        shutil.copytree(folder / "runs/quickstart", folder / "runs/compared" / arm / "seed=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(["export", "runs/x", "peft", "--format", "peft"])
    return folder


@pytest.fixture
def here(place, monkeypatch):
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(place)
    monkeypatch.setattr(signals, "listen", lambda: None)  # pytest keeps its signals
    return place


def environment():
    deciding = (
        "NNODES",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "ACCELERATE_CONFIG",
        "RANK",
        "WORLD_SIZE",
    )
    kept = {
        key: value for key, value in os.environ.items() if key not in deciding and not key.startswith("SLURM")
    }
    return {**kept, "PROCESSES": "1", "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}


def run(arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code


def small(words):
    """The same command on a tiny model and little data; None where it is parsed and no more, as launchers
    are: `place` has run README's first command, tests/test_launch*.py run the others' like."""
    command = " ".join(words)
    if any(reason in command for reason in ONLY_PARSED):
        return None
    words = [INSTEAD.get(word, word) for word in words]
    name = words[1]
    if words[0] == "codyra-llm":
        if name in ("run", "plan"):
            at = words.index(name) + 2
            recipe = words[at - 1]
            few = FEW if "mine/" in recipe else QUICK if "quickstart" in recipe else TINY
            return [*words[:at], *few, *words[at:]]
        return words + AFTER.get(name, []) + (SHAPES[words[2]] if name == "bench" else [])
    return None


def begin_own_benchmark(words, here):
    """The benchmark `mine` is there for every command but the one that begins it, in whatever order, and in
    whichever process, these run."""
    made = here / "mine"
    if words[1:4] == ["benchmark", "new", "mine"]:
        shutil.rmtree(made, ignore_errors=True)
    elif any(word.split("/")[0] == "mine" for word in words) and not made.is_dir():
        run(["benchmark", "new", "mine"])


@pytest.mark.parametrize("command", lines("sh"), ids=named)
def test_command_of_a_block(command, here):
    words = command[1]
    begin_own_benchmark(words, here)  # a recipe that it makes is read when the command is checked
    check(words)
    if not (reduced := small(words)):
        return
    with plugin():
        run(reduced[1:])


@pytest.mark.parametrize("command", lines("text"), ids=named)
def test_command_in_the_text(command, here):
    check(command[1])


def test_a_command_that_nothing_covers_fails(here):
    for words in (
        ["rsync", "a", "b"],
        ["codyra-llm", "trian", "x"],
        ["codyra-llm", "run", "quickstart", "method.rnk=3"],
        ["torchrun", "nowhere.yaml"],
        ["pip", "install", "codyra-llm[vlm]"],
        ["python", "-m", "codyra_llm", "run", "x"],
    ):
        with pytest.raises((AssertionError, Fault)):
            check(words)
    with pytest.raises(Exception, match="No such option"):
        check(["codyra-llm", "methods", "--jsn"])


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block[0])
def test_yaml_is_a_recipe_or_a_sweep(block, here):
    text = block[1]
    raw = parse_yaml(text, "block")
    if "arms" in raw:
        Path("block.yaml").write_text(text)
        assert load_sweep("block.yaml").runs()
    else:
        needed = {"model": {"path": "m"}, "data": {"root": "d"}, "method": "codyra", "output": "o"}
        parse_recipe(raw if "model" in raw else {**needed, **raw})


def test_python_of_readme(here):
    [(_, text)] = [block for block in blocks("python") if block[0] == "README.md"]
    given = "".join(f'"{setting}", ' for setting in TINY)
    assert '["method' in text
    exec(text.replace('["method', f'[{given}"method'), {})
    assert RunFolder(here / "runs/seqlora").summary["op"] is not None


def test_the_new_method_is_seqlora_at_weight_0_and_moves_less_with_more(here):
    """docs/extending.md's example through the trainer; the distance of the second task's adapter from the
    first's.
    """
    moved = {}
    for name, settings in {
        "seqlora": ["method=seqlora"],
        "0": ["method=anchor", "method.weight=0"],
        "9": ["method=anchor", "method.weight=9"],
    }.items():
        with plugin("anchor.py"):
            run(["run", "quickstart", *TINY, *settings, "optim.lr=1e-2", f"output=runs/anchor-{name}"])
            updates = RunFolder(here / f"runs/anchor-{name}").archive()
        one, two = (updates.load(i).adapters for i in range(2))
        moved[name] = sum(
            ((two[site].a - one[site].a).square().sum() + (two[site].b - one[site].b).square().sum()).item()
            for site in one
        )
    assert moved["0"] == moved["seqlora"] and moved["9"] < 0.7 * moved["seqlora"]

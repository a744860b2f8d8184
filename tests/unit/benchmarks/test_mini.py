"""mini-TRACE: same seed same bytes, disjoint splits, answers recomputed from the prompts by rules written
again.
"""

import hashlib
import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from codyra_llm.benchmarks.trace.mini import make, pretrain, skills
from codyra_llm.benchmarks.trace.mini.make import make_mini, mini_data
from codyra_llm.config.methods.sequential import REASONING_VARIANT
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.data.check import check_root
from codyra_llm.data.reasoning import reasoned_prompt
from codyra_llm.evaluate.generate import generate_ids

TASKS = ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]
RCL = METHODS["rcl"](METHODS["rcl"].Config(), 0)
SIZES = {"train": 400, "eval": 50, "test": 200}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mini")
    make_mini(out)
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The small model after two steps: its tokenizer and files are those of the whole pretraining."""
    out = tmp_path_factory.mktemp("model") / "small"
    pretrain.pretrain_mini(out, steps=2)
    return out


def read(root: Path, task: str, split: str) -> list[dict]:
    return json.loads((root / task / f"{split}.json").read_text(encoding="utf-8"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.json")}


def test_the_seed_decides_every_byte(root, tmp_path):
    make_mini(tmp_path / "again")
    make_mini(tmp_path / "other", seed=1)
    other = contents(tmp_path / "other")
    assert contents(tmp_path / "again") == contents(root)
    assert all(data != other[name] for name, data in contents(root).items())


@pytest.mark.parametrize("task", TASKS)
def test_layout_and_disjoint_splits(root, task):
    splits = {split: read(root, task, split) for split in SIZES}
    assert {split: len(records) for split, records in splits.items()} == SIZES
    records = sum(splits.values(), [])
    assert len({record["prompt"] for record in records}) == sum(SIZES.values())
    for record in records:
        assert record.keys() == {"prompt", "answer"}
        assert (
            record["prompt"] == record["prompt"].rstrip()
            and record["answer"] == record["answer"].lstrip() != ""
        )


def test_text_is_written_as_it_is(root):
    assert "态度".encode() in (root / "C-STANCE" / "test.json").read_bytes()


def stance(prompt: str) -> str:
    text, target = re.search(r"文本：\n(.*)\n对象：\n(.)\n态度：$", prompt).groups()
    negated, verb = re.search(f"[我你他她]([很不])(.{{1,2}}){target}", text).groups()
    side = (verb in "喜欢支持赞成爱") - (verb in "讨厌反对恨怕")
    return {1: "A", -1: "B", 0: "C"}[-side if negated == "不" else side]


def hawkish(prompt: str) -> str:
    move, lever = re.search(r"will (\w+) (\w+) as", prompt).groups()
    up = {"raise": 1, "lift": 1, "cut": -1, "reduce": -1, "hold": 0, "discuss": 0}[move]
    return {-1: "A", 1: "B", 0: "C"}[up * (1 if lever in ("rates", "reserves") else -1)]


def summary(prompt: str) -> str:
    item, vote = re.search(r"Next is the (\w+ \w+)\..* I vote (yes|no)\.", prompt, re.DOTALL).groups()
    return f"A motion {'adopting' if vote == 'yes' else 'rejecting'} the {item}."


def next_line(prompt: str) -> str:
    verb, name = re.search(r"def (\w+?)_.* <EOL> (\w+) = .* <EOL>$", prompt).groups()
    lines = {"get": "return X", "set": "self . X = X", "show": "print ( X )", "test": "assert X"}
    return lines[verb].replace("X", name)


def choice(prompt: str) -> str:
    kind = re.search(r"Which is (an animal|a thing)\?", prompt).group(1)
    alive = {"dog", "cat", "bird", "fish", "horse", "cow", "pig", "sheep"}
    fitting = [
        (letter, word)
        for letter, word in re.findall(r"([ABC])\. (\w+)", prompt)
        if (word in alive) == (kind == "an animal")
    ]
    assert len(fitting) == 1
    return f"{fitting[0][0]}\n{fitting[0][1]} is {kind}."


def left(prompt: str) -> str:
    have, verb, change = re.search(r"has (\d) \w+ and (\w+) (\d)\. How many now", prompt).groups()
    sign = {"buys": 1, "finds": 1, "gets": 1, "sells": -1, "loses": -1, "gives": -1}[verb]
    return str(int(have) + sign * int(change))


def salt(prompt: str) -> str:
    return min(re.findall(r"(\d) mol (?:acid|base)", prompt))


def simple(prompt: str) -> str:
    subject, verb, rest = re.search(
        r"Paragraph:\n(\w+ \w+), .* ist, (\w+) (.*)\n\nSimplification:", prompt
    ).groups()
    plain = dict(
        zip(
            ["erblickt", "erwirbt", "beseitigt", "fertigt", "benötigt", "veräußert", "entdeckt", "bewundert"],
            ["sieht", "kauft", "löscht", "baut", "braucht", "gibt", "findet", "mag"],
            strict=True,
        )
    )
    return f"{subject} {plain[verb]} {rest}"


RULES = dict(zip(TASKS, [stance, hawkish, summary, next_line, choice, left, salt, simple], strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_follows_from_the_prompt(root, task):
    for split in SIZES:
        for record in read(root, task, split):
            assert record["answer"] == RULES[task](record["prompt"]), record


def kinds(prompt: str, answer: str) -> str:
    living = ["dog", "cat", "bird", "fish", "horse", "cow", "pig", "sheep"]
    words = re.findall(r"\n[ABC]\. (\w+)", prompt)
    return " ".join(f"{word} is {'an animal' if word in living else 'a thing'}." for word in words)


def operation(prompt: str, answer: str) -> str:
    have, change = map(int, re.findall(r"\d", prompt))
    return f"{have} {'+' if int(answer) > have else '-'} {change} = {answer}."


# The reasoning, from plain prompt and answer; after it comes the second entry, or before it in Py150.
REASONS = {
    "C-STANCE": (lambda p, a: {"A": "好", "B": "坏", "C": "平"}[a], "\n回答："),
    "FOMC": (lambda p, a: {"A": "loose", "B": "tight", "C": "same"}[a], "\nAnswer:"),
    "MeetingBank": (
        lambda p, a: "The {} is {}.".format(
            *re.search(r"is the (\w+ \w+)", p).groups(), "in" if "vote yes" in p else "out"
        ),
        "Therefore, the summary of the meeting transcripts is:\n",
    ),
    "Py150": (
        lambda p, a: "self . {} ( {} )".format(*re.search(r"def ([a-z]+)_.* (\w+) =", p).groups()),
        "\nReasoning:",
    ),
    "ScienceQA": (kinds, "\nAnswer:"),
    "NumGLUE-cm": (operation, "\nAnswer:"),
    "NumGLUE-ds": (lambda p, a: re.search(f"{a} mol (acid|base)", p).group() + ".", "\nAnswer:"),
    "20Minuten": (lambda p, a: a.split()[2], "\nAnswer:"),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_variant_with_reasoning_holds_the_training_examples_and_rcl_reads_its_answers(root, task):
    plain, variant = read(root, task, "train"), read(root / REASONING_VARIANT, task, "train")
    assert sorted(path.name for path in (root / REASONING_VARIANT / task).iterdir()) == ["train.json"]
    why, marker = REASONS[task]
    for record, reasoned in zip(plain, variant, strict=True):
        prompt, answer = record["prompt"], record["answer"]
        parts = why(prompt, answer), marker, answer
        assert reasoned["answer"] == "".join(parts[::-1] if task == "Py150" else parts)
        assert reasoned["prompt"] == reasoned_prompt(task, prompt) != prompt
        assert RCL.parse_answer(task, reasoned["answer"]) == answer


def test_the_plain_files_are_those_of_the_first_version(root):
    """Scores of runs on them stay comparable; only a new `DATA_VERSION` with other figures may change
    this.
    """
    digest = hashlib.sha256()
    for name, data in sorted(contents(root).items()):
        if REASONING_VARIANT not in name:
            digest.update(name.encode() + data)
    assert digest.hexdigest() == "2070de7a86a9b833f6d762eab8d5665df29bd23b9db983967f924de9801f00e2"


def test_check_of_a_mini_folder_leaves_the_variant_to_a_check_of_its_own(root):
    report = check_root(root)
    assert list(report["variants"][root.name]) == sorted(TASKS) and not report["faults"] + report["warnings"]


@pytest.mark.parametrize("task", ["C-STANCE", "FOMC", "ScienceQA"])
def test_labels_are_balanced(root, task):
    counts = Counter(record["answer"][0] for record in read(root, task, "train"))
    # A third of 400 each: 133, and more than four standard deviations (9.4) off would be a skewed generator.
    assert set(counts) == set("ABC") and all(abs(count - 133) < 40 for count in counts.values())


def test_pretraining_never_sees_a_probe(root):
    """Other seeds included: whether a prompt is held out depends on its text alone."""
    seen = {prompt for seed in range(2) for prompt, _ in skills.skill_records(random.Random(seed), 20_000)}
    probes = sorted(path.name for path in (root / "general").iterdir())
    assert probes == sorted(skills.PROBES) and len(probes) == 4
    for probe in probes:
        records = read(root, f"general/{probe}", "test")
        assert len({record["prompt"] for record in records}) == 100
        assert not seen & {record["prompt"] for record in records}
    assert not seen & {record["prompt"] for task in TASKS for record in read(root, task, "test")}


def test_tokenizer_adds_bos_once_and_keeps_sequences_short(root, small):
    tokenizer = AutoTokenizer.from_pretrained(small)
    for task in TASKS:
        for record in read(root, task, "test"):
            ids = tokenizer(record["prompt"])["input_ids"]
            answer = tokenizer(record["answer"], add_special_tokens=False)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:] + answer
            assert len(ids + answer) <= 50 and len(answer) <= 12
            assert tokenizer.decode(ids[1:] + answer) == record["prompt"] + record["answer"]
    assert tokenizer.decode(tokenizer("Ω~ŷ漢\t", add_special_tokens=False)["input_ids"]) == "Ω~ŷ漢\t"


def test_small_model_loads_with_finite_weights_and_generates(small):
    model = AutoModelForCausalLM.from_pretrained(small, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(small)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in model.parameters()) and model.config.use_cache
    assert len(tokenizer) == model.config.vocab_size and list(small.glob("*.safetensors"))
    ids = tokenizer(["Reverse: dog cat\nAnswer:"], return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape[1] == ids.input_ids.shape[1] + 3


def dtypes(folder: Path) -> dict[str, str]:
    """The dtype of every tensor in a model folder, by name."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}


def test_a_shipped_base_is_as_the_pretraining_writes_it(small):
    shipped = Path(make.__file__).parent / "bases"
    assert {path.name for path in shipped.iterdir()} == set(make.BASES)
    for base in shipped.iterdir():
        assert {path.name for path in base.iterdir()} == {path.name for path in small.iterdir()}
        assert dtypes(base) == dtypes(small) and set(dtypes(base).values()) == {"BF16"}
        assert (base / "model.safetensors").stat().st_size < 1_000_000


# The weights' file of each, as the results of benchmarks/trace/results were measured with.
WIDENED = {
    "mini": "bdf520c0de5d1723cb51d80f44fdbe0198e51e13e4ff9d0993775746aafa8075",
    "mini-1": "bc0bc1fb827dd87ae7c34abb7102b938bb4e7d711b5a64a2ef1106b2f222c7cb",
    "mini-2": "bc6e74ae2b53cb7c40efa75391ec7c7f82b0a0a12ba09e187f30ca874f81b227",
}


@pytest.mark.parametrize("name", make.BASES)
def test_a_base_is_unpacked_to_the_same_float32_everywhere(tmp_path, monkeypatch, name):
    monkeypatch.setenv("CODYRA_CACHE", str(tmp_path))
    folder = make.mini_model(name)
    assert folder.parent == tmp_path
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == WIDENED[name]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == config["torch_dtype"] == "float32"


@pytest.mark.parametrize("name", make.BASES)
def test_a_shipped_base_knows_the_general_skills(root, name):
    folder = make.mini_model(name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    records = read(root, "general/successor", "test")[:40]
    prompts = [tokenizer(record["prompt"])["input_ids"] for record in records]
    answers = generate_ids(model.eval(), prompts, 12, [tokenizer.eos_token_id])
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    right = [text.strip() == r["answer"].strip() for text, r in zip(texts, records, strict=True)]
    assert right.count(True) >= 36


def test_packed_examples_do_not_see_each_other(small):
    """The summed loss of packed rows equals that of every example alone."""
    tokenizer = AutoTokenizer.from_pretrained(small)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    examples = pretrain.encode(tokenizer, skills.skill_records(random.Random(0), 24))

    def loss(batch: dict[str, list[int]]) -> float:
        tensors = {name: torch.tensor([ids]) for name, ids in batch.items()}
        mean = model(**tensors, use_cache=False).loss
        return float(mean.double() * (tensors["labels"] != -100).sum())

    with torch.no_grad():
        packed = sum(loss(row) for row in pretrain.pack(examples))
        assert packed == pytest.approx(sum(loss(example) for example in examples), rel=1e-5)


def test_cache_is_made_once_by_many(tmp_path, monkeypatch):
    monkeypatch.setenv("CODYRA_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(
        make, "make_mini", lambda out, seed: (calls.append(seed), make_mini(out, seed, 4, 2, 2))
    )
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: mini_data(seed=3), range(4)))
    assert calls == [3] and len(folders) == 1
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [folders.pop().name]


def test_a_failed_making_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CODYRA_CACHE", str(tmp_path))

    def fail(out: Path, seed: int) -> None:
        (out / "FOMC").mkdir(parents=True)
        raise OSError("disk full")

    monkeypatch.setattr(make, "make_mini", fail)
    with pytest.raises(Fault, match="disk full"):
        mini_data()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]

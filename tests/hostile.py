"""What others bring, spoilt: a folder with all of it, good, and a way to say what a command says in bounded
time."""

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from codyra_llm.cli import main

SECONDS = 20  # of computing; by the clock a busy machine may take longer
HANGS = 120  # seconds by the clock
DROP = object()  # a key that a task is to be without
LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
Table = dict[str, tuple[Callable, tuple[str, ...]]]


def adder(cases: Table) -> Callable:
    """`case(name, make, *words)`: `make(place)` returns the arguments of a command, `words` are in what it
    says."""

    def case(name: str, make: Callable, *words: str) -> None:
        assert name not in cases
        cases[name] = make, words

    return case


class Place:
    """A folder with a recipe, data, a model, an adapter and a task of general ability, all good."""

    def __init__(self, folder: Path, model: Path, data: Path):
        self.folder, self.data = folder, data
        self.model = Path(shutil.copytree(model, folder / "model"))
        self.general = folder / "general"
        self.task = {
            "task": "own",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": "own.json"}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }

    def recipe(self, **sections: dict) -> list:
        raw = {
            "model": {"path": str(self.model)},
            "data": {"root": str(self.data), "tasks": ["ONE"], **sections.pop("data", {})},
            "method": {"name": "seqlora", "rank": 2},
            "eval": {"max_new_tokens": 2},
            "output": str(self.folder / "out"),
            **sections,
        }
        (self.folder / "r.yaml").write_text(yaml.safe_dump(raw))
        return ["plan", self.folder / "r.yaml"]

    def template(self, text: str) -> list:
        (self.model / "chat_template.jinja").write_text(text)
        return self.recipe(data={"chat_template": True})

    def config(self, file: str = "config.json", **values: object) -> list:
        path = self.model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return self.recipe()

    def adapter(self, tensors: bool = True, **values: object) -> list:
        folder = self.folder / "adapter"
        folder.mkdir()
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(self.model),
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(config | values))
        site = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
        sizes = {"A": (2, 32), "B": (32, 2)}
        found = {site.format(i, n): torch.ones(size) for i in range(2) for n, size in sizes.items()}
        if tensors:
            save_file(found, folder / "adapter_model.safetensors")
        return ["generate", folder, "Say", "--max-new-tokens", "2"]

    def suite(self, text: str | None = None, rows: object = None, **keys: object) -> list:
        """`plan` with a task of general ability whose file has other keys."""
        self.general.mkdir(exist_ok=True)
        good = [{"text": f"Say {i}", "answer": str(i), "options": ["a", "b"]} for i in range(3)]
        content = rows if isinstance(rows, str) else json.dumps(good if rows is None else rows)
        (self.general / "own.json").write_text(content)
        task = {key: value for key, value in {**self.task, **keys}.items() if value is not DROP}
        (self.general / "own.yaml").write_text(yaml.safe_dump(task) if text is None else text)
        return self.recipe(general={"data": str(self.general), "tasks": ["own"]})

    def files(self, files: object, **keys: object) -> list:
        return self.suite(dataset_kwargs={"data_files": files}, **keys)

    def choices(self, **keys: object) -> list:
        """A task of multiple choice with other keys."""
        good = {
            "output_type": "multiple_choice",
            "doc_to_choice": "options",
            "doc_to_target": 0,
            "generation_kwargs": DROP,
            "metric_list": [{"metric": "acc"}],
        }
        return self.suite(**{**good, **keys})


@contextmanager
def within(seconds: float):
    """Fails what takes longer, as far as Python can be interrupted."""

    def late(*_):
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def told(capsys, arguments) -> tuple[int, str]:
    """Exit code and standard error of one command, within the bound. What it raises fails the test."""
    began = time.process_time()
    with within(HANGS), pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert time.process_time() - began < SECONDS
    return caught.value.code, capsys.readouterr().err


def refused(case: tuple, place: Place, capsys) -> None:
    """That the command of a case is refused in sentences with its words, and writes nothing."""
    make, words = case
    code, said = told(capsys, make(place))
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and lines and "Traceback" not in said, said[-2000:]
    for word in words:
        assert re.search(word, said), f"{word!r} is not in {lines}"
    assert all(len(line) < 900 for line in lines) and not (place.folder / "out").exists()

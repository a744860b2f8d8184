"""The report: what the page holds, that foreign text stays text, that it loads nothing, and what several runs
say together.
"""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import Recipe, parse_recipe
from codyra_llm.core.files import write_json, write_jsonl
from codyra_llm.report.html import page
from codyra_llm.store.folder import RunFolder

VOID = {"meta", "br", "hr", "img", "link", "input"}


EVIL = "</details></div><script>alert(1)</script><img src=x onerror=alert(1)> & \"quoted\" 'too'"


TASKS = ["A<script>alert(1)<x>", "B|C", "D"]


MATRIX = [
    [80, None, None],
    [65.5, 71.25, None],
    [55, 50, 61],
]  # with the rows before it, every measure in closed form


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Texts, tags and attributes of a page; `open` is what was never closed, `wrong` what was closed out of
    order.
    """

    def __init__(self, source: str):
        super().__init__()
        self.open, self.wrong, self.tags, self.attributes, self.texts = [], [], set(), [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.texts.append(data.strip())


def score(step: int, task: str, value: float, kind: str = "task") -> dict:
    interval = {"mean": value, "low": value - 4, "high": value + 3, "n": 2}
    return {
        "after": TASKS[step - 1] if step else "base",
        "step": step,
        "task": task,
        "kind": kind,
        "headline": "exact_match",
        "score": value,
        "metrics": {"exact_match": interval},
        "empty": 0,
    }


def make(path, lift: float = 0.0, lose: float = 0.0, **overrides) -> RunFolder:
    """A run folder written by hand: `lift` on every score, `lose` off the last score of the first task."""
    recipe = _recipe(path, overrides)
    tasks = recipe.tasks
    write_json(path / "recipe.json", recipe.model_dump(mode="json"))
    write_json(path / "manifest.json", MANIFEST)
    write_jsonl(path / "scores.jsonl", _scores(tasks, lift, lose))
    for step, right in ((1, True), (3, False)):
        file = path / "predictions" / f"{step:02d}-{tasks[step - 1]}" / f"{tasks[0]}.jsonl"
        write_jsonl(file, _predictions(right))
    write_jsonl(path / "updates.jsonl", _updates(tasks))
    write_jsonl(path / "log.jsonl", _log(tasks))
    write_jsonl(
        path / "costs.jsonl",
        [{"task": task, "trained": 1234, "seconds": 2.5, "peak_bytes": 7 * 2**20} for task in tasks],
    )
    return RunFolder(path)


MANIFEST = {
    "codyra_llm": "0.1.0",
    "device": EVIL,
    "dtype": "torch.float32",
    "world_size": 1,
    "zero_stage": 0,
    "base": "0" * 64,
}


def _recipe(path, overrides: dict) -> Recipe:
    raw = {
        "model": {"path": "some/model"},
        "data": {"root": "data", "tasks": TASKS},
        "method": {"name": "codyra", "rank": 4},
        "output": str(path),
    }
    words = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return parse_recipe(override(raw, words)).resolved()


def _scores(tasks: list[str], lift: float, lose: float) -> list[dict]:
    """The base's, those of MATRIX with the last one of the first task changed, and general ability."""
    matrix = [[value if value is None else value + lift for value in row] for row in MATRIX]
    matrix[2][0] -= lose
    rows = [score(0, task, 20 + number) for number, task in enumerate(tasks)]
    rows.append(score(0, "probe", 90, "general"))
    for step, values in enumerate(matrix, 1):
        known = [(task, value) for task, value in zip(tasks, values, strict=False) if value is not None]
        rows += [score(step, task, value) for task, value in known]
    return [*rows, score(3, "probe", 85, "general")]


def _predictions(right: bool) -> list[dict]:
    found = "yes" if right else EVIL + "wrong"
    return [
        {"prompt": EVIL, "answer": "yes\x1b", "prediction": found, "exact_match": 100 * right},
        {"prompt": "kept", "answer": "no", "prediction": "no", "exact_match": 100},
    ]


def _updates(tasks: list[str]) -> list[dict]:
    return [
        {
            "task": task,
            "site": f"model.layers.{layer}.mlp.up_proj",
            "rank": 4,
            "kept": (number + layer) % 5,
            "update_norm": 0.5 + number,
            "drift": 1.5 + number,
            "surviving": 0.75,
        }
        for number, task in enumerate(tasks)
        for layer in range(2)
    ]


def _log(tasks: list[str]) -> list[dict]:
    return [
        {
            "task": task,
            "step": step + 1,
            "steps": 5,
            "loss": 5.0 - step,
            "lr": 1e-3 / (step + 1),
            "tokens": 64,
            "seconds": 0.5,
        }
        for task in tasks
        for step in range(5)
    ]


def written(folders: list[RunFolder], out, **settings) -> str:
    page.write(folders, out, **settings)
    return out.read_text(encoding="utf-8")


def frame_widths(pages: list[str], folder) -> list[int]:
    """How wide Chromium lays each page out in frames of 420 and of 1280 pixels."""
    sources = [re.sub(r"<meta http-equiv[^>]*>", "", page) for page in pages]  # so that it can be measured
    frames = "".join(
        f'<iframe width="{width}" srcdoc="{html.escape(source)}"></iframe>'
        for source in sources
        for width in (420, 1280)
    )
    (folder / "frames.html").write_text(
        f"{frames}<script>onload = () => document.body.dataset.widths = "
        "Array.from(document.querySelectorAll('iframe'), frame => "
        "frame.contentDocument.documentElement.scrollWidth)</script>",
        encoding="utf-8",
    )
    shown = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            (folder / "frames.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    return [int(width) for width in re.search(r'data-widths="([\d,]+)"', shown)[1].split(",")]

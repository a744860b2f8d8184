"""The model card of an export: a README.md with the hub's metadata. It is written from the run folder, its
benchmark and the base's files, and is the same every time.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.config.recipe import Recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.config.sections import TRACE
from codyra_llm.core.parsing import read_json, shown
from codyra_llm.evaluate.matrix import FORMULAS
from codyra_llm.metrics.text import versioned
from codyra_llm.models.tokenizer import DATE
from codyra_llm.report.grid import Cell, Grid, markdown, number, plain, word
from codyra_llm.report.summary import MEASURES, scored, summarised
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import ScoreRow

KINDS = {
    "merged": (
        "transformers",
        "finetune",
        "A plain model: the updates of the tasks are merged into the base's weights.",
    ),
    "peft": (
        "peft",
        "adapter",
        "A PEFT LoRA adapter: the sum of the tasks' updates on the base. Merged into it the weights "
        "equal those that were scored to rounding.",
    ),
    "gguf": (
        None,
        "quantized",
        "A GGUF file for llama.cpp and Ollama: the updates of the tasks are merged into the base's weights.",
    ),
    "stage": (
        None,
        "finetune",
        "The part of a run folder that answers as the model did; the base is not in it. Ask it with "
        "`codyra-llm generate FOLDER@TASK`.",
    ),
}


# Keys of a generation config that make answers differ from greedy ones, each with its neutral value; 0 where
# every value changes answers.
DECODING = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "suppress_tokens": 0,
    "bad_words_ids": 0,
}

LOADING = {
    "merged": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
```""",
    "peft": """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
```""",
    "gguf": """```text
llama-completion -m FILE.gguf -p PROMPT --temp 0 -no-cnv
ollama create NAME -f Modelfile
```""",
}

GGUF_CHATS = """```text
llama-server -m FILE.gguf      # POST /v1/chat/completions {"messages": [...], "temperature": 0}
ollama create NAME -f Modelfile
```"""


def render(
    base: Path, folder: RunFolder, after: int, without: int | None, kind: str, notes: Sequence[str] = ()
) -> str:
    """The card of the model after task `after` (-1: the base), exported as `kind` (of KINDS), less the update
    `without`. `notes`: further remarks on this export.
    """
    recipe = folder.recipe
    # A model that lacks an update was never scored.
    rows = _scored(folder, after) if without is None else []
    licence = _licence(base)
    title = f"{recipe.method.name} after {_stage(recipe, after)}"
    data = ModelCardData(
        base_model=_hub_id(recipe.model.path),
        library_name=KINDS[kind][0],
        pipeline_tag="text-generation",
        tags=["codyra_llm", "continual-learning", recipe.method.name],
        model_name=title,
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        eval_results=[_result(recipe, row) for row in rows] or None,
    )
    if data.base_model:
        data["base_model_relation"] = KINDS[kind][1]
    asked = _asked(recipe, after)
    remarks = [*_decoding(base, kind), *(_date(base) if asked[0] else []), *notes]
    caveats = [*_caveats(recipe, asked, rows, without, licence), *map(plain, remarks)]
    parts = [
        f"# {plain(title)}",
        KINDS[kind][2],
        _origin(recipe, after, without),
        *_loading(kind, asked),
        *_tables(folder, recipe, rows, after),
        "## What to know",
        "\n".join(f"- {line}" for line in caveats),
        "## How it was made",
        *_making(folder, recipe),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _scored(folder: RunFolder, after: int) -> list[ScoreRow]:
    return [row for row in folder.scores if row.step == after + 1 and row.score is not None]


def _stage(recipe: Recipe, after: int) -> str:
    """The name of the last task learnt."""
    return recipe.tasks[after] if after >= 0 else "no task"


def _hub_id(path: str) -> str | None:
    """The path where it names a model on the hub; the hub refuses anything else as base_model."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path)
    return path if named and not path.endswith(".gguf") and not os.path.exists(path) else None


def _licence(base: Path) -> dict[str, str]:
    """What the base's own README or config says about its licence; empty where neither mentions one."""
    keys = ("license", "license_name", "license_link")
    card = {}
    try:
        if (base / "README.md").is_file():
            card = ModelCard.load(base / "README.md", ignore_metadata_errors=True).data
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):  # an unreadable file says nothing about the licence
        return {}
    for source in (card, config):
        if isinstance(source.get("license"), str):
            texts = {key: source.get(key) for key in keys}
            return {key: text for key, text in texts.items() if isinstance(text, str)}
    return {}


def _result(recipe: Recipe, row: ScoreRow) -> EvalResult:
    assert row.score is not None, "rows without a score are left out"
    kind = "own-tasks"
    if row.general:
        kind = "general-ability"
    elif recipe.data.benchmark == TRACE and row.task in load_benchmark(TRACE).tasks:
        kind = "trace"
    return EvalResult(
        task_type="text-generation",
        dataset_type=kind,
        dataset_name=f"{kind}: {row.task}",
        dataset_config=row.task,
        dataset_split=None if row.general else recipe.eval.split,
        metric_type=row.headline,
        metric_name=_metric(row),
        metric_value=round(row.score, 4),
    )


def _metric(row: ScoreRow) -> str:
    return row.headline if row.general else versioned(row.headline)


def _origin(recipe: Recipe, after: int, without: int | None) -> str:
    learnt = recipe.tasks[: after + 1]
    order = ", ".join(plain(task) for task in learnt)
    missing = f" The update of {plain(recipe.tasks[without])} is left out." if without is not None else ""
    summary = plain(METHODS[recipe.method.name].summary)
    return (
        f"Base model: {plain(recipe.model.path)}. Method: {recipe.method.name} ({summary}). Learnt one after "
        f"the other: {order or 'nothing yet'} ({len(learnt)} of {len(recipe.tasks)} tasks).{missing}"
    )


def _asked(recipe: Recipe, after: int) -> tuple[list[str], list[str]]:
    """The tasks learnt whose prompts the model's chat template writes, and those whose prompts are plain
    text; of the base, those to be learnt."""
    learnt = recipe.tasks[: after + 1] or recipe.tasks
    chats = [task for task in learnt if recipe.by_template(task)]
    return chats, [task for task in learnt if task not in chats]


def _loading(kind: str, asked: tuple[list[str], list[str]]) -> list[str]:
    """How to load an export; DIR is its folder. `asked`: as `_asked` gives it."""
    if kind not in LOADING:
        return []
    chats, texts = asked
    if not chats:
        advice = (
            "Give prompts as plain text, as in training: no chat template, and completion endpoints of "
            "servers."
        )
    elif not texts:
        advice = (
            "Write prompts with the tokenizer's chat template, as in training: chat endpoints of servers."
        )
    else:
        advice = (
            f"As in training, write prompts of {_named(chats)} with the tokenizer's chat template (chat "
            f"endpoints of servers), and give those of {_named(texts)} as plain text (completion endpoints)."
        )
    example = GGUF_CHATS if kind == "gguf" and chats else LOADING[kind]
    return ["## How to load", example, advice]


def _named(tasks: list[str]) -> str:
    return ", ".join(map(plain, tasks))


def _tables(folder: RunFolder, recipe: Recipe, rows: list[ScoreRow], after: int) -> list[str]:
    columns = ["metric", "score", "examples"]
    of_tasks = [_line(row) for row in rows if not row.general]
    of_general = [_line(row) for row in rows if row.general]
    note = "0 to 100, in parentheses the 95 % interval over test examples."
    grids = [
        Grid("Scores", "task", columns, of_tasks, note),
        Grid("General ability", "task", columns, of_general, "0 to 100, tasks that were not trained on."),
    ]
    if rows and after + 1 == len(recipe.tasks):
        found = summarised(folder)
        lines = [
            (name, [number(found[name], "z.2f"), word(FORMULAS[name])])
            for name in MEASURES
            if found[name] is not None
        ]
        grids.append(Grid("Measures over the stream", "measure", ["value", "definition"], lines))
    return [markdown([grid]).rstrip() for grid in grids if grid.rows]


def _line(row: ScoreRow) -> tuple[str, list[Cell | None]]:
    return row.task, [word(_metric(row)), scored(row), number(row.interval.get("n"), "d")]


def _caveats(
    recipe: Recipe,
    asked: tuple[list[str], list[str]],
    rows: list[ScoreRow],
    without: int | None,
    licence: dict,
) -> list[str]:
    """What a reader should know before trusting or using the model, a sentence or two each. `asked`: as
    `_asked` gives it."""
    lines = _of_scores(recipe, rows)
    if without is not None:
        lines = ["This model was not scored as it is: one update is left out."]
    elif not rows:
        lines = ["No scores of this stage are in the run folder."]
    if recipe.model.quantization:
        lines.append(
            f"Trained on a base packed by {recipe.model.quantization}; what was scored and exported is the "
            "unpacked sum."
        )
    chats, texts = asked
    if not chats:
        lines.append("Prompts are plain text, without a chat template.")
    elif not texts:
        lines.append("Prompts are read with the tokenizer's chat template.")
    else:
        lines.append(
            f"Prompts of {_named(chats)} are read with the tokenizer's chat template, those of "
            f"{_named(texts)} as plain text."
        )
    if licence:
        lines.append("The licence is the base model's own; data may bring further terms.")
    else:
        lines.append(
            "The base's files say nothing of its licence, so none is named here; it applies to this "
            "model too."
        )
    return lines


def _of_scores(recipe: Recipe, rows: list[ScoreRow]) -> list[str]:
    """How these scores were measured, and what they can be compared with."""
    most, split, limit = recipe.eval.max_examples, recipe.eval.split, recipe.general.limit
    scored_on = f", the first {most} examples of each task at most." if most else "."
    lines = [
        f"Scored under protocol `{recipe.data.protocol}`, by greedy answers to the {split} split{scored_on}"
    ]
    if limit and any(row.general for row in rows):
        lines.append(f"General ability was measured on at most {limit} drawn examples of each task.")
    if split == "eval":
        lines.append("Scores of the eval split are no test scores.")
    lines.append(f"One run with seed {recipe.seed}: the intervals say nothing of the spread over seeds.")
    lines.append(
        "Not comparable with published TRACE tables unless base model, data variant, prompt lengths, "
        "decoding and metrics are the same there; the two protocols' accuracies differ for the same answers."
    )
    return lines


def _decoding(base: Path, kind: str) -> list[str]:
    """What in the base's generation config, which other tools follow, makes answers differ from those that
    were scored."""
    file = base / "generation_config.json"
    if kind not in ("merged", "peft") or not file.is_file():
        return []
    config = read_json(file, "the model's own")
    kept = {key: config[key] for key, none in DECODING.items() if config.get(key) and config[key] != none}
    if not kept:
        return []
    named = ", ".join(f"{key}={shown(value)}" for key, value in kept.items())
    return [
        f"The base's generation config sets {named}, which transformers and vLLM follow unless you "
        "override it. Scores are those of greedy answers: give do_sample=False (vLLM: temperature 0) and "
        "repetition_penalty=1."
    ]


def _date(base: Path) -> list[str]:
    """What to give to servers where the base's chat template asks for the day, if it is not told a date."""
    files = [base / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    if not any("strftime_now" in text and "date_string" in text for text in texts):
        return []
    return [
        f"The chat template writes a date, which was {DATE} in training; servers write today's unless they "
        f'are given date_string="{DATE}" (vLLM and llama.cpp: in a request\'s chat_template_kwargs).'
    ]


def _making(folder: RunFolder, recipe: Recipe) -> list[str]:
    versions = ", ".join(
        f"{name} {value}"
        for name, value in folder.manifest.items()
        if isinstance(value, str) and re.fullmatch(r"\d+(\.\w+)+(\+\w+)?", value)
    )
    text = json.dumps(recipe.model_dump(mode="json"), ensure_ascii=False, indent=1)
    outside = [_outside(name, origin) for name, origin in folder.manifest.get("plugins", {}).items()]
    return [
        "With the recipe below saved as recipe.json: `codyra-llm run recipe.json`. Versions: "
        f"{plain(versions)}.",
        *([f"In addition to codyra_llm: {plain('; '.join(outside))}."] if outside else []),
        f"<details><summary>Recipe, every setting</summary>\n\n```json\n{text}\n```\n\n</details>",
    ]


def _outside(name: str, origin: dict[str, str]) -> str:
    """What another user needs to get the same plug-in. The path of its file here is of no use elsewhere."""
    if "file" in origin:
        return f"{name} by --plugin {Path(origin['file']).name}, sha256 {origin['sha256']}"
    return f"{name}, {' '.join(origin.values())}"

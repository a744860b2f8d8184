"""Runs next to the published TRACE tables (benchmarks/trace/published.yaml), with what one has to know before
comparing them.
"""

from pathlib import Path

import yaml

from codyra_llm.benchmarks import trace  # pyright: ignore  # installed from the top level
from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.config.recipe import by_task
from codyra_llm.report.grid import Cell, Grid, number, word
from codyra_llm.report.groups import Run, grouped, labels, over
from codyra_llm.report.summary import summarised
from codyra_llm.store.folder import RunFolder


def comparisons(folders: list[RunFolder]) -> list[Grid]:
    """The two published tables, each with the values of these runs in front, and a table of caveats. Runs
    that differ only in seed are one row, as in the report on several runs."""
    data = yaml.safe_load(Path(trace.__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    runs = []
    for folder in folders:
        summary = summarised(folder)
        runs.append(Run(folder, summary, summary))
    groups = grouped(runs)
    names = labels([group[0].recipe for group in groups])
    if len(groups) > 1:
        names = [f"{number} {name}" for number, name in enumerate(names, 1)]
    own = {f"here: {name}": group for name, group in zip(names, groups, strict=True)}
    caveats = {name: _run(group) for name, group in own.items()} | data["caveats"]
    notes: list[tuple[str, list[Cell | None]]] = [(name, [word(text)]) for name, text in caveats.items()]
    return [_treelora(data, own), _trace(data, own), Grid("to compare them", "", ["what to know"], notes)]


def _treelora(data: dict, own: dict[str, list[Run]]) -> Grid:
    blank = [None] * (2 * len(data["models"]))  # two measures for each model
    rows = [
        (name, [*_own(group, "op", "bwt_treelora", "bwt_treelora_clipped"), *blank])
        for name, group in own.items()
    ]
    for name, pairs in data["treelora"].items():
        values = [number(value, "z.2f") for pair in pairs for value in pair]
        rows.append((name, [None, None, None, *values]))
    columns = [f"{model}: {measure}" for model in data["models"] for measure in ("OP", "forgetting")]
    return Grid(
        "TreeLoRA and CoDyRA",
        "method",
        ["here: OP", "here: forgetting", "here: forgetting, clipped", *columns],
        rows,
        "OP: higher is better; forgetting: lower is. TreeLoRA, arXiv 2506.10355, Tables 3 and 12; CoDyRA's "
        "project page, arXiv 2412.01004.",
    )


def _trace(data: dict, own: dict[str, list[Run]]) -> Grid:
    rows = [(name, [*_own(group, "op", "bwt"), None, _delta_r(group)]) for name, group in own.items()]
    for name, values in data["trace"].items():
        forms = ("z.1f", "+z.1f", "g", "+z.2f")
        rows.append((name, [number(value, form) for value, form in zip(values, forms, strict=True)]))
    return Grid(
        "TRACE",
        "method",
        ["OP", "BWT", "drop", "ΔR"],
        rows,
        "LLaMA-2-7B-Chat. OP, BWT and ΔR: higher is better; TRACE's ΔR is over MMLU, GSM8K, BBH, TyDiQA, "
        "BoolQ and PIQA. TRACE, Wang et al., arXiv 2310.06762.",
    )


def _own(group: list[Run], *keys: str) -> list[Cell | None]:
    summaries = [run.summary for run in group]
    cells = []
    for key in keys:
        cells.append(over([summary[key] for summary in summaries], "z.2f"))
    return cells


def _delta_r(group: list[Run]) -> Cell | None:
    return over([(run.summary["delta_r"] or {}).get("value") for run in group], "+z.2f")


def _run(group: list[Run]) -> str:
    """What one has to know of a group of runs here: base, protocol, order, training, scoring and seeds."""
    recipe = group[0].recipe
    data, scoring = recipe.data, recipe.eval
    orders = [
        f"order {number}"
        for number, tasks in load_benchmark("trace").orders.items()
        if list(tasks) == recipe.tasks
    ]
    order = (orders or ["none of the orders of TRACE's eight tasks"])[0]
    seeds = f"{len(group)} seeds" if len(group) > 1 else "1 seed"
    epochs, tokens = (_in_turn(value, recipe.tasks) for value in (data.epochs, scoring.max_new_tokens))
    return (
        f"Base {recipe.model.path}, protocol {data.protocol}, {order}, {seeds}. "
        f"Trained on {_most(data.max_train_examples)} of each task, epochs {epochs}, "
        f"prompts of at most {data.max_prompt_tokens} tokens, answers of at most {data.max_answer_tokens}. "
        f"Scored on {_most(scoring.max_examples)} of each task's {scoring.split} split, greedy answers of at "
        f"most {tokens} tokens.{_members(group)}"
    )


def _members(group: list[Run]) -> str:
    """What the group's ΔR is the mean over; empty without general ability."""
    members = dict.fromkeys(
        name for run in group for name in (run.summary["delta_r"] or {}).get("members", ())
    )
    if not members:
        return ""
    limit = group[0].recipe.general.limit
    questions = f", at most {limit} examples of each" if limit else ""
    return f" ΔR over {', '.join(members)}{questions}."


def _most(examples: int | None) -> str:
    return f"at most {examples} examples" if examples else "all examples"


def _in_turn(value: int | dict[str, int] | None, tasks: list[str]) -> str:
    """A setting's one value, or its values in the order of the tasks where they differ: `5,3,7`."""
    assert value is not None, "a resolved recipe has it"
    values = [str(by_task(value, task)) for task in tasks]
    return values[0] if len(set(values)) == 1 else ",".join(values)

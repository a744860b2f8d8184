"""Runs next to the published TRACE tables (benchmarks/trace/published.yaml), with what one has to know before
comparing them.
"""

from pathlib import Path

import yaml

from codyra_llm.benchmarks import trace  # pyright: ignore  # installed from the top level
from codyra_llm.config.benchmark import load_benchmark
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
        values = [number(value, ".2f") for pair in pairs for value in pair]
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
        forms = (".1f", "+.1f", "g", "+.2f")
        rows.append((name, [number(value, form) for value, form in zip(values, forms, strict=True)]))
    return Grid(
        "TRACE",
        "method",
        ["OP", "BWT", "drop", "ΔR"],
        rows,
        "LLaMA-2-7B-Chat. OP, BWT and ΔR: higher is better. TRACE, Wang et al., arXiv 2310.06762.",
    )


def _own(group: list[Run], *keys: str) -> list[Cell | None]:
    summaries = [run.summary for run in group]
    cells = []
    for key in keys:
        cells.append(over([summary[key] for summary in summaries], ".2f"))
    return cells


def _delta_r(group: list[Run]) -> Cell | None:
    return over([(run.summary["delta_r"] or {}).get("value") for run in group], "+.2f")


def _run(group: list[Run]) -> str:
    """What one has to know of a group of runs here: base, protocol, order, examples and seeds."""
    recipe = group[0].recipe
    orders = [
        f"order {number}"
        for number, tasks in load_benchmark("trace").orders.items()
        if list(tasks) == recipe.tasks
    ]
    order, most = (orders or ["none of the orders of TRACE's eight tasks"])[0], recipe.eval.max_examples
    scored = f"at most {most} examples of each task scored" if most else "all examples scored"
    train = f", at most {recipe.data.max_train_examples} trained on" if recipe.data.max_train_examples else ""
    seeds = f"{len(group)} seeds" if len(group) > 1 else "1 seed"
    return (
        f"Base {recipe.model.path}, protocol {recipe.data.protocol}, {order}, {recipe.eval.split} split, "
        f"{scored}{train}, {seeds}."
    )

"""Tables for the terminal, and a run's report in Markdown (report.md)."""

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from codyra_llm.config.recipe import Recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.evaluate.matrix import FORMULAS
from codyra_llm.report import answers, judged
from codyra_llm.report.grid import plain
from codyra_llm.report.summary import MEASURES, by_projection, change_in_words
from codyra_llm.store.rows import UpdateRow

COLUMNS = 80  # of a terminal; a score and the space around it take six


def methods_table() -> Table:
    """The methods' declarations, for the terminal."""
    columns = ("trains", "old data", "task id", "merges", "grows", "launches")
    out = Table(
        Column("method", no_wrap=True),
        *(Column(name, no_wrap=True) for name in columns),
        box=SIMPLE,
        padding=0,
        collapse_padding=True,
        caption="old data: needs earlier tasks' examples; task id: must be given the task at test; "
        "merges: a plain model after every task; grows: keeps or runs more with every task; "
        "DDP: data parallel",
    )
    yes = {True: "yes", False: ""}
    for method in METHODS.values():
        declared = method.declared()
        out.add_row(
            declared["name"],
            declared["trains"],
            yes[declared["old_data"]],
            yes[declared["task_id"]],
            yes[declared["merges"]],
            yes[declared["grows"]],
            _launches(declared["trains"], declared["max_zero_stage"]),
        )
    return out


def _launches(trains: str | None, stage: int) -> str:
    """How a method can be launched that runs up to this ZeRO stage."""
    if not trains:
        return "any"
    if not stage:
        return "DDP"
    return f"DDP, ZeRO-1..{stage}" if stage > 1 else "DDP, ZeRO-1"


def _change(found: dict) -> list[str]:
    """One line on ΔR, or none."""
    change = found.get("delta_r")
    return [change_in_words(change)] if change else []


def _cell(value: float | None) -> str:
    """A score as text; blank where not measured."""
    return "" if value is None else f"{value:z.1f}"


def table(found: dict) -> Group:
    """The scores for the terminal, with the measures below them: the matrix, or one row per task where the
    matrix would be too wide. Title and measures are lines of their own, since those of a table are broken at
    its width, which is small where there are few tasks."""
    fits = max(map(len, found["tasks"])) + 6 * len(found["tasks"]) < COLUMNS
    what = "after each task" if fits else "(after each task: report.md)"
    title = f"{found['method']}: score on each task{',' if fits else ''} {what}"
    scores = _matrix(found) if fits else _by_task(found)
    return Group(Text(title, style="table.title"), scores, Text(_measures(found), style="table.caption"))


def _measures(found: dict) -> str:
    """What is said below the scores, a line for each kind."""
    lines = ["   ".join(f"{name} {found[name]:z.2f}" for name in MEASURES if found[name] is not None)]
    if found.get("floor"):
        lines.append(f"{answers.FLOOR}, without a model: op {_cell(found['floor']['op'])}")
    lines += answers.sentences(found.get("answers", []), answers.floored(found))
    if found["general"]:
        changes = [
            f"{name} {_cell(scores.get('before'))} → {_cell(scores.get('after'))}"
            for name, scores in found["general"].items()
        ]
        lines += [f"general ability, before → after: {', '.join(changes)}", *_change(found)]
    return "\n".join(lines)


def _matrix(found: dict) -> Table:
    out = Table(
        Column("after", no_wrap=True),
        *(Column(task, justify="right") for task in found["tasks"]),
        box=SIMPLE,
        padding=0,
        collapse_padding=True,
    )
    trained = zip(found["tasks"], found["matrix"], strict=False)  # without training there is no matrix
    for task, row in [("base", found["zero_shot"] or []), *trained]:
        if row:
            out.add_row(task, *map(_cell, row))
    return out


def _by_task(found: dict) -> Table:
    """A row per task; the matrix is in report.md."""
    out = Table(
        Column("task", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in ("base", "just learnt", "at the end")),
        box=SIMPLE,
    )
    rows = found["matrix"]
    for i, task in enumerate(found["tasks"]):
        base = found["zero_shot"][i] if found["zero_shot"] else None
        learnt = rows[i][i] if i < len(rows) and i < len(rows[i]) else None
        last = rows[-1][i] if rows and i < len(rows[-1]) else None
        out.add_row(task, *map(_cell, (base, learnt, last)))
    return out


def updates_table(rows: list[UpdateRow]) -> list[str]:
    """Lines of a Markdown table of `by_projection`; cells are blank where a row has no value."""
    if not rows:
        return []
    lines = [
        "",
        "| task | projection | ranks kept | ‖ΔW‖ | drift ‖W - W₀‖ | share that survives the cast |",
        "|---|---|---|---|---|---|",
    ]
    for row in by_projection(rows):
        ranks = "" if row.rank is None else f"{row.kept} of {row.rank}"
        share = "" if row.surviving is None else format(row.surviving, ".4f")
        lines.append(
            f"| {plain(row.task)} | {row.projection} | {ranks} | {row.norm:.4f} | {row.drift:.4f} | {share} |"
        )
    return lines


def render(recipe: Recipe, found: dict, updates: list[UpdateRow]) -> str:
    """The report in Markdown: measures with their formulas, the matrix, general ability, what each task
    changed.
    """
    lines = [
        f"# {recipe.method.name} on {len(found['tasks'])} tasks",
        "",
        f"Base model {plain(recipe.model.path)}, protocol {found['protocol']}, seed {found['seed']}. Scores "
        "are 0 to 100.",
        "",
    ]
    for line in answers.sentences(found["answers"], answers.floored(found)):
        lines += [plain(line), ""]
    lines += [
        *_measures_lines(found),
        *_matrix_lines(found),
        *_general_lines(found),
        *judged.lines(found["open_ended"]),
        *_costs_lines(found["costs"]),
        *updates_table(updates),
    ]
    return "\n".join(lines) + "\n"


def _measures_lines(found: dict) -> list[str]:
    """A Markdown table of the measures, each with its formula."""
    lines = ["| measure | value | definition |", "|---|---|---|"]
    for name in MEASURES:
        value = "not measured" if found[name] is None else format(found[name], ".2f")
        lines.append(f"| {name} | {value} | {FORMULAS[name]} |")
    floor = found["floor"]
    if floor and floor["op"] is not None:
        lines.append(f"| op of the floor | {floor['op']:.2f} | {answers.FLOOR_SAID} |")
    return lines


def _matrix_lines(found: dict) -> list[str]:
    """The score matrix as a Markdown table, with the floor and the base above it where they are known."""
    tasks = [plain(task) for task in found["tasks"]]
    lines = [
        "",
        f"| after | {' | '.join(tasks)} |",
        "|---" * (len(tasks) + 1) + "|",
        f"| metric | {' | '.join(found['metrics'])} |",
    ]
    if found["floor"]:
        lines.append(_score_line(answers.FLOOR, found["floor"]["scores"]))
    if found["zero_shot"]:
        lines.append(_score_line("base", found["zero_shot"]))
    rows = zip(tasks, found["matrix"], strict=False)  # without training there is no matrix
    return lines + [_score_line(task, row) for task, row in rows]


def _score_line(name: str, scores: list[float | None]) -> str:
    return f"| {name} | {' | '.join(map(_cell, scores))} |"


def _general_lines(found: dict) -> list[str]:
    """A Markdown table of general ability and a sentence on ΔR, or none."""
    if not found["general"]:
        return []
    lines = ["", "| general ability | before | after |", "|---|---|---|"]
    for name, scores in found["general"].items():
        lines.append(f"| {plain(name)} | {_cell(scores.get('before'))} | {_cell(scores.get('after'))} |")
    for change in _change(found):
        lines += ["", f"{plain(change)}."]
    return lines


def _costs_lines(costs: dict | None) -> list[str]:
    """What training took, or nothing where it isn't known."""
    if not costs:
        return []
    peak = "not measured" if costs["peak_bytes"] is None else f"{costs['peak_bytes'] / 2**20:.0f} MiB"
    return [
        "",
        f"Training: {costs['trained']:,} parameters, {costs['seconds']:.0f} s, peak memory {peak}.",
    ]

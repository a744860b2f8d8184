"""What a score hides about a run's answers: one answer to nearly all prompts, empty answers, cut ones."""

from collections.abc import Collection, Iterable

from codyra_llm.evaluate.matrix import mean
from codyra_llm.store.rows import FloorRow, ScoreRow

# Reports mention a task where at least this share of its answers …
ALIKE = 0.9  # … is one and the same,
SOME = 0.05  # … is empty,
MANY = 0.5  # … or was cut.
FLOOR = "most frequent training answer"
FLOOR_SAID = f"op where each prompt of a task gets the task's {FLOOR}, without a model"


def noted(rows: list[ScoreRow], steps: int) -> list[dict]:
    """The rows of tasks just learnt, and those after the last of `steps` tasks, that have identical, empty or
    cut answers: {"task", "after", "of", "alike", "empty", "cut"}. `of`: the number of prompts; `alike`: the
    share that got the most frequent answer where that is at least ALIKE, else None; `empty`, `cut`: how many
    are."""
    found = []
    for row in rows:
        count = row.interval.get("n", 0)
        alike = _alike(row, count)
        remarks = {"alike": alike, "empty": row.empty, "cut": row.cut or 0}
        just_learnt_or_at_the_end = row.step == steps or row.after == row.task
        if just_learnt_or_at_the_end and any(remarks.values()):
            found.append({"task": row.task, "after": row.after, "of": count, **remarks})
    return found


def _alike(row: ScoreRow, count: int) -> float | None:
    """The share of the most frequent answer where it is high, else None; for a single prompt it means
    nothing."""
    if row.commonest is None or count < 2 or row.commonest < ALIKE:
        return None
    return row.commonest


def sentences(found: list[dict], floors: Collection[str] = (), many: float = MANY) -> list[str]:
    """From what `noted` found, a sentence on each kind of answers: on empty ones where their share is at
    least SOME, on cut ones where it is at least `many`. `floors`: the tasks that have a floor to compare
    with; general ability, which nothing is trained on, has none."""
    alike = [(row, f"{row['alike']:.0%} of {row['of']}") for row in found if row["alike"]]
    empty = [(row, f"{row['empty']} of {row['of']}") for row in found if _some_empty(row)]
    cut = [(row, f"{row['cut']} of {row['of']}") for row in found if _many_cut(row, many)]
    lines = []
    if alike:
        line = f"One and the same answer to at least {ALIKE:.0%} of the prompts: {_by_task(alike)}. "
        floored = dict.fromkeys(row["task"] for row, _ in alike if row["task"] in floors)
        compare = f"; compare {', '.join(floored)} with the {FLOOR}" if floored else ""
        lines.append(f"{line}Such a score shows nothing learnt from the prompts{compare}.")
    if empty:
        lines.append(f"Empty answers: {_by_task(empty)}.")
    if cut:
        lines.append(f"Answers cut at eval.max_new_tokens, before they ended: {_by_task(cut)}.")
    return lines


def _some_empty(row: dict) -> bool:
    return bool(row["empty"]) and row["empty"] >= SOME * row["of"]


def _many_cut(row: dict, many: float = MANY) -> bool:
    return bool(row["cut"]) and row["cut"] >= many * row["of"]


def _by_task(counted: list[tuple[dict, str]]) -> str:
    """`FOMC (50 of 50 after FOMC, 40 of 50 after ScienceQA), ...`"""
    by_task: dict[str, list[str]] = {}
    for row, count in counted:
        by_task.setdefault(row["task"], []).append(f"{count} after {row['after']}")
    return ", ".join(f"{task} ({', '.join(counts)})" for task, counts in by_task.items())


def tallied(runs: list[list[dict]]) -> dict:
    """What `noted` found in several runs of one arm, by task: in how many runs it had one answer ("alike"),
    and how many of how many answers were empty ("empty") or cut ("cut"), just after the task or at the
    end."""
    alike: dict[str, int] = {}
    for found in runs:
        for task in dict.fromkeys(row["task"] for row in found if row["alike"]):
            alike[task] = alike.get(task, 0) + 1
    rows = [row for found in runs for row in found]
    empty = _summed("empty", filter(_some_empty, rows))
    cut = _summed("cut", filter(_many_cut, rows))
    return {"runs": len(runs), "alike": alike, "empty": empty, "cut": cut}


def _summed(key: str, rows: Iterable[dict]) -> dict[str, list[int]]:
    """By task, how many answers are `key` (empty or cut), and of how many."""
    found: dict[str, list[int]] = {}
    for row in rows:
        had, of = found.get(row["task"], (0, 0))
        found[row["task"]] = [had + row[key], of + row["of"]]
    return found


def compared(arms: dict[str, dict]) -> list[str]:
    """From `tallied` by arm, a sentence on each kind of answers."""
    alike = []
    for arm, found in arms.items():
        runs = found["runs"]
        several = f" of {runs} runs" if runs > 1 else ""
        tasks = [f"{task} ({count}{several})" if several else task for task, count in found["alike"].items()]
        if tasks:
            alike.append(f"{arm}: {', '.join(tasks)}")
    empty, cut = _counted(arms, "empty"), _counted(arms, "cut")
    lines = []
    if alike:
        lines.append(
            f"One and the same answer to at least {ALIKE:.0%} of a task's prompts, just after the task or at "
            f"the end: {'; '.join(alike)}."
        )
    if empty:
        lines.append(f"Empty answers, just after the task or at the end: {'; '.join(empty)}.")
    if cut:
        lines.append(
            "Answers cut at eval.max_new_tokens, before they ended, just after the task or at the end: "
            f"{'; '.join(cut)}."
        )
    return lines


def _counted(arms: dict[str, dict], key: str) -> list[str]:
    """From `tallied` by arm, `ARM: TASK (HAD of OF), ...` for each arm that has such answers."""
    lines = []
    for arm, found in arms.items():
        counts = [f"{task} ({had} of {of})" for task, (had, of) in found[key].items()]
        if counts:
            lines.append(f"{arm}: {', '.join(counts)}")
    return lines


def mean_floor(runs: list[dict]) -> float | None:
    """The mean of the floor's OP over the summaries of some runs; None where one has none."""
    floors = [found.get("floor") for found in runs]
    return mean(floor and floor["op"] for floor in floors)


def floors(arms: dict[str, float | None]) -> dict[str, float]:
    """From `mean_floor` by arm, each distinct value with a label. The label names the arms where there are
    several values, as when arms learn other tasks."""
    by_value: dict[float, list[str]] = {}
    for arm, value in arms.items():
        if value is not None:
            # Means over different numbers of runs differ in their last bits.
            by_value.setdefault(round(value, 6), []).append(arm)
    found = {}
    for value, named in by_value.items():
        found[FLOOR if len(by_value) == 1 else f"{FLOOR}, of {', '.join(named)}"] = value
    return found


def floored(found: dict) -> list[str]:
    """The tasks of a summary that have a floor."""
    floor = found.get("floor")
    if not floor:
        return []
    pairs = zip(found["tasks"], floor["scores"], strict=False)  # a task may have been added without one
    return [task for task, score in pairs if score is not None]


def floor(tasks: list[str], rows: list[FloorRow], seen: int) -> dict | None:
    """{"scores", "op"}: the floor of each task, None where it was not recorded, and its mean over the `seen`
    first tasks, like OP; None for a run that recorded no floor."""
    by_task = {row.task: row.score for row in rows}
    scores = [by_task.get(task) for task in tasks]
    if scores.count(None) == len(scores):
        return None
    return {"scores": scores, "op": mean(scores[:seen])}

"""A report on a folder of tasks: sizes, duplicates, overlaps between splits, faults."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.table import Table

from codyra_llm.config.benchmark import PROBE, load_benchmark
from codyra_llm.config.sections import FILE
from codyra_llm.config.task import Task
from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import shown
from codyra_llm.core.terminal import REPLACEMENT, Terminal
from codyra_llm.data.examples import label_names
from codyra_llm.data.records import SPLITS, read_split
from codyra_llm.data.sources import read, remarks


def check_root(root: Path) -> dict:
    """Report on every task and split under `root`, a variant folder or a folder of variants; plain JSON
    values.

    {"root", "variants": {name: {task: {"splits": {split: stats}, "overlap": {"train/eval": n, ...}}}},
    "faults", "warnings", "notes"}. `duplicates` counts records whose prompt came earlier in the split;
    `overlap` counts distinct prompts that two splits share.
    """
    report = {"root": str(root), "variants": {}, "faults": [], "warnings": [], "notes": []}
    for variant in variants(root):
        for folder in task_folders(variant):
            report["notes"] += remarks(variant, folder.name, PROBE)
        tasks = {
            folder.name: check_task(
                f"{variant.name}/{folder.name}", partial(read_split, variant, folder.name), report
            )
            for folder in task_folders(variant)
        }
        report["variants"][variant.resolve().name] = tasks
    return report


def task_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that hold at least one split, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(sub for sub in folder.iterdir() if _holds_a_split(sub))


def _holds_a_split(folder: Path) -> bool:
    return any((folder / f"{split}.json").is_file() for split in SPLITS)


def variants(root: Path) -> list[Path]:
    """`root` itself when it holds tasks, or else the folders in it that do."""
    found = [root] if task_folders(root) else []
    if not found and root.is_dir():
        found = sorted(folder for folder in root.iterdir() if task_folders(folder))
    if not found:
        raise Fault(
            f"{root} holds no task folder: expected <task>/train.json, eval.json and test.json in it or in a "
            "folder such as LLM-CL-Benchmark_500; correct the path."
        )
    return found


def check_task(
    name: str, read: Callable[[str], list[dict]], report: dict, labels: tuple[str, ...] = ()
) -> dict:
    """Statistics of the splits that `read` gives and their overlaps; faults and warnings are added to
    `report`. `labels`: the answers of a task that classifies.
    """
    splits, prompts, overlap, answers = {}, {}, {}, {}
    for split in SPLITS:
        try:
            records = read(split)
        except Fault as fault:
            known = report["faults"]  # a file that is cut into splits is read for each of them
            known += [message for message in fault.messages if message not in known]
            continue
        splits[split] = statistics(records)
        prompts[split] = {record["prompt"] for record in records}
        answers[split] = Counter(record["answer"] for record in records)
        for count, what in doubtful(records, splits[split], labels):
            report["warnings"].append(f"{name}/{split}: {count} of {len(records)} records {what}.")
    for warning in unlearnable(answers, labels):
        report["warnings"].append(f"{name}: {warning}.")
    for a, b in itertools.combinations(prompts, 2):
        shared = len(prompts[a] & prompts[b])
        if shared:
            overlap[f"{a}/{b}"] = shared
            report["warnings"].append(
                f"{name}: {a} and {b} share {shared} prompts "
                f"({len(prompts[a])} and {len(prompts[b])} distinct)."
            )
    return {"splits": splits, "overlap": overlap}


def doubtful(records: list[dict], stats: dict, labels: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """What a user should look at in one split: how many records, and what is wrong with them. `stats`: their
    `statistics`; `labels`: the answers of a task that classifies."""
    answers = [record["answer"] for record in records]
    not_labels = [answer for answer in answers if labels and answer not in labels]
    hidden = answers if set(answers) == {"-1"} else []
    found = (
        (stats["duplicates"], "repeat an earlier prompt of the split"),
        (stats["empty_prompts"], "have an empty prompt, which only a tokenizer that adds BOS can answer to"),
        (
            stats["padded_answers"],
            "have an answer that begins or ends with white space, which decoding may drop, so that it "
            "never matches where a metric compares exactly",
        ),
        (stats["empty_answers"], "have an empty answer and can't be scored"),
        (len(not_labels), "have an answer that is none of the labels"),
        (len(hidden), "have the answer -1, the mark of labels that are kept secret, and can't be scored"),
        (stats["replacement_characters"], "hold U+FFFD, left by a lossy decoding"),
    )
    for count, what in found:
        if count:
            yield count, what


def unlearnable(answers: dict[str, Counter[str]], labels: tuple[str, ...]) -> Iterator[str]:
    """Labels that a split asks for and train does not have; `answers` of each split with their counts."""
    if "train" not in answers:
        return
    for split, counts in answers.items():
        for label in labels:
            if counts[label] and not answers["train"][label]:
                yield (
                    f"{counts[label]} of {counts.total()} records of {split} have the answer {shown(label)}, "
                    "which no record of train has"
                )


def statistics(records: list[dict]) -> dict:
    """Counts and lengths (in characters) of one split."""
    counts: Counter[str] = Counter()
    for record in records:
        prompt, answer = record["prompt"], record["answer"]
        if not prompt.strip():
            counts["empty prompt"] += 1
        if not answer.strip():
            counts["empty answer"] += 1
        elif answer != answer.strip():
            counts["padded answer"] += 1
        if REPLACEMENT in prompt or REPLACEMENT in answer:
            counts["replacement"] += 1
    prompts = [record["prompt"] for record in records]
    answers = [record["answer"] for record in records]
    return {
        "records": len(records),
        "duplicates": len(records) - len(set(prompts)),
        "empty_prompts": counts["empty prompt"],
        "padded_answers": counts["padded answer"],
        "empty_answers": counts["empty answer"],
        "replacement_characters": counts["replacement"],
        "prompt_mean": round(sum(map(len, prompts)) / len(records), 1),
        "prompt_max": max(map(len, prompts)),
        "answer_mean": round(sum(map(len, answers)) / len(records), 1),
        "answer_max": max(map(len, answers)),
    }


def print_check(report: dict) -> None:
    """Show a report of `check_root`: one table per variant, then warnings and faults."""
    console = Terminal()
    for variant, tasks in report["variants"].items():
        console.print(_table(variant, tasks))
    for kind, style in (("notes", "cyan"), ("warnings", "yellow"), ("faults", "red")):
        for message in report.get(kind, ()):
            console.print(f"{kind[:-1]}: {message}", style=style, soft_wrap=True)
    console.print(f"{len(report['faults'])} faults, {len(report['warnings'])} warnings")


def _table(variant: str, tasks: dict[str, dict]) -> Table:
    """The splits of a variant's tasks, a row each."""
    table = Table("task", "split", title=variant)
    for title in (
        "records",
        "repeated\nprompts",
        "empty\nanswers",
        "prompt chars\nmean / max",
        "answer chars\nmean / max",
        "prompts\nshared with",
    ):
        table.add_column(title, justify="right")
    for task, checked in tasks.items():
        for split, stats in checked["splits"].items():
            table.add_row(
                task,
                split,
                str(stats["records"]),
                str(stats["duplicates"]),
                str(stats["empty_answers"]),
                f"{stats['prompt_mean']:.0f} / {stats['prompt_max']}",
                f"{stats['answer_mean']:.0f} / {stats['answer_max']}",
                _shared(split, checked["overlap"]),
            )
        table.add_section()
    return table


def _shared(split: str, overlap: dict[str, int]) -> str:
    """With which later splits this one shares prompts, and how many."""
    start = f"{split}/"
    return ", ".join(
        f"{pair.removeprefix(start)} {count}" for pair, count in overlap.items() if pair.startswith(start)
    )


def check(root: Path, benchmark: str | None = None) -> dict:
    """The report of `check_root`; of the tasks that a benchmark.yaml names, that of `benchmark`, or the one
    in `root` where there is one, with `notes` on files that are read otherwise than their names say.
    """
    if benchmark is None and not (root / FILE).is_file():
        return check_root(root)
    report = {"root": str(root), "variants": {}, "faults": [], "warnings": [], "notes": []}
    variant = root.resolve().name
    report["variants"][variant] = {
        name: _checked(root, variant, name, task, report)
        for name, task in load_benchmark(benchmark or str(root)).tasks.items()
    }
    return report


def _checked(root: Path, variant: str, name: str, task: Task, report: dict) -> dict:
    report["notes"] += remarks(root, name, task)
    try:
        labels = label_names(root, name, task)
    except Fault:  # reported where the records are read
        labels = ()
    return check_task(f"{variant}/{name}", partial(read, root, name, task), report, labels)

"""Examples in TRACE's layout: reading a split strictly, and checking a whole folder of tasks.

Layout: `<root>/<task>/{train,eval,test}.json`, each a JSON list of {"prompt": str, "answer": str}; other fields are
ignored. The four variants of the benchmark (500, 1000, 5000, Reasoning) share it; `sources.py` reads others.
"""

import itertools
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from codyra_llm.errors import Fault, nearest
from codyra_llm.untrusted import read_json

SPLITS = ("train", "eval", "test")
SURROGATE = re.compile("[\ud800-\udfff]")  # valid in JSON escapes, but no tokenizer can encode it
LONGEST = {"prompt": 1_000_000, "answer": 50_000}  # characters; TRACE has 164,000 and 18,000, and ROUGE is quadratic
NAMED = 5  # faults of one file that are told one by one; the rest is counted


def read_split(root: Path, task: str, split: str) -> list[dict]:
    """The examples of one split, each {"prompt": str, "answer": str}. Raises Fault with all faults of the file."""
    path = root / task / f"{split}.json"
    if not os.path.isfile(path):
        raise Fault(missing(root, task, path))
    records = parse(path)
    refuse([fault for i, record in enumerate(records) for fault in record_faults(record, split, f"{path}: record {i}")],
           path, len(records))
    return [{"prompt": record["prompt"], "answer": record["answer"]} for record in records]


def refuse(faults: list[str], where: str | Path, count: int) -> None:
    """Raise Fault with the first of the faults that `count` records have, and the number of the others."""
    if (rest := len(faults) - NAMED) > 0:
        faults = [*faults[:NAMED], f"{where}: {rest} more faults in {count} records; correct these too."]
    if faults:
        raise Fault(*faults)


def missing(root: Path, task: str, path: Path) -> str:
    """What to tell about a file that isn't there: the root, the task folder or only the split may be wrong."""
    if not root.is_dir():
        return f"{root} is no folder: expected the benchmark's root, such as LLM-CL-Benchmark_500; correct the path."
    if not path.parent.is_dir():
        tasks = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        return (f"{path.parent} doesn't exist: expected a folder for task '{task}' under {root}, which has "
                f"{', '.join(tasks) or 'none'}.{nearest(task, tasks)}")
    if path.is_dir():
        return f"{path} is a folder, expected the {path.stem} split of task '{task}' in a file; put it there."
    return f"{path} doesn't exist: expected the {path.stem} split of task '{task}'; add it or leave the task out."


def parse(path: Path, expected: str = '{"prompt": ..., "answer": ...} records') -> list:
    """The JSON list of a file; Fault with the byte or the line and column where reading it fails."""
    records = read_json(path, "one list of records")
    if not isinstance(records, list) or not records:
        found = "an empty list" if records == [] else f"a {type(records).__name__}"
        raise Fault(f"{path}: holds {found}, expected a list of {expected}; correct it.")
    return records


def record_faults(record: object, split: str, where: str, fields: tuple[str, str] = ("prompt", "answer")) -> list[str]:
    """Faults of one record, whose prompt and answer are in these `fields`. Eval and test may have empty answers (Lima has no
    references); training may not."""
    if not isinstance(record, dict):
        return [f"{where} is a {type(record).__name__}, expected an object with '{fields[0]}' and '{fields[1]}'; correct it."]
    faults = []
    for field, most in zip(fields, LONGEST.values()):
        value = record.get(field)
        if field not in record:
            faults.append(f"{where} has no '{field}', expected a string; add it.{nearest(field, record)}")
        elif not isinstance(value, str):
            faults.append(f"{where}: '{field}' is a {type(value).__name__}, expected a string; put it in quotes.")
        elif len(value) > most:
            faults.append(f"{where}: '{field}' has {len(value):,d} characters, expected at most {most:,d}; shorten it.")
        elif SURROGATE.search(value):
            faults.append(f"{where}: '{field}' holds half of a surrogate pair, expected Unicode text; export it again.")
        elif "\0" in value:
            faults.append(f"{where}: '{field}' holds a NUL character, left by a wrong decoding; export it again.")
        elif field == fields[1] and split == "train" and not value:
            faults.append(f"{where}: '{field}' is empty, expected text to learn; fill it in or remove the record.")
    return faults


def check_root(root: Path) -> dict:
    """Report on every task and split under `root`, a variant folder or a folder of variants; plain JSON values.

    {"root", "variants": {name: {task: {"splits": {split: stats}, "overlap": {"train/eval": n, ...}}}}, "faults",
    "warnings"}. `duplicates` counts records whose prompt came earlier in the split; `overlap` counts distinct prompts
    that two splits share.
    """
    report = {"root": str(root), "variants": {}, "faults": [], "warnings": []}
    for variant in variants(root):
        tasks = {folder.name: check_task(f"{variant.name}/{folder.name}", partial(read_split, variant, folder.name), report)
                 for folder in task_folders(variant)}
        report["variants"][variant.resolve().name] = tasks
    return report


def task_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that hold at least one split, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(sub for sub in folder.iterdir() if any((sub / f"{split}.json").is_file() for split in SPLITS))


def variants(root: Path) -> list[Path]:
    """`root` itself when it holds tasks, or else the folders in it that do."""
    found = [root] if task_folders(root) else []
    if not found and root.is_dir():
        found = sorted(folder for folder in root.iterdir() if task_folders(folder))
    if not found:
        raise Fault(f"{root} holds no task folder: expected <task>/train.json, eval.json and test.json in it or in a "
                    "folder such as LLM-CL-Benchmark_500; correct the path.")
    return found


def check_task(name: str, read: Callable[[str], list[dict]], report: dict) -> dict:
    """Statistics of the splits that `read` gives and their overlaps; faults and warnings are added to `report`."""
    splits, prompts, overlap = {}, {}, {}
    for split in SPLITS:
        try:
            records = read(split)
        except Fault as fault:
            report["faults"] += fault.messages
            continue
        splits[split] = stats = statistics(records)
        prompts[split] = {record["prompt"] for record in records}
        for count, what in ((stats["duplicates"], "repeat an earlier prompt of the split"),
                            (stats["empty_answers"], "have an empty answer and can't be scored"),
                            (stats["replacement_characters"], "hold U+FFFD, left by a lossy decoding")):
            if count:
                report["warnings"].append(f"{name}/{split}: {count} of {len(records)} records {what}.")
    for a, b in itertools.combinations(prompts, 2):
        if shared := len(prompts[a] & prompts[b]):
            overlap[f"{a}/{b}"] = shared
            report["warnings"].append(f"{name}: {a} and {b} share {shared} prompts "
                                      f"({len(prompts[a])} and {len(prompts[b])} distinct).")
    return {"splits": splits, "overlap": overlap}


def statistics(records: list[dict]) -> dict:
    """Counts and lengths (in characters) of one split."""
    prompts, answers = ([record[field] for record in records] for field in ("prompt", "answer"))
    return {
        "records": len(records),
        "duplicates": len(records) - len(set(prompts)),
        "empty_answers": sum(not answer.strip() for answer in answers),
        "replacement_characters": sum("\ufffd" in p or "\ufffd" in a for p, a in zip(prompts, answers)),
        "prompt_mean": round(sum(map(len, prompts)) / len(records), 1),
        "prompt_max": max(map(len, prompts)),
        "answer_mean": round(sum(map(len, answers)) / len(records), 1),
        "answer_max": max(map(len, answers)),
    }


def print_check(report: dict) -> None:
    """Show a report of `check_root`: one table per variant, then warnings and faults."""
    console = Console()
    for variant, tasks in report["variants"].items():
        table = Table("task", "split", title=variant)
        for title in ("records", "repeated\nprompts", "empty\nanswers", "prompt chars\nmean / max",
                      "answer chars\nmean / max", "prompts\nshared with"):
            table.add_column(title, justify="right")
        for task, checked in tasks.items():
            for split, s in checked["splits"].items():
                shared = [f"{pair.removeprefix(split + '/')} {n}" for pair, n in checked["overlap"].items()
                          if pair.startswith(split + "/")]
                table.add_row(task, split, str(s["records"]), str(s["duplicates"]), str(s["empty_answers"]),
                              f"{s['prompt_mean']:.0f} / {s['prompt_max']}",
                              f"{s['answer_mean']:.0f} / {s['answer_max']}", ", ".join(shared))
            table.add_section()
        console.print(table)
    for kind, style in (("warnings", "yellow"), ("faults", "red")):
        for message in report[kind]:
            console.print(f"{kind[:-1]}: {message}", style=style, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(report['faults'])} faults, {len(report['warnings'])} warnings", highlight=False)

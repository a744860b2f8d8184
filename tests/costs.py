"""What commands on many files cost, and how it grows: CPU seconds, wall seconds and peak memory at two sizes.

`python tests/costs.py [--only TEXT] [--out FOLDER] [--shrink 1]` prints a line for each size, and the
exponent of the growth of CPU seconds from the one before. `--shrink 10` takes a tenth of every size. CPU
seconds are those of a process of its own and of those that it starts, start-up included, where not said
otherwise; the peak is of the first alone.
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from made_runs import make

from codyra_llm.config.benchmark import load_benchmark

ROOT = Path(__file__).parents[1]
TASKS = list(load_benchmark("trace").orders[1])
WORDS = [f"w{number}" for number in range(2000)]
# Words of a prompt, an answer and a prediction of each task, about as in TRACE.
LENGTHS = {
    "C-STANCE": (40, 1, 1),
    "FOMC": (60, 1, 1),
    "MeetingBank": (300, 60, 55),
    "Py150": (120, 12, 12),
    "ScienceQA": (80, 90, 80),
    "NumGLUE-cm": (50, 1, 1),
    "NumGLUE-ds": (40, 1, 1),
    "20Minuten": (430, 45, 40),
}
# A command in this process, then the most memory that it held, in MB.
PROGRAM = """
import resource, sys
try:
    {}
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, file=sys.stderr)
"""
COMMAND = "from codyra_llm.cli import main; main(sys.argv[1:])"
PLANNED = """
import time; from pathlib import Path; from codyra_llm.sweep.spec import load_sweep
    began = time.process_time()
    asked = load_sweep(Path(sys.argv[1]), [])
    print("runs", len(asked.runs()), len(asked.tries), "spent", time.process_time() - began, file=sys.stderr)
"""


class Cost(NamedTuple):
    seconds: float  # of the CPU
    wall: float
    peak: int  # MB


def measured(program: str, *arguments: object) -> Cost:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words, began = [str(argument) for argument in arguments], time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(program.strip()), *words],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": f"{ROOT}",
            "PATH": "/usr/bin:/bin",
            "HOME": str(Path.home()),
            "OMP_NUM_THREADS": "1",
        },
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    told = done.stderr.split()
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if "spent" in told:
        seconds = float(told[told.index("spent") + 1])
    return Cost(seconds, wall, int(told[told.index("peak") + 1]))


def text(draw: random.Random, words: int) -> str:
    """Words drawn from 2,000, every 17th the end of a sentence."""
    return " ".join(draw.choice(WORDS) + ("." if draw.random() < 0.06 else "") for _ in range(words))


def predictions(out: Path, task: str, count: int) -> Path:
    draw, file = random.Random(0), out / f"{task}-{count}.json"
    prompt, answer, predicted = LENGTHS[task]
    with open(file, "w", encoding="utf-8") as stream:
        for number in range(count):
            wanted = text(draw, answer)
            found = (
                wanted if draw.random() < 0.3 else f"{wanted[: len(wanted) // 2]}{text(draw, predicted // 2)}"
            )
            row = {"prompt": text(draw, prompt), "prediction": found, "answer": wanted}
            stream.write(("," if number else "[") + json.dumps(row))
        stream.write("]")
    return file


def score(task: str) -> Callable[[Path, int], Cost]:
    def cost(out: Path, count: int) -> Cost:
        file = predictions(out, task, count)
        found = measured(COMMAND, "score", task, file)
        file.unlink()
        return found

    return cost


def report(out: Path, count: int) -> Cost:
    runs = [make(out / f"runs{count}" / str(seed), seed=seed).path for seed in range(count)]
    return measured(COMMAND, "report", *runs, "--out", out / "page.html")


def plan_sweep(out: Path, arms: int) -> Cost:
    settings = {"recipe": "quickstart", "output": str(out / "sweep"), "grid": {"seed": [1, 2, 3]}}
    settings["arms"] = {f"arm{number}": {"optim.lr": 1e-5 * (number + 1)} for number in range(arms)}
    tries = {name: [{"optim.lr": 1e-3}, {"optim.lr": 3e-3}] for name in settings["arms"]}
    settings["tune"] = {"set": {"seed": 0, "eval.split": "eval"}, "tries": tries}
    (out / "sweep.yaml").write_text(json.dumps(settings), "utf-8")
    return measured(PLANNED, out / "sweep.yaml")


def check_data(out: Path, examples: int) -> Cost:
    draw, root = random.Random(0), out / f"data{examples}"
    for task in TASKS:
        (root / task).mkdir(parents=True)
        prompt, answer, _ = LENGTHS[task]
        for split, count in (("train", examples), ("eval", examples // 10), ("test", examples * 2 // 5)):
            rows = [{"prompt": text(draw, prompt), "answer": text(draw, answer)} for _ in range(count)]
            (root / task / f"{split}.json").write_text(json.dumps(rows), "utf-8")
    return measured(COMMAND, "data", "check", root)


CASES: dict[str, tuple[Callable[[Path, int], Cost], tuple[int, ...]]] = {
    **{f"score {task}": (score(task), (20_000, 200_000)) for task in TASKS},
    "report, runs on one page": (report, (25, 100)),
    "sweep, arms (planning alone)": (plan_sweep, (125, 500)),
    "data check, training examples of each of 8 tasks": (check_data, (500, 5000)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shrink", type=int, default=1)
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="costs"))
    out.mkdir(parents=True, exist_ok=True)
    for name, (cost, sizes) in CASES.items():
        before = None
        for size in [max(size // given.shrink, 2) for size in sizes] if given.only in name else ():
            found = cost(out, size)
            grew = ""
            if before and size > before[0]:
                exponent = math.log(found.seconds / before[1].seconds) / math.log(size / before[0])
                grew = f", exponent {exponent:.2f}"
            print(
                f"{name}: {size}: {found.seconds:.1f} CPU s in {found.wall:.1f} s, {found.peak} MB{grew}",
                flush=True,
            )
            before = size, found


if __name__ == "__main__":
    main()

"""Copy the scores of finished runs here and print their table: `python collect.py RUN_FOLDER ...`.

OP's interval is 1.96·√(Σ se_j²)/T over the last row's tasks, se_j a quarter of each score's 95 % bootstrap width: it
covers the choice of test examples, not the seed.
"""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent


def row(run: Path) -> str:
    """One line of the table: measures, share of ranks kept, minutes of training and of evaluation."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = {name: [json.loads(x) for x in (run / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
             if (run / f"{name}.jsonl").is_file() else [] for name in ("scores", "log", "updates")}
    last = [r for r in lines["scores"] if r["kind"] == "task" and r["step"] == max(s["step"] for s in lines["scores"])]
    errors = [(m["high"] - m["low"]) / 4 for m in (r["metrics"][r["headline"]] for r in last)]
    half = 1.96 * sum(e * e for e in errors) ** 0.5 / len(errors)
    learnt = [summary["matrix"][i][i] for i in range(len(summary["matrix"]))]
    ranks = Counter({key: sum(u[key] for u in lines["updates"]) for key in ("kept", "rank")})
    numbers = [f"{summary['op']:.1f} ± {half:.1f}", *("" if summary[key] is None else f"{summary[key]:.1f}"
               for key in ("bwt", "bwt_treelora", "forgetting")),
               f"{sum(learnt) / len(learnt):.1f}" if learnt else "",
               f"{ranks['kept'] / ranks['rank']:.0%}" if ranks["rank"] else "",
               f"{sum(r['seconds'] for r in lines['log']) / 60:.1f}", f"{sum(r['seconds'] for r in lines['scores']) / 60:.1f}"]
    return f"| {run.name} | " + " | ".join(numbers) + " |"


def main(runs: list[Path]) -> None:
    print("| run | OP | BWT | BWT, TreeLoRA's | forgetting | just learnt | ranks kept | min. training | min. evaluation |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run in runs:
        target = HERE / run.name
        if run.resolve() != target.resolve():
            target.mkdir(exist_ok=True)
            for name in ("summary.json", "scores.jsonl"):
                shutil.copy(run / name, target / name)
        print(row(run))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])

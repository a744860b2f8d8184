"""Scores of the stream's tasks as lm-evaluation-harness's result files have them, for tools that read
those.
"""

from datetime import datetime
from importlib.metadata import version

from codyra_llm.experiment.setup import Setup
from codyra_llm.store.rows import ScoreRow


def lm_eval_layout(checkpoint: str, setup: Setup, rows: list[ScoreRow]) -> dict:
    """Scores of the stream's tasks as lm-eval's result files have them: under 'metric,none', from 0 to 1."""
    results: dict[str, dict] = {}
    for row in rows:
        means = {f"{name},none": _share(score["mean"]) for name, score in row.metrics.items()}
        errors = {f"{name}_stderr,none": "N/A" for name in row.metrics}
        results[row.task] = {"alias": row.task, **means, **errors}
    counts = {row.task: row.interval["n"] for row in rows}
    samples = {task: {"original": n, "effective": n} for task, n in counts.items()}
    higher = {row.task: dict.fromkeys(row.metrics, True) for row in rows}
    return {
        "results": results,
        "group_subtasks": {},
        "configs": {},
        "versions": dict.fromkeys(results, 1),
        "n-shot": dict.fromkeys(results, 0),
        "higher_is_better": higher,
        "n-samples": samples,
        "config": {
            "model": "hf",
            "model_args": f"pretrained={checkpoint}",
            "limit": setup.recipe.eval.max_examples,
            "model_dtype": str(setup.dtype),
        },
        "model_name": checkpoint,
        "model_source": "hf",
        "transformers_version": version("transformers"),
        "lm_eval_version": None,
        "date": datetime.now().timestamp(),
    }


def _share(mean: float | None) -> float | str:
    """A mean of no example is what lm-eval writes for what it could not compute."""
    return "N/A" if mean is None else mean / 100

"""Test examples that a run could answer and then could not."""

from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import Stage

SHOWN = 3  # examples per task
PROMPT, ANSWER = 700, 400  # characters kept of each text

# Control characters become Unicode's pictures of them, so that they can be seen.
PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"}
PICTURES[127] = 0x2421


def forgotten(folder: RunFolder, found: dict) -> list[dict]:
    """Per task but the last, the examples whose score fell most from just after the task to the end of the
    run: `{"task", "metric", "fell", "of", "shown": [{"prompt", "answer", "before", "after", "scores"}]}`."""
    steps, tasks, out = len(found["matrix"]), found["tasks"], []
    metrics = {row.task: row.headline for row in folder.scores}
    for step, task in enumerate(tasks[: max(steps - 1, 0)], 1):
        if task not in metrics:  # then there are no predictions either
            continue
        metric = metrics[task]
        first = folder.predictions(Stage.of(tasks, step - 1), task)
        last = folder.predictions(Stage.of(tasks, steps - 1), task)
        pairs = [
            (a, b)
            for a, b in zip(first, last, strict=False)
            if (a["prompt"], a["answer"]) == (b["prompt"], b["answer"]) and b[metric] < a[metric]
        ]
        pairs.sort(key=lambda pair: pair[1][metric] - pair[0][metric])  # equal falls stay in their order
        if pairs:
            out.append(
                {
                    "task": task,
                    "metric": metric,
                    "fell": len(pairs),
                    "of": len(first),
                    "shown": [_shown(a, b, metric) for a, b in pairs[:SHOWN]],
                }
            )
    return out


def _shown(before: dict, after: dict, metric: str) -> dict:
    return {
        "prompt": readable(before["prompt"], PROMPT),
        "answer": readable(before["answer"], ANSWER),
        "before": readable(before["prediction"], ANSWER),
        "after": readable(after["prediction"], ANSWER),
        "scores": (before[metric], after[metric]),
    }


def readable(text: str, most: int) -> str:
    """At most about `most` letters, of a longer text the beginning and the longer end; control characters as
    pictures.
    """
    if len(text) > most:
        text = f"{text[: most // 3]} […] {text[-(most - most // 3) :]}"
    return text.translate(PICTURES)

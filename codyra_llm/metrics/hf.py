"""The metrics as `evaluate.Metric`, for whoever composes them with others."""

from collections.abc import Sequence

import datasets
import evaluate


class HfMetric(evaluate.Metric):
    def __init__(self, **settings):
        # In memory: parallel ranks of one host would else compete for one cache file.
        super().__init__(**{"keep_in_memory": settings.get("num_process", 1) == 1, **settings})

    def _build_data_dir(self) -> str:
        return (
            "" if self.keep_in_memory else super()._build_data_dir()
        )  # the parent makes a folder that stays empty

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        columns = {"predictions": text, "references": text} | (
            {"sources": text} if self.takes_sources else {}
        )
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=datasets.Features(columns),
            inputs_description=f"{', '.join(columns)}: lists of strings. Returns {{'{self.metric}': mean, "
            f"0..100}}.",
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
    ):
        sources = [""] * len(predictions) if sources is None else sources
        scores = [self.example(*row) for row in zip(sources, predictions, references, strict=True)]
        return {self.metric: sum(scores) / len(scores) if scores else float("nan")}

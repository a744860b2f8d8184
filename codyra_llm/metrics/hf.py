"""A metric of `metrics.text` as an `evaluate.Metric`, so that it can be combined with others."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from codyra_llm.metrics.text import ExampleMean


class HfMetric(evaluate.Metric):
    """`HfMetric(METRICS["sari"])` computes what `METRICS["sari"].compute` does; it needs no network.

    `compute`, `add` and `add_batch` take the texts `predictions` and `references`, and where the metric looks
    at prompts `sources` too. `settings` are those of `evaluate.Metric`. A single process keeps its texts in
    memory; otherwise processes on one host would compete for one cache file."""

    def __init__(self, metric: type[ExampleMean], **settings: Any):
        self.metric = metric
        alone = settings.get("num_process", 1) == 1
        super().__init__(**{"keep_in_memory": alone, **settings})

    @property
    def name(self) -> str:
        """The metric's name in results."""
        return self.metric.metric

    def _build_data_dir(self) -> str:
        # The parent makes a folder even where nothing will ever lie in it.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        columns = ["predictions", "references"]
        if self.metric.takes_sources:
            columns.append("sources")
        return evaluate.MetricInfo(
            description=self.metric.__doc__,
            citation="",
            features=datasets.Features({column: datasets.Value("string") for column in columns}),
            inputs_description=f"{', '.join(columns)}: lists of texts. Returns {{'{self.name}': 0..100}}.",
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
    ) -> dict[str, float]:
        return self.metric.compute(predictions=predictions, references=references, sources=sources)

"""`evaluate.load("metrics/format_rate")`, from the repo's root and offline: outputs in the format that was asked for."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["format_rate"]
_INPUTS = """
Args:
    predictions: whole outputs, one a sample.
Returns:
    `format_rate`;
    `per_sample`: 0 or 1 of each sample, in order.
"""


class FormatRate(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="DeepSeek-AI 2025, DeepSeek-R1",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, **options) -> dict:
        return _METRIC.compute(predictions, **options)

"""`evaluate.load("metrics/mixed_language")`, from the repo's root and offline: outputs in another language, wholly or in part."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["mixed_language"]
_INPUTS = """
Args:
    predictions: whole outputs, one a sample.
    language: code of the wanted language (default en).
Returns:
    `mixed_language_rate`;
    `per_sample`: 0 or 1 of each sample, in order.
"""


class MixedLanguage(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, **options) -> dict:
        return _METRIC.compute(predictions, **options)

"""`evaluate.load("metrics/cot_length")`, from the repo's root and offline: how long the rationales are."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["cot_length"]
_INPUTS = """
Args:
    predictions: whole outputs, one a sample.
    unit: `pieces` (default: words, numbers and punctuation marks), `words` or `characters`.
Returns:
    `mean`, `std`, `min`, `p10`, `median`, `p90`, `max`, `without` (share of outputs without a rationale);
    `per_sample`: the length of each sample, in order.
"""


class CotLength(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, **options) -> dict:
        return _METRIC.compute(predictions, **options)

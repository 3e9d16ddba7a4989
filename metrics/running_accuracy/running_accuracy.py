"""`evaluate.load("metrics/running_accuracy")`, from the repo's root and offline: the curve of accuracy over samples, and how stable it is."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["running_accuracy"]
_INPUTS = """
Args:
    predictions: what each sample scored, 0 to 1, in the order of evaluation.
Returns:
    `accuracy`, `stability`, `volatility`, `volatility_by_chance`, `curve`;
    `per_sample`: the score of each sample, in order.
"""


class RunningAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.summarize.__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions, **options) -> dict:
        return _METRIC.compute(predictions, **options)

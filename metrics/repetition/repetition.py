"""`evaluate.load("metrics/repetition")`, from the repo's root and offline: outputs that run in a loop."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["repetition"]
_INPUTS = """
Args:
    predictions: whole outputs, one a sample.
Returns:
    `loop_rate`, `rep_4`;
    `per_sample`: both of each sample, in order.
"""


class Repetition(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, ICLR",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, **options) -> dict:
        return _METRIC.compute(predictions, **options)

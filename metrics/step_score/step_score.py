"""`evaluate.load("metrics/step_score")`, from the repo's root and offline: how far rationales take a reference's steps."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["step_score"]
_INPUTS = """
Args:
    predictions: whole outputs, one a sample.
    references: a reference rationale for each.
Returns:
    `step_score` and its three parts, `found`, `in_order`, `arithmetic`;
    `per_sample`: these of each sample, in order.
"""


class StepScore(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return _METRIC.compute(predictions, references, **options)

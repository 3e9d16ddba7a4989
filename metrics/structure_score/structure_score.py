"""`evaluate.load("metrics/structure_score")`, from the repo's root and offline: how far outputs have the structure of reasoning."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["structure_score"]
_INPUTS = """
Args:
    predictions: whole outputs, one a sample.
Returns:
    `structure_score` and its five parts, `tags`, `rationale`, `answer`, `steps`, `conclusion`;
    `per_sample`: these of each sample, in order.
"""


class StructureScore(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, **options) -> dict:
        return _METRIC.compute(predictions, **options)

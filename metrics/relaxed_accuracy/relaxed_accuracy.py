"""`evaluate.load("metrics/relaxed_accuracy")`, from the repo's root and offline: ChartQA's, numbers within 5%."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["relaxed_accuracy"]
_INPUTS = """
Args:
    predictions: parsed answers, one a sample; an empty one is unparseable and wrong.
    references: lists of gold answers, one list a sample; an empty one raises a ValueError that names the sample.
    tolerance: largest relative error (default 0.05).
Returns:
    `relaxed_accuracy`, `unparseable` (share);
    `per_sample`: both of each sample, in order.
"""


class RelaxedAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="Masry et al. 2022, ChartQA, Findings of ACL",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": [datasets.Value("string")]}
            ),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return _METRIC.compute(predictions, references, **options)

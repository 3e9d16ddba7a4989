"""`evaluate.load("metrics/pope")`, from the repo's root and offline: yes-or-no questions about what is there."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["pope"]
_INPUTS = """
Args:
    predictions: parsed answers, one a sample; an empty one is unparseable and wrong.
    references: lists of one gold answer, `yes` or `no`, one list a sample.
Returns:
    `accuracy`, `precision`, `recall`, `f1`, `yes_rate`, `unparseable` (share);
    `per_sample`: the cell of the table of confusion of each sample, in order.
"""


class Pope(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="Li et al. 2023, Evaluating Object Hallucination in Large Vision-Language Models, EMNLP",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": [datasets.Value("string")]}
            ),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return _METRIC.compute(predictions, references, **options)

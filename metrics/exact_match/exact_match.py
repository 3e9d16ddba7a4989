"""`evaluate.load("metrics/exact_match")`, from the repo's root and offline: equality with a gold answer, as is and normalized."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["exact_match"]
_INPUTS = """
Args:
    predictions: parsed answers, one a sample; an empty one is unparseable and wrong.
    references: lists of gold answers, one list a sample; an empty one raises a ValueError that names the sample.
Returns:
    `exact_match`, `normalized` (as in SQuAD), `unparseable` (share);
    `per_sample`: these of each sample, in order.
"""


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="Rajpurkar et al. 2016, SQuAD, EMNLP",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": [datasets.Value("string")]}
            ),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return _METRIC.compute(predictions, references, **options)

"""`evaluate.load("metrics/anls")`, from the repo's root and offline: average normalized Levenshtein similarity."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["anls"]
_INPUTS = """
Args:
    predictions: parsed answers, one a sample; an empty one is unparseable and wrong.
    references: lists of gold answers, one list a sample; an empty one raises a ValueError that names the sample.
    threshold: similarities below it count as 0 (default 0.5).
Returns:
    `anls`, `unparseable` (share);
    `per_sample`: both of each sample, in order.
"""


class Anls(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="Biten et al. 2019, Scene Text Visual Question Answering, ICCV",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": [datasets.Value("string")]}
            ),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return _METRIC.compute(predictions, references, **options)

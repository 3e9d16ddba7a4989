"""`evaluate.load("metrics/chair")`, from the repo's root and offline: objects that a caption mentions and the picture lacks."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["chair"]
_INPUTS = """
Args:
    predictions: captions, one a sample.
    references: lists of the picture's objects, one list a sample; an empty list is a picture without any.
    vocabulary: synonyms by object name (default: the drawn figures' objects).
Returns:
    `chair_i`, `chair_s`;
    `per_sample`: `mentioned` and `absent` of each sample, in order.
"""


class Chair(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="Rohrbach et al. 2018, Object Hallucination in Image Captioning, EMNLP",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": [datasets.Value("string")]}
            ),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return _METRIC.compute(predictions, references, **options)

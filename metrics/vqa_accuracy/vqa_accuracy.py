"""`evaluate.load("metrics/vqa_accuracy")`, from the repo's root and offline: agreement with (ten) annotators."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["vqa_accuracy"]
_INPUTS = """
Args:
    predictions: parsed answers, one a sample; an empty one is unparseable and wrong.
    references: lists of gold answers, one list a sample; an empty one raises a ValueError that names the sample.
    always_normalize: normalize where all annotators agree too (default False, as published).
Returns:
    `vqa_accuracy`, `unparseable` (share);
    `per_sample`: both of each sample, in order.
"""


class VqaAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="Antol et al. 2015, VQA: Visual Question Answering, ICCV",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": [datasets.Value("string")]}
            ),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return _METRIC.compute(predictions, references, **options)

"""`evaluate.load("metrics/hallucination")`, from the repo's root and offline: statements that the picture contradicts, on drawn figures."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["hallucination"]
_INPUTS = """
Args:
    predictions: whole outputs, one a sample.
    references: true captions of the figures, one a sample.
Returns:
    `hallucination_rate`, `hallucinated_outputs`, `chair_i`, `chair_s`, `stated`, `unread`; NaN where nothing was stated;
    `per_sample`: the counts of each sample, in order.
"""


class Hallucination(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="Rohrbach et al. 2018, Object Hallucination in Image Captioning, EMNLP",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return _METRIC.compute(predictions, references, **options)

"""`evaluate.load("metrics/rouge_l")`, from the repo's root and offline: longest common subsequence of words."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["rouge_l"]
_INPUTS = """
Args:
    predictions: texts, one a sample.
    references: reference texts, one a sample.
Returns:
    `rouge_l` (F1), `precision`, `recall`;
    `per_sample`: these of each sample, in order.
"""


class RougeL(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return _METRIC.compute(predictions, references, **options)

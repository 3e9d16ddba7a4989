"""`evaluate.load("metrics/multiple_choice")`, from the repo's root and offline: the letter that is picked, as of ScienceQA."""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

_METRIC = METRICS["multiple_choice"]
_INPUTS = """
Args:
    predictions: answers, one a sample, as letters, texts of the choices, or prose that names one.
    references: lists of gold answers, one list a sample; an empty one raises a ValueError that names the sample.
    choices: lists of the choices' texts, one list a sample.
Returns:
    `accuracy`, `unparseable` (share);
    `per_sample`: `score` and `unparseable` of each sample, in order.
"""


class MultipleChoice(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_METRIC.score.__doc__,
            citation="Lu et al. 2022, Learn to Explain (ScienceQA), NeurIPS",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": [datasets.Value("string")],
                    "choices": [datasets.Value("string")],
                }
            ),
        )

    def _compute(self, predictions, references, choices, **options) -> dict:
        return _METRIC.compute(predictions, references, choices=choices, **options)

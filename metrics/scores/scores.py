"""
`evaluate.load("metrics/scores", "running_accuracy")`, from the repo's root and offline: what samples scored, in order.

Its only configuration is `running_accuracy`.
"""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

CITATIONS = {"running_accuracy": ""}
_INPUTS = """
Args:
    predictions: what each sample scored, 0 to 1, in the order of evaluation.
Returns:
    `accuracy`, `stability`, `volatility`, `volatility_by_chance`, `curve`;
    `per_sample`: the score of each sample, in order.
"""


class Scores(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        name = self.config_name
        if name not in CITATIONS:
            raise ValueError(f"config_name is {name!r}; pass one of {', '.join(CITATIONS)} after the module's path")
        return evaluate.MetricInfo(
            description=METRICS[name].summarize.__doc__,
            citation=CITATIONS[name],
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions, **options) -> dict:
        return METRICS[self.config_name].compute(predictions, **options)

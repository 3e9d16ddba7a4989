"""
`evaluate.load("metrics/captions", "chair")`, from the repo's root and offline: what a text says and the picture lacks.

The configurations are `chair`, for captions of pictures whose objects are known, and `hallucination`, for whole outputs
about drawn figures.
"""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

CITATIONS = {
    "chair": "Rohrbach et al. 2018, Object Hallucination in Image Captioning, EMNLP",
    "hallucination": "Rohrbach et al. 2018, Object Hallucination in Image Captioning, EMNLP",
}
_INPUTS = """
Args:
    predictions: captions, one a sample; of `hallucination` whole outputs.
    references: of `chair` lists of the picture's objects, one list a sample, an empty one for a picture without any; of
        `hallucination` true captions of the figures, one a sample.
    vocabulary: of `chair`, synonyms by object name (default: the drawn figures' objects).
Returns:
    `chair`: `chair_i`, `chair_s`;
    `hallucination`: `hallucination_rate`, `hallucinated_outputs`, `chair_i`, `chair_s`, `stated`, `unread`; NaN where
    nothing was stated;
    and of each `per_sample`: the counts of each sample, in order.
"""


class Captions(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        name = self.config_name
        if name not in CITATIONS:
            raise ValueError(f"config_name is {name!r}; pass one of {', '.join(CITATIONS)} after the module's path")
        reference = datasets.Value("string")
        return evaluate.MetricInfo(
            description=METRICS[name].score.__doc__,
            citation=CITATIONS[name],
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": [reference] if METRICS[name].reference == "objects" else reference,
                }
            ),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return METRICS[self.config_name].compute(predictions, references, **options)

"""
`evaluate.load("metrics/answers", "anls")`, from the repo's root and offline: parsed answers against gold answers.

The configurations are `anls`, `exact_match`, `multiple_choice`, `pope`, `relaxed_accuracy` and `vqa_accuracy`.
"""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

CITATIONS = {
    "anls": "Biten et al. 2019, Scene Text Visual Question Answering, ICCV",
    "exact_match": "Rajpurkar et al. 2016, SQuAD, EMNLP",
    "multiple_choice": "Lu et al. 2022, Learn to Explain (ScienceQA), NeurIPS",
    "pope": "Li et al. 2023, Evaluating Object Hallucination in Large Vision-Language Models, EMNLP",
    "relaxed_accuracy": "Masry et al. 2022, ChartQA, Findings of ACL",
    "vqa_accuracy": "Antol et al. 2015, VQA: Visual Question Answering, ICCV",
}
_INPUTS = """
Args:
    predictions: parsed answers, one a sample; an empty one is unparseable and wrong. Of a multiple choice letters, texts of
        the choices, or prose that names one.
    references: lists of gold answers, one list a sample; an empty one raises a ValueError that names the sample. Of POPE
        lists of one, `yes` or `no`.
    choices: of `multiple_choice`, lists of the choices' texts, one list a sample.
    threshold: of `anls`, similarities below it count as 0 (default 0.5).
    tolerance: of `relaxed_accuracy`, largest relative error (default 0.05).
    always_normalize: of `vqa_accuracy`, normalize where all annotators agree too (default False, as published).
Returns:
    the metric by its name (of `multiple_choice` and `pope`: `accuracy`) and `unparseable` (share);
    of `exact_match` also `normalized` (as in SQuAD); of `pope` also `precision`, `recall`, `f1`, `yes_rate`;
    `per_sample`: what each sample adds to these, in order.
"""


class Answers(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        name = self.config_name
        if name not in CITATIONS:
            raise ValueError(f"config_name is {name!r}; pass one of {', '.join(CITATIONS)} after the module's path")
        columns = {"predictions": datasets.Value("string"), "references": [datasets.Value("string")]}
        if METRICS[name].choices:
            columns["choices"] = [datasets.Value("string")]
        return evaluate.MetricInfo(
            description=METRICS[name].score.__doc__,
            citation=CITATIONS[name],
            inputs_description=_INPUTS,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions, references, **options) -> dict:
        return METRICS[self.config_name].compute(predictions, references, **options)

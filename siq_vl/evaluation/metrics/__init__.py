"""Metrics: a score for every sample, and what a set of samples amounts to.

    from siq_vl.evaluation.metrics import METRICS, vqa_accuracy

    vqa_accuracy("two dogs", golds)                     # one sample: {"score": 0.9, "unparseable": 0.0}
    rows = METRICS["pope"].rows(answers, golds)         # one row a sample
    METRICS["pope"].summarize(rows)                     # accuracy, precision, recall, f1, yes_rate, ...

`summarize` takes any selection of rows, so a bootstrap draws rows and summarizes them again. Every metric is a
configuration of an `evaluate` module too: `evaluate.load("metrics/answers", "pope")` from the repo's root, offline.

Answers are parsed before (`siq_vl.parsing.answers.read`); an empty prediction is unparseable, which is wrong and is
reported apart. A sample without a gold answer raises a `ValueError` that names it; `without_gold` finds them before.
"""

from siq_vl.evaluation.metrics.facts import chair, drawn_vocabulary, hallucination, object_mentions
from siq_vl.evaluation.metrics.matching import (
    anls,
    exact_match,
    multiple_choice,
    pope,
    relaxed_accuracy,
    vqa_accuracy,
)
from siq_vl.evaluation.metrics.reasoning import (
    cot_length,
    format_rate,
    ignored_instruction,
    mixed_language,
    repetition,
    rouge_l,
    running_accuracy,
    step_score,
    structure_score,
)
from siq_vl.evaluation.metrics.registry import METRICS, Metric, Row, without_gold

__all__ = [
    "METRICS",
    "Metric",
    "Row",
    "anls",
    "chair",
    "cot_length",
    "drawn_vocabulary",
    "exact_match",
    "format_rate",
    "hallucination",
    "ignored_instruction",
    "mixed_language",
    "multiple_choice",
    "object_mentions",
    "pope",
    "relaxed_accuracy",
    "repetition",
    "rouge_l",
    "running_accuracy",
    "step_score",
    "structure_score",
    "vqa_accuracy",
    "without_gold",
]

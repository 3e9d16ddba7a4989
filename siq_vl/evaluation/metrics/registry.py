"""The metrics by name, over any number of samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from siq_vl.evaluation.metrics import facts, matching, reasoning
from siq_vl.evaluation.metrics.matching import Row, given_golds

References = Sequence[Any]


@dataclass(frozen=True)
class Metric:
    """A metric over samples.

    Attributes:
        score: `(prediction, reference, **options)` to a row of numbers, or `(prediction, **options)` without references.
        summarize: any number of rows, one or more, to what they amount to; a bootstrap calls it on draws of the rows.
        headline: the summary's key that stands for the metric in a table.
        reference: what a reference is: `"answers"`, `"text"`, `"caption"`, `"objects"`, or None where there is none.
        choices: whether each sample has choices too.
    """

    score: Callable[..., Row]
    summarize: Callable[[Sequence[Row]], Row]
    headline: str
    reference: str | None = None
    choices: bool = False

    def rows(
        self,
        predictions: Sequence[Any],
        references: References | None = None,
        *,
        choices: Sequence[Sequence[str]] | None = None,
        **options,
    ) -> list[Row]:
        """Return a row a sample, in order.

        Args:
            predictions: parsed answers, or whole outputs where the metric is about reasoning; None counts as empty.
            references: one a prediction, for metrics that have any.
            choices: of a multiple choice, one list a prediction.
            options: the metric's own.

        Raises:
            ValueError: numbers of samples that differ; a sample without a gold answer, or with a bad one, named by its
                place.
        """
        if self.reference and references is None:
            raise ValueError(f"references are missing; this metric needs one a prediction: {self.reference}")
        columns: dict[str, Sequence] = {}
        if self.reference and references is not None:
            columns["references"] = references
        if self.choices and choices is not None:
            columns["choices"] = choices
        for name, column in columns.items():
            if len(column) != len(predictions):
                raise ValueError(f"got {len(predictions)} predictions and {len(column)} {name}; give one a prediction")
        rows = []
        # An error of one sample is worth little without its place.
        for place, (prediction, *others) in enumerate(zip(predictions, *columns.values(), strict=True)):
            try:
                rows.append(self.score("" if prediction is None else prediction, *others, **options))
            except ValueError as error:
                raise ValueError(f"sample {place}: {error}") from error
        return rows

    def compute(self, predictions: Sequence[Any], references: References | None = None, **options) -> dict:
        """Return the summary of all samples, and their rows under `"per_sample"`. Arguments and errors as of `rows`."""
        rows = self.rows(predictions, references, **options)
        if not rows:
            raise ValueError("got 0 predictions; a metric needs at least one")
        return {**self.summarize(rows), "per_sample": rows}


def without_gold(references: References) -> list[int]:
    """Return the places of samples that have no gold answer, to be left out and reported apart."""
    missing = []
    for place, golds in enumerate(references):
        try:
            given_golds(golds)
        except ValueError:
            missing.append(place)
    return missing


def _means(headline: str) -> Callable[[Sequence[Row]], Row]:
    """Return a summary that names the mean of `score` by the metric, and means of everything else by their own names."""

    def summarize(rows: Sequence[Row]) -> Row:
        means = {}
        for name in rows[0]:  # all rows of a metric have the same keys
            values = [row[name] for row in rows]
            means[headline if name == "score" else name] = sum(values) / len(values)
        return means

    return summarize


def _matching(name: str, score: Callable[..., Row], **settings) -> Metric:
    return Metric(score, _means(name), name, "answers", **settings)


METRICS: Mapping[str, Metric] = {
    "vqa_accuracy": _matching("vqa_accuracy", matching.vqa_accuracy),
    "exact_match": _matching("exact_match", matching.exact_match),
    "relaxed_accuracy": _matching("relaxed_accuracy", matching.relaxed_accuracy),
    "anls": _matching("anls", matching.anls),
    "multiple_choice": _matching("accuracy", matching.multiple_choice, choices=True),
    "pope": Metric(matching.pope, matching.confusion, "accuracy", "answers"),
    "hallucination": Metric(facts.hallucination, facts.hallucination_rates, "hallucination_rate", "caption"),
    "chair": Metric(facts.chair, facts.chair_rates, "chair_i", "objects"),
    "rouge_l": Metric(reasoning.rouge_l, _means("rouge_l"), "rouge_l", "text"),
    "cot_length": Metric(reasoning.cot_length, reasoning.length_distribution, "mean"),
    "format_rate": Metric(reasoning.format_rate, _means("format_rate"), "format_rate"),
    "structure_score": Metric(reasoning.structure_score, _means("structure_score"), "structure_score"),
    "step_score": Metric(reasoning.step_score, _means("step_score"), "step_score", "text"),
    "repetition": Metric(reasoning.repetition, _means("loop_rate"), "loop_rate"),
    "ignored_instruction": Metric(
        reasoning.ignored_instruction, _means("ignored_instruction_rate"), "ignored_instruction_rate", "text"
    ),
    "mixed_language": Metric(reasoning.mixed_language, _means("mixed_language_rate"), "mixed_language_rate"),
    "running_accuracy": Metric(reasoning.correctness, reasoning.running_accuracy, "stability"),
}

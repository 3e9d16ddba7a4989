"""What a model's predictions amount to, and what has changed from one model to another: the report's Table 3 and A.6."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from siq_vl.evaluation.metrics import METRICS
from siq_vl.evaluation.predictions import Prediction
from siq_vl.evaluation.statistics import wilson
from siq_vl.evaluation.tables import markdown

# By model, by kind of reference output ("trace", "answer"), the loss of each question's.
Losses = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Summary:
    """Numbers of one model, over the questions that count.

    Args:
        accuracy: mean score.
        interval: ends of its 95% Wilson interval.
        hallucination: share of stated facts that the picture contradicts; None where no facts are known or stated.
        hallucinated: share of outputs with at least one such fact; None where no facts are known.
        length: mean pieces of the rationale: words, numbers and punctuation marks.
        curve: accuracy over the first 1, 2, ... questions.
        volatility: root mean square distance of the curve from its end, over its second half.
        by_chance: the volatility to be expected of the same scores in random order.
        rouge_l: mean over rationales that have a reference; None without any.
        well_formed: share of outputs in the format of stage 3.
        unparseable: share of outputs without a readable answer.
        loops: share of outputs that repeat themselves in a loop.
        mixed_language: share of outputs with another language in them.
    """

    accuracy: float
    interval: tuple[float, float]
    hallucination: float | None
    hallucinated: float | None
    length: float
    curve: list[float]
    volatility: float
    by_chance: float
    rouge_l: float | None
    well_formed: float
    unparseable: float
    loops: float
    mixed_language: float


def summarize(predictions: Sequence[Prediction]) -> Summary:
    """Return the summary of a model's predictions.

    Raises:
        ValueError: no question counts.
    """
    counted = [prediction for prediction in predictions if prediction.scored]
    if not counted:
        raise ValueError(f"none of {len(predictions)} questions can be scored: see their faults in the predictions")
    scores = [prediction.score for prediction in counted]
    outputs = [prediction.output for prediction in counted]
    references = [prediction.rouge_l for prediction in counted if prediction.rouge_l is not None]
    running = METRICS["running_accuracy"].compute(scores)
    # Facts can be checked where the true ones are known, and the share of wrong ones is defined where any is stated.
    known = [prediction for prediction in counted if prediction.stated is not None]
    stated = sum(prediction.stated for prediction in known)
    contradicted = sum(prediction.contradicted for prediction in known)
    return Summary(
        accuracy=running["accuracy"],
        interval=wilson(sum(scores), len(scores)),
        hallucination=contradicted / stated if stated else None,
        hallucinated=_mean([prediction.hallucinated for prediction in known]),
        length=_mean([prediction.length for prediction in counted]),
        curve=running["curve"],
        volatility=running["volatility"],
        by_chance=running["volatility_by_chance"],
        rouge_l=_mean(references),
        well_formed=_mean([prediction.well_formed for prediction in counted]),
        unparseable=_mean([prediction.unparseable for prediction in counted]),
        loops=METRICS["repetition"].compute(outputs)["loop_rate"],
        mixed_language=METRICS["mixed_language"].compute(outputs)["mixed_language_rate"],
    )


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean of numbers or truth values; None where there are none."""
    if not values:
        return None
    return sum(values) / len(values)


def table3(summaries: Mapping[str, Summary]) -> str:
    """Return the layout of the report's Table 3, a column a model, with what it leaves out marked as such."""
    columns = [_table3_cells(summary) for summary in summaries.values()]
    lines = [["measure", *summaries]]
    for title in columns[0]:
        lines.append([title, *(column[title] for column in columns)])
    return markdown(lines)


def _table3_cells(summary: Summary) -> dict[str, str]:
    """Return one model's column of Table 3, by the title of the row."""
    low, high = summary.interval
    return {
        "accuracy, percent": f"{100 * summary.accuracy:.1f} ±{50 * (high - low):.1f}",
        "hallucination, percent of stated facts": _number(_percent(summary.hallucination), 1),
        "- outputs with a hallucinated fact, percent": _number(_percent(summary.hallucinated), 1),
        "- the report's: 1 - accuracy": f"{1 - summary.accuracy:.3f}",
        "CoT length, words and marks": f"{summary.length:.1f}",
        "running accuracy, volatility in points": f"{100 * summary.volatility:.2f}",
        "- expected by chance": f"{100 * summary.by_chance:.2f}",
        "ROUGE-L of the rationale": _number(summary.rouge_l, 3),
        "format, percent": f"{100 * summary.well_formed:.1f}",
        "unparseable answers, percent": f"{100 * summary.unparseable:.1f}",
        "repetition loops, percent": f"{100 * summary.loops:.1f}",
        "mixed language, percent": f"{100 * summary.mixed_language:.1f}",
    }


def before_after(predictions: Mapping[str, Sequence[Prediction]], losses: Losses) -> str:
    """Return the report's Table 3 and section A.6 in one Markdown table: baseline, student, and what has changed.

    Args:
        predictions: by model, on the same questions; of more than two models the change is the last one's from the first.
        losses: by model, by kind (`"trace"`, `"answer"`), the loss of the reference output of each question; models that
            have none are left out.
    """
    columns = [_before_after_values(made, losses.get(name, {})) for name, made in predictions.items()]
    counted = 0
    for made in predictions.values():
        counted = max(counted, sum(prediction.scored for prediction in made))
    several = len(columns) > 1
    lines = [[f"{counted} questions", *predictions]]
    if several:
        lines[0].append("change")
    for title, (first, digits) in columns[0].items():
        line = [title]
        for column in columns:
            line.append(_number(column[title][0], digits))
        last = columns[-1][title][0]
        if several and (first is None or last is None):
            line.append("-")
        elif several:
            line.append(f"{last - first:+.{digits}f}")
        lines.append(line)
    return markdown(lines)


def _before_after_values(
    predictions: Sequence[Prediction], losses: Mapping[str, Mapping[str, float]]
) -> dict[str, tuple[float | None, int]]:
    """Return one model's numbers by the title of the row, each with the digits that the table shows of it."""
    summary = summarize(predictions)
    correct = [prediction.correct for prediction in predictions if prediction.scored]
    trace_losses = list(losses.get("trace", {}).values())
    answer_losses = list(losses.get("answer", {}).values())
    return {
        "accuracy, percent": (100 * summary.accuracy, 1),
        "hallucination, percent of stated facts": (_percent(summary.hallucination), 1),
        "- the report's: 1 - accuracy": (1 - summary.accuracy, 3),
        "CoT length, words and marks": (summary.length, 1),
        "running accuracy, volatility in points": (100 * summary.volatility, 2),
        "- expected by chance": (100 * summary.by_chance, 2),
        "ROUGE-L against the teacher's rationale": (summary.rouge_l, 3),
        "average loss of the teacher's trace, nats a token": (_mean(trace_losses), 3),
        "- of the gold answer without tags or rationale": (_mean(answer_losses), 3),
        "correct rate": (_mean(correct), 4),
    }


def _percent(share: float | None) -> float | None:
    if share is None:
        return None
    return 100 * share


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}"

"""What a model's predictions amount to: the rows of the report's Table 3, and the curve of its running accuracy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from siq_vl.evaluation.intervals import wilson
from siq_vl.evaluation.metrics import METRICS
from siq_vl.evaluation.predictions import Prediction
from siq_vl.evaluation.tables import markdown


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
    running = METRICS["running_accuracy"].compute(scores)
    outputs = [prediction.output for prediction in counted]
    known = [prediction for prediction in counted if prediction.stated is not None]
    stated = sum(prediction.stated for prediction in known)
    return Summary(
        accuracy=running["accuracy"],
        interval=wilson(sum(scores), len(scores)),
        hallucination=sum(prediction.contradicted for prediction in known) / stated if stated else None,
        hallucinated=_mean([float(prediction.hallucinated) for prediction in known]),
        length=_mean([float(prediction.length) for prediction in counted]),
        curve=running["curve"],
        volatility=running["volatility"],
        by_chance=running["volatility_by_chance"],
        rouge_l=_mean([prediction.rouge_l for prediction in counted if prediction.rouge_l is not None]),
        well_formed=_mean([float(prediction.well_formed) for prediction in counted]),
        unparseable=_mean([float(prediction.unparseable) for prediction in counted]),
        loops=METRICS["repetition"].compute(outputs)["loop_rate"],
        mixed_language=METRICS["mixed_language"].compute(outputs)["mixed_language_rate"],
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def table3(summaries: Mapping[str, Summary]) -> str:
    """Return the layout of the report's Table 3, a column a model, with what it leaves out marked as such."""
    rows = [
        ("accuracy, percent", lambda s: f"{100 * s.accuracy:.1f} ±{50 * (s.interval[1] - s.interval[0]):.1f}"),
        ("hallucination, percent of stated facts", lambda s: _number(s.hallucination, 100)),
        ("- outputs with a hallucinated fact, percent", lambda s: _number(s.hallucinated, 100)),
        ("- the report's: 1 - accuracy", lambda s: f"{1 - s.accuracy:.3f}"),
        ("CoT length, words and marks", lambda s: f"{s.length:.1f}"),
        ("running accuracy, volatility in points", lambda s: f"{100 * s.volatility:.2f}"),
        ("- expected by chance", lambda s: f"{100 * s.by_chance:.2f}"),
        ("ROUGE-L of the rationale", lambda s: _number(s.rouge_l, 1, 3)),
        ("format, percent", lambda s: f"{100 * s.well_formed:.1f}"),
        ("unparseable answers, percent", lambda s: f"{100 * s.unparseable:.1f}"),
        ("repetition loops, percent", lambda s: f"{100 * s.loops:.1f}"),
        ("mixed language, percent", lambda s: f"{100 * s.mixed_language:.1f}"),
    ]
    return markdown([["measure", *summaries], *([name, *map(value, summaries.values())] for name, value in rows)])


def before_after(
    predictions: Mapping[str, Sequence[Prediction]], losses: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> str:
    """Return the report's Table 3 and section A.6 in one Markdown table: baseline, student, and what has changed.

    Args:
        predictions: by model, on the same questions; of more than two models the change is the last one's from the first.
        losses: by model, by kind (`"trace"`, `"answer"`), the loss of the reference output of each question; models that
            have none are left out.
    """
    summaries = {name: summarize(made) for name, made in predictions.items()}
    counted = max(sum(prediction.scored for prediction in made) for made in predictions.values())
    rows: list[tuple[str, Callable[[str], float | None], int]] = [
        ("accuracy, percent", lambda name: 100 * summaries[name].accuracy, 1),
        ("hallucination, percent of stated facts", lambda name: _scaled(summaries[name].hallucination), 1),
        ("- the report's: 1 - accuracy", lambda name: 1 - summaries[name].accuracy, 3),
        ("CoT length, words and marks", lambda name: summaries[name].length, 1),
        ("running accuracy, volatility in points", lambda name: 100 * summaries[name].volatility, 2),
        ("- expected by chance", lambda name: 100 * summaries[name].by_chance, 2),
        ("ROUGE-L against the teacher's rationale", lambda name: summaries[name].rouge_l, 3),
        ("average loss of the teacher's trace, nats a token", lambda name: _mean_loss(losses, name, "trace"), 3),
        ("- of the gold answer without tags or rationale", lambda name: _mean_loss(losses, name, "answer"), 3),
        ("correct rate", lambda name: _mean([float(p.correct) for p in predictions[name] if p.scored]), 4),
    ]
    names = list(predictions)
    lines = [[f"{counted} questions", *names, *(["change"] if len(names) > 1 else [])]]
    for title, value, digits in rows:
        values = [value(name) for name in names]
        line = [title, *(_number(found, 1, digits) for found in values)]
        if len(names) > 1:
            both = values[0] is not None and values[-1] is not None
            line.append(f"{values[-1] - values[0]:+.{digits}f}" if both else "-")
        lines.append(line)
    return markdown(lines)


def _scaled(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _mean_loss(losses: Mapping[str, Mapping[str, Mapping[str, float]]], name: str, kind: str) -> float | None:
    return _mean(list(losses.get(name, {}).get(kind, {}).values()))


def _number(value: float | None, scale: float, digits: int = 1) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"

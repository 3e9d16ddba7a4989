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
        ignored_instruction: share of outputs that answer another question than the one asked.
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
    ignored_instruction: float
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
    instructions = METRICS["ignored_instruction"].compute(outputs, [prediction.question for prediction in counted])
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
        ignored_instruction=instructions["ignored_instruction_rate"],
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
        "ignored instructions, percent": f"{100 * summary.ignored_instruction:.1f}",
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
    # A model alone has changed from nothing.
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


def change_table(before: Sequence[Prediction], after: Sequence[Prediction]) -> str:
    """Return what has become of a baseline's answers, and of the length of its rationales: a row a pattern of change.

    Section A.5.4 of the report tells such patterns of 20 cases. The length is in words, numbers and punctuation marks.

    Args:
        before: the baseline's predictions.
        after: the student's, of the same questions in the same order.
    """
    names = {True: "right", False: "wrong"}
    # By what the answers were: how much longer each rationale has become.
    growths: dict[str, list[int]] = {}
    for was_right in (True, False):
        for is_right in (True, False):
            growths[f"{names[was_right]} -> {names[is_right]}"] = []
    growths["all"] = []
    for first, second in zip(before, after, strict=True):
        growth = second.length - first.length
        growths[f"{names[first.correct]} -> {names[second.correct]}"].append(growth)
        growths["all"].append(growth)
    lines = [["answer", "questions", "rationale shorter", "as long", "longer", "by, on average"]]
    for pattern, grown in growths.items():
        shorter = sum(growth < 0 for growth in grown)
        longer = sum(growth > 0 for growth in grown)
        mean = _mean(grown)
        cells = [str(count) for count in (len(grown), shorter, len(grown) - shorter - longer, longer)]
        lines.append([pattern, *cells, "-" if mean is None else f"{mean:+.1f}"])
    return markdown(lines)


def without_picture_line(name: str, predictions: Sequence[Prediction], blind: Sequence[Prediction]) -> str:
    """Return one line: how many answers a model that is shown no picture gives right as well.

    Section A.5.4 of the report names two patterns of its text-only student: right answers that follow from what usually
    goes together, and wrong ones where only the picture could have told.

    Args:
        name: what both are, for instance `"student beside blind"`.
        predictions: the model's.
        blind: those of one that saw no picture, of the same questions in the same order.
    """
    right = wrong = right_without = wrong_without = 0
    for seen, unseen in zip(predictions, blind, strict=True):
        if seen.correct:
            right += 1
            right_without += unseen.correct
        else:
            wrong += 1
            wrong_without += not unseen.correct
    return (
        f"{name}: {right_without} of {right} right answers are given without the picture too, and {wrong_without} of "
        f"{wrong} wrong ones are wrong without it as well"
    )


def _percent(share: float | None) -> float | None:
    if share is None:
        return None
    return 100 * share


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}"

"""Arms of an ablation, each trained with several seeds and asked the same questions: table, comparisons, plot."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from siq_vl.evaluation.metrics import METRICS
from siq_vl.evaluation.predictions import Prediction
from siq_vl.evaluation.statistics import Estimate, ratio_of_totals
from siq_vl.evaluation.tables import markdown, ordinary
from siq_vl.plots import interval_plot

# Answers of an arm to one way of asking: a list a seed.
Answers = Sequence[Sequence[Prediction]]


@dataclass(frozen=True)
class Measure:
    """One column of the table.

    Args:
        title: its header.
        way: the way of asking whose answers it is about.
        part: what it adds up.
        whole: what that is divided by; 1 for each answer by default.
        chosen: the questions it is about.
        scale: what the table multiplies it by.
        reasoning: only said of arms that reason.
    """

    title: str
    way: str
    part: Callable[[Prediction], float]
    whole: Callable[[Prediction], float] = lambda prediction: 1.0
    chosen: Callable[[Prediction], bool] = lambda prediction: True
    scale: float = 100.0
    reasoning: bool = False


def _single(prediction: Prediction) -> bool:
    return not prediction.multi_step


def _multi(prediction: Prediction) -> bool:
    return prediction.multi_step


def _score(prediction: Prediction) -> float:
    return prediction.score


def _length(prediction: Prediction) -> float:
    return prediction.length


def _structure(prediction: Prediction) -> float:
    return METRICS["structure_score"].score(prediction.output)["score"]


def _well_formed(prediction: Prediction) -> float:
    return prediction.well_formed


def _contradicted(prediction: Prediction) -> float:
    return prediction.contradicted or 0


def _stated(prediction: Prediction) -> float:
    return prediction.stated or 0


MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure("accuracy", "answers", _score),
    "single_step": Measure("single-step", "answers", _score, chosen=_single),
    "multi_step": Measure("multi-step", "answers", _score, chosen=_multi),
    "hallucination": Measure("contradicted facts", "answers", _contradicted, whole=_stated, reasoning=True),
    "length": Measure("rationale, words", "answers", _length, scale=1, reasoning=True),
    "structure": Measure("structure", "answers", _structure, reasoning=True),
    "well_formed": Measure("well-formed", "answers", _well_formed, reasoning=True),
    "direct_single_step": Measure("direct, single-step", "direct", _score, chosen=_single),
    "described": Measure("shown captions", "described", _score),
}
COMPARED = ("accuracy", "single_step", "multi_step", "hallucination", "length", "direct_single_step")


def estimates(ways: Mapping[str, Answers]) -> dict[str, Estimate]:
    """Return every measure of an arm that can be taken, over its seeds and the ordinary questions.

    Args:
        ways: the arm's answers by way of asking.

    Raises:
        ValueError: the seeds were asked different questions.
    """
    reasons = _has_rationale(ways["answers"])
    found = {}
    for name, measure in MEASURES.items():
        if measure.reasoning and not reasons:
            continue
        answers = ways.get(measure.way)
        # An arm that never reasons answers directly however it is asked.
        if not answers and measure.way == "direct" and not reasons:
            answers = ways["answers"]
        if not answers:
            continue
        estimate = _estimate(measure, answers)
        if estimate is not None:
            found[name] = estimate
    return found


def _has_rationale(answers: Answers) -> bool:
    for seed in answers:
        for prediction in seed:
            if prediction.rationale:
                return True
    return False


def _estimate(measure: Measure, answers: Answers) -> Estimate | None:
    """Return one measure of an arm; None where what it is divided by is 0 in all."""
    questions: list[list[str]] = []
    parts, wholes = [], []
    for seed in answers:
        predictions = _measured(measure, seed)
        questions.append([prediction.id for prediction in predictions])
        # Seeds are compared question by question, so a row of the arrays has to be about the same ones in all.
        if questions[-1] != questions[0]:
            raise ValueError(f"the seeds' {measure.way} are to different questions: evaluate them all with one --count")
        parts.append([float(measure.part(prediction)) for prediction in predictions])
        wholes.append([float(measure.whole(prediction)) for prediction in predictions])
    # Both of shape (seeds, questions).
    return ratio_of_totals(np.array(parts), np.array(wholes))


def _measured(measure: Measure, predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return the predictions that a measure is about: to ordinary questions, without those that faults leave unscored."""
    chosen = []
    for prediction in ordinary(predictions):
        if prediction.scored and measure.chosen(prediction):
            chosen.append(prediction)
    return chosen


@dataclass(frozen=True)
class Result:
    """What came of an arm.

    Args:
        about: what it is, in a line.
        steps: optimizer steps of a run; 0 where nothing was trained.
        seconds: of training, a run.
        estimates: its measures.
    """

    about: str
    steps: int
    seconds: Sequence[float]
    estimates: Mapping[str, Estimate]


Results = Mapping[str, Result]
Pairs = Iterable[tuple[str, str]]


def report(results: Results, pairs: Pairs) -> str:
    """Return the arms, their table and their differences as Markdown.

    Args:
        results: by arm.
        pairs: arms to compare, first minus second; pairs that lack a result are left out.
    """
    made = tables(results, pairs)
    listed = "\n".join(f"- `{arm}`: {result.about}" for arm, result in results.items())
    return f"""# Ablations

{listed}

## Arms

{made["arms"]}

Over {_most_questions(results)} held-out questions, in percent, with half-widths of 95% intervals. `seconds`: mean of a run's training, with
what it measures on the way. `contradicted facts`: of the facts that an output states, those that the picture contradicts. `rationale, words`: words, numbers and marks. `direct`: asked with
thinking off. `shown captions`: asked with the caption as text in place of the picture.

## Differences

{made["differences"]}

First minus second, on the same questions and seed by seed, in points (the length in words), with half-widths of 95%
intervals.

The intervals are over other seeds and other questions: both are random effects, every run answers every question, and
Satterthwaite's degrees of freedom allow for the few seeds. An arm without seeds has an interval over questions alone.
All arms start from one checkpoint; what another one would change is in no interval.
"""


def tables(results: Results, pairs: Pairs) -> dict[str, str]:
    """Return the report's tables by name, as Markdown."""
    return {"arms": _arms_table(results), "differences": _differences_table(results, pairs)}


def _most_questions(results: Results) -> int:
    """Return how many questions the arms were asked; measures of some of them have fewer."""
    most = 0
    for result in results.values():
        for estimate in result.estimates.values():
            most = max(most, estimate.influence.shape[1])
    return most


def _differences(results: Results, first: str, second: str) -> dict[str, Estimate]:
    """Return first minus second, of every measure that both have."""
    minuend, subtrahend = results[first].estimates, results[second].estimates
    found = {}
    for name in COMPARED:
        if name in minuend and name in subtrahend:
            found[name] = minuend[name] - subtrahend[name]
    return found


def _complete(results: Results, pairs: Pairs) -> list[tuple[str, str]]:
    return [pair for pair in pairs if results.keys() >= set(pair)]


def _arms_table(results: Results) -> str:
    taken: set[str] = set()
    for result in results.values():
        taken.update(result.estimates)
    columns = [name for name in MEASURES if name in taken]
    rows = [["arm", "seeds", "steps", "seconds", *_titles(columns)]]
    for arm, result in results.items():
        seeds = seconds = "-"
        if result.seconds:
            seeds = str(len(result.seconds))
            seconds = f"{sum(result.seconds) / len(result.seconds):.0f}"
        row = [arm, seeds, str(result.steps), seconds]
        for name in columns:
            row.append(_cell(name, result.estimates.get(name)))
        rows.append(row)
    return markdown(rows)


def _differences_table(results: Results, pairs: Pairs) -> str:
    rows = [["first - second", *_titles(COMPARED)]]
    for first, second in _complete(results, pairs):
        found = _differences(results, first, second)
        row = [f"{first} - {second}"]
        for name in COMPARED:
            row.append(_cell(name, found.get(name), sign="+"))
        rows.append(row)
    return markdown(rows)


def _titles(names: Iterable[str]) -> list[str]:
    return [MEASURES[name].title for name in names]


def _cell(name: str, found: Estimate | None, sign: str = "") -> str:
    """Return one number of a table; without a half-width where no two answers differ."""
    if found is None:
        return "-"
    scale = MEASURES[name].scale
    value = f"{scale * found.value:{sign}.1f}"
    if not found.half_width:
        return value
    return f"{value} ± {scale * found.half_width:.1f}"


def numbers(results: Results, pairs: Pairs) -> dict:
    """Return everything in the form of results.json: values, both ends of their intervals, and the value of each seed."""
    arms = {}
    for arm, result in results.items():
        arms[arm] = {
            "about": result.about,
            "steps": result.steps,
            "seconds": list(result.seconds),
            "measures": _numbers(result.estimates),
        }
    differences = []
    for first, second in _complete(results, pairs):
        measures = _numbers(_differences(results, first, second))
        differences.append({"first": first, "second": second, "measures": measures})
    return {"arms": arms, "differences": differences}


def _numbers(estimates: Mapping[str, Estimate]) -> dict[str, dict]:
    measures = {}
    for name, estimate in estimates.items():
        low, high = estimate.interval
        measures[name] = {"value": estimate.value, "low": low, "high": high, "by_seed": estimate.by_seed}
    return measures


def mean_over_seeds(runs: Sequence[Sequence[Mapping]]) -> list[dict[str, float]]:
    """Return how reasoning emerged in an arm: the means over its seeds of every measure, at the steps that all have.

    Args:
        runs: entries of `emergence.jsonl`, a list a seed.
    """
    by_step = []  # the entries of each run
    for entries in runs:
        by_step.append({entry["step"]: entry for entry in entries})
    shared = set.intersection(*(set(entries) for entries in by_step))
    means = []
    for step in sorted(shared):
        mean = {}
        for name in by_step[0][step]:
            mean[name] = sum(entries[step][name] for entries in by_step) / len(by_step)
        means.append(mean)
    return means


# Panels of the plot: title, and the measures in it.
_PANELS = (
    ("accuracy in percent", ("single_step", "multi_step")),
    ("facts contradicted, in percent", ("hallucination",)),
)


def plot(results: Results) -> str:
    """Return an SVG of accuracy and hallucination: a row an arm, a dot and its 95% interval a measure."""
    panels = []
    for title, names in _PANELS:
        panels.append((title, dict(zip(names, _titles(names), strict=True))))
    rows: dict[str, dict[str, tuple[float, float, float]]] = {}
    for arm, result in results.items():
        rows[arm] = {}
        for name, estimate in result.estimates.items():
            low, high = estimate.interval
            # A share cannot lie outside 0 and 1, whatever the width of its interval.
            rows[arm][name] = (100 * estimate.value, 100 * max(0.0, low), 100 * min(1.0, high))
    return interval_plot(panels, rows)

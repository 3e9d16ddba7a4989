"""Arms of an ablation, each trained with several seeds and asked the same questions: table, comparisons, figure."""

from collections.abc import Callable, Mapping, Sequence
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
    whole: Callable[[Prediction], float] = lambda made: 1.0
    chosen: Callable[[Prediction], bool] = lambda made: True
    scale: float = 100.0
    reasoning: bool = False


def _single(made: Prediction) -> bool:
    return not made.multi_step


def _multi(made: Prediction) -> bool:
    return made.multi_step


def _score(made: Prediction) -> float:
    return made.score


def _structure(made: Prediction) -> float:
    return METRICS["structure_score"].score(made.output)["score"]


MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure("accuracy", "answers", _score),
    "single_step": Measure("single-step", "answers", _score, chosen=_single),
    "multi_step": Measure("multi-step", "answers", _score, chosen=_multi),
    "hallucination": Measure(
        "contradicted facts",
        "answers",
        lambda made: made.contradicted or 0,
        lambda made: made.stated or 0,
        reasoning=True,
    ),
    "length": Measure("rationale, words", "answers", lambda made: made.length, scale=1, reasoning=True),
    "structure": Measure("structure", "answers", _structure, reasoning=True),
    "well_formed": Measure("well-formed", "answers", lambda made: made.well_formed, reasoning=True),
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
    made = {}
    reasons = any(prediction.rationale for seed in ways["answers"] for prediction in seed)
    for name, measure in MEASURES.items():
        # An arm that never reasons answers directly however it is asked.
        answers = ways.get(measure.way) or (ways["answers"] if measure.way == "direct" and not reasons else None)
        if answers is None or (measure.reasoning and not reasons):
            continue
        seeds = [[made for made in ordinary(seed) if made.scored and measure.chosen(made)] for seed in answers]
        if any([made.id for made in seed] != [made.id for made in seeds[0]] for seed in seeds):
            raise ValueError(f"the seeds' {measure.way} are to different questions: evaluate them all with one --count")
        parts, wholes = (
            np.array([[float(of(made)) for made in seed] for seed in seeds]) for of in (measure.part, measure.whole)
        )
        found = ratio_of_totals(parts, wholes)
        if found is not None:
            made[name] = found
    return made


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
Pairs = Sequence[tuple[str, str]]


def report(results: Results, pairs: Pairs) -> str:
    """Return the arms, their table and their differences as Markdown.

    Args:
        results: by arm.
        pairs: arms to compare, first minus second; pairs that lack a result are left out.
    """
    questions = max(found.influence.shape[1] for result in results.values() for found in result.estimates.values())
    listed = "\n".join(f"- `{arm}`: {result.about}" for arm, result in results.items())
    return f"""# Ablations

{listed}

## Arms

{_arms_table(results)}

Over {questions} held-out questions, in percent, with half-widths of 95% intervals. `seconds`: mean of a run's training, with
what it measures on the way. `contradicted facts`: of the facts that an output states, those that the picture contradicts. `rationale, words`: words, numbers and marks. `direct`: asked with
thinking off. `shown captions`: asked with the caption as text in place of the picture.

## Differences

{_differences_table(results, pairs)}

First minus second, on the same questions and seed by seed, in points (the length in words), with half-widths of 95%
intervals.

The intervals are over other seeds and other questions: both are random effects, every run answers every question, and
Satterthwaite's degrees of freedom allow for the few seeds. An arm without seeds has an interval over questions alone.
All arms start from one checkpoint; what another one would change is in no interval.
"""


def tables(results: Results, pairs: Pairs) -> dict[str, str]:
    """Return the report's tables by name, as Markdown."""
    return {"arms": _arms_table(results), "differences": _differences_table(results, pairs)}


def _differences(results: Results, first: str, second: str) -> dict[str, Estimate]:
    one, other = results[first].estimates, results[second].estimates
    return {name: one[name] - other[name] for name in COMPARED if name in one and name in other}


def _complete(results: Results, pairs: Pairs) -> list[tuple[str, str]]:
    return [pair for pair in pairs if set(pair) <= set(results)]


def _arms_table(results: Results) -> str:
    columns = [name for name in MEASURES if any(name in result.estimates for result in results.values())]
    lines = [["arm", "seeds", "steps", "seconds", *(MEASURES[name].title for name in columns)]]
    for arm, result in results.items():
        seconds = f"{sum(result.seconds) / len(result.seconds):.0f}" if result.seconds else "-"
        cells = [_cell(name, result.estimates.get(name)) for name in columns]
        lines.append([arm, str(len(result.seconds) or "-"), str(result.steps), seconds, *cells])
    return markdown(lines)


def _differences_table(results: Results, pairs: Pairs) -> str:
    lines = [["first - second", *(MEASURES[name].title for name in COMPARED)]]
    for first, second in _complete(results, pairs):
        found = _differences(results, first, second)
        lines.append([f"{first} - {second}", *(_cell(name, found.get(name), "+") for name in COMPARED)])
    return markdown(lines)


def _cell(name: str, found: Estimate | None, sign: str = "") -> str:
    """Return one number of a table; without a half-width where no two answers differ."""
    if found is None:
        return "-"
    scale = MEASURES[name].scale
    value = f"{scale * found.value:{sign}.1f}"
    return f"{value} ± {scale * found.half_width:.1f}" if found.half_width else value


def numbers(results: Results, pairs: Pairs) -> dict:
    """Return everything in the form of results.json: values, both ends of their intervals, and the value of each seed."""
    return {
        "arms": {
            arm: {
                "about": result.about,
                "steps": result.steps,
                "seconds": list(result.seconds),
                "measures": _numbers(result.estimates),
            }
            for arm, result in results.items()
        },
        "differences": [
            {"first": first, "second": second, "measures": _numbers(_differences(results, first, second))}
            for first, second in _complete(results, pairs)
        ],
    }


def _numbers(estimates: Mapping[str, Estimate]) -> dict[str, dict]:
    made = {}
    for name, found in estimates.items():
        low, high = found.interval
        made[name] = {"value": found.value, "low": low, "high": high, "by_seed": found.by_seed}
    return made


def mean_over_seeds(runs: Sequence[Sequence[Mapping]]) -> list[dict[str, float]]:
    """Return how reasoning emerged in an arm: the means over its seeds of every measure, at the steps that all have.

    Args:
        runs: entries of `emergence.jsonl`, a list a seed.
    """
    by_step = [{entry["step"]: entry for entry in entries} for entries in runs]
    steps = sorted(set.intersection(*(set(entries) for entries in by_step)))
    return [
        {name: sum(entries[step][name] for entries in by_step) / len(by_step) for name in by_step[0][step]}
        for step in steps
    ]


# Panels of the plot: title, and the measures in it.
_PANELS = (
    ("accuracy in percent", ("single_step", "multi_step")),
    ("facts contradicted, in percent", ("hallucination",)),
)


def plot(results: Results) -> str:
    """Return an SVG of accuracy and hallucination: a row an arm, a dot and its 95% interval a measure."""
    panels = []
    for title, names in _PANELS:
        panels.append((title, {name: MEASURES[name].title for name in names}))
    rows: dict[str, dict[str, tuple[float, float, float]]] = {}
    for arm, result in results.items():
        rows[arm] = {}
        for name, estimate in result.estimates.items():
            low, high = estimate.interval
            # A share cannot lie outside 0 and 1, whatever the width of its interval.
            rows[arm][name] = (100 * estimate.value, 100 * max(0.0, low), 100 * min(1.0, high))
    return interval_plot(panels, rows)

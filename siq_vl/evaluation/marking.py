"""Marking one output: the one place where questions meet the metrics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from siq_vl.evaluation import metrics
from siq_vl.evaluation.items import Item
from siq_vl.parsing.answers import Parsed, Reading, agrees, matches, parse, read


@dataclass(frozen=True)
class Marks:
    """What is measured of one output.

    Args:
        rationale: what was said before the answer.
        answer: what was answered; empty where nothing can be read as an answer.
        well_formed: whether the output ran `<think>…</think><answer>…</answer>`.
        unparseable: whether no answer of the kind that the question asks for can be read.
        score: the question's metric, between 0 and 1.
        stated: facts of the picture that the output states, where the true ones are known.
        contradicted: how many of them the picture contradicts.
        rouge_l: of the rationale against a reference rationale, where there is one.
    """

    rationale: str
    answer: str
    well_formed: bool
    unparseable: bool
    score: float
    stated: int | None = None
    contradicted: int | None = None
    rouge_l: float | None = None


Score = Callable[[str, Sequence[str], Sequence[str]], float]


def _words(answer: str, golds: Sequence[str], choices: Sequence[str]) -> float:
    return float(any(matches(answer, gold) for gold in golds))


def _numbers(answer: str, golds: Sequence[str], choices: Sequence[str]) -> float:
    return float(agrees(answer, golds))


def _published(metric: Callable[..., metrics.Row], with_choices: bool = False) -> Score:
    if with_choices:
        return lambda answer, golds, choices: metric(answer, golds, choices)["score"]
    return lambda answer, golds, choices: metric(answer, golds)["score"]


# By name, the kind of answer that is read from an output, and its score. "words" compares words alone, for drawn figures;
# "number" also numbers of equal value, however written; the others are the published metrics of their names.
METRICS: dict[str, tuple[str, Score]] = {
    "words": ("open", _words),
    "number": ("open", _numbers),
    "exact_match": ("open", _published(metrics.exact_match)),
    "relaxed": ("open", _published(metrics.relaxed_accuracy)),
    "vqa": ("open", _published(metrics.vqa_accuracy)),
    "anls": ("open", _published(metrics.anls)),
    "choice": ("choice", _published(metrics.multiple_choice, with_choices=True)),
    "yes_no": ("yes_no", _published(metrics.pope)),
}


def mark(item: Item, output: str) -> Marks:
    """Return the marks of a model's output to a question.

    Raises:
        ValueError: the question's metric is unknown.
    """
    if item.metric not in METRICS:
        raise ValueError(f"metric is {item.metric!r}; it must be one of {', '.join(METRICS)}")
    kind, scored = METRICS[item.metric]
    found: Parsed | Reading
    if item.metric == "words":
        found = parse(output)
        parseable = bool(found.answer)
    else:
        found = reading = read(output, kind=kind, choices=item.choices)
        parseable = reading.parseable
    facts = metrics.hallucination(output, item.caption) if item.caption else {}
    return Marks(
        rationale=found.rationale,
        answer=found.answer,
        well_formed=found.well_formed,
        unparseable=not parseable,
        score=scored(found.answer, item.golds, item.choices) if item.golds and parseable else 0.0,
        stated=int(facts["stated"]) if facts else None,
        contradicted=int(facts["contradicted"]) if facts else None,
        rouge_l=metrics.rouge_l(found.rationale, item.reasoning)["score"] if item.reasoning else None,
    )

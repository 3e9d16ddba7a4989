"""Which traces an epoch trains on, and in which order; decided by what is known of each, before any is read.

Whatever is drawn hangs on the seed and on the question alone, so that another trace in the store changes nothing else.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple


@dataclass(frozen=True)
class TraceChoice:
    """A trace that may be trained on.

    Attributes:
        index: its position in the store.
        sample_id: its question.
        teacher: its teacher's name.
        length: of its rationale, in the student's tokens; 0 where nobody asks.
    """

    index: int
    sample_id: str
    teacher: str
    length: int


class PlannedRow(NamedTuple):
    """A trace, and whether the student is taught to answer without reasoning."""

    trace: TraceChoice
    direct: bool


def split_by_question(
    traces: Sequence[TraceChoice], validation_share: float, seed: int
) -> tuple[list[TraceChoice], list[TraceChoice]]:
    """Return the traces to train on and those to validate with; a question is in one of the two."""
    train: list[TraceChoice] = []
    validation: list[TraceChoice] = []
    for trace in traces:
        if Random(f"{seed}/{trace.sample_id}/validation").random() < validation_share:
            validation.append(trace)
        else:
            train.append(trace)
    return train, validation


def choose(
    traces: Sequence[TraceChoice], weights: Mapping[str, float], per_question: int, direct_share: float, seed: int
) -> list[PlannedRow]:
    """Return the rows that are used, in the store's order.

    Args:
        traces: those that may be used.
        weights: of the teachers, by name.
        per_question: traces of one question that are drawn; 0: all of them.
        direct_share: the share of the rows that answer directly.
        seed: decides what is drawn.
    """
    by_question: dict[str, list[TraceChoice]] = defaultdict(list)
    for trace in traces:
        by_question[trace.sample_id].append(trace)
    rows = []
    for sample_id, of_question in by_question.items():
        if per_question:
            of_question = draw_by_teacher(of_question, weights, per_question, Random(f"{seed}/{sample_id}/draw"))
        # Which rows only answer depends neither on the seed nor on the teachers: runs that differ in these compare.
        direct_rng = Random(f"{sample_id}/row")
        for trace in of_question:
            rows.append(PlannedRow(trace, direct_rng.random() < direct_share))
    return sorted(rows, key=lambda row: row.trace.index)


def draw_by_teacher(
    traces: Sequence[TraceChoice], weights: Mapping[str, float], count: int, rng: Random
) -> list[TraceChoice]:
    """Draw some traces of a question without replacement: first a teacher by weight, then one of its traces."""
    left = list(traces)
    drawn: list[TraceChoice] = []
    while left and len(drawn) < count:
        names = sorted({trace.teacher for trace in left})
        name = rng.choices(names, [weights[each] for each in names])[0]
        trace = rng.choice([each for each in left if each.teacher == name])
        drawn.append(trace)
        left.remove(trace)
    return drawn


def order_epoch(rows: Sequence[PlannedRow], curriculum: str, seed: int, count: int | None) -> list[PlannedRow]:
    """Return the rows of an epoch: no more than `count`, and for a curriculum in their order.

    Without a curriculum the trainer shuffles them, anew in each epoch. With one, rows that only answer have their places
    drawn at random among the others.
    """
    rng = Random(f"{seed}/plan")
    rows = list(rows)
    if count is not None and count < len(rows):
        places = sorted(rng.sample(range(len(rows)), count))
        rows = [rows[place] for place in places]
    if curriculum == "none":
        return rows
    # The shuffle decides where the direct rows lie; between them go the others, the shortest rationale first.
    rng.shuffle(rows)
    reasoning = sorted((row for row in rows if not row.direct), key=lambda row: row.trace.length)
    growing = iter(reasoning)
    ordered = []
    for row in rows:
        if row.direct:
            ordered.append(row)
        else:
            ordered.append(next(growing))
    return ordered

"""Accuracy tables with 95% intervals, as aligned text that is Markdown too."""

from collections.abc import Callable, Mapping, Sequence

from siq_vl.evaluation.intervals import paired_difference, wilson
from siq_vl.evaluation.predictions import Prediction

Rows = Sequence[tuple[str, Callable[[Prediction], bool]]]

_DOMAINS = ("scenes", "charts", "documents")


def table_rows() -> Rows:
    """Return the table's rows: every domain by single- and multi-step, their totals, and the reported-only groups."""

    def of(domain: str | None, multi_step: bool | None, group: str = "held out") -> Callable[[Prediction], bool]:
        return lambda prediction: (
            prediction.group == group
            and domain in (None, prediction.domain)
            and multi_step in (None, prediction.multi_step)
        )

    rows = []
    for domain in _DOMAINS:
        rows += [(domain, of(domain, None)), ("- single-step", of(domain, False)), ("- multi-step", of(domain, True))]
    rows += [("all", of(None, None)), ("- single-step", of(None, False)), ("- multi-step", of(None, True))]
    rows += [("new combinations", of(None, None, "combinations")), ("hard (reported only)", of(None, None, "hard"))]
    return rows


def accuracy_table(predictions: Mapping[str, Sequence[Prediction]]) -> str:
    """Return accuracies in percent with half-widths of Wilson's 95% interval, one column a model.

    Args:
        predictions: by model, on the same items.
    """
    first = next(iter(predictions.values()))
    lines = [["questions", "n", *predictions]]
    for name, chosen in table_rows():
        count = sum(map(chosen, first))
        if count:
            lines.append([name, str(count), *(_cell([p for p in made if chosen(p)]) for made in predictions.values())])
    return markdown(lines)


def _cell(predictions: Sequence[Prediction]) -> str:
    right = sum(prediction.correct for prediction in predictions)
    low, high = wilson(right, len(predictions))
    return f"{100 * right / len(predictions):5.1f} ±{50 * (high - low):4.1f}"


def difference_line(name: str, before: Sequence[Prediction], after: Sequence[Prediction]) -> str:
    """Return one line: how much more often `after` is right than `before` on the same questions."""
    mean, half = paired_difference([p.correct for p in before], [p.correct for p in after])
    return f"{name}: {100 * mean:+.1f} points, 95% interval ±{100 * half:.1f} (paired, {len(before)} questions)"


def caption_table(scores: Mapping[str, Mapping[str, float]], count: int) -> str:
    """Return the caption facts that are right, in percent, by domain and by what the model was shown."""
    header = {"picture": "its picture", "blind": "no picture", "shuffled": "another's picture"}
    lines = [[f"caption facts right ({count} pictures)", *(header[way] for way in scores)]]
    for domain in _DOMAINS:
        lines.append([domain, *(f"{100 * by_domain[domain]:5.1f}" for by_domain in scores.values())])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as an aligned Markdown table, the first row its header."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    drawn = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    drawn.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in drawn)

"""Accuracy tables with 95% intervals, as aligned text that is Markdown too."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from siq_vl.evaluation.intervals import mcnemar, paired_bootstrap, paired_difference, wilson
from siq_vl.evaluation.predictions import Prediction

Rows = Sequence[tuple[str, Callable[[Prediction], bool]]]

_DOMAINS = ("scenes", "charts", "documents")
_GROUPS = ("held out", "combinations", "hard")


def table_rows(predictions: Sequence[Prediction]) -> Rows:
    """Return the table's rows.

    For drawn figures every domain by single- and multi-step, their totals, and the reported-only groups; for other data
    its domains and their total.
    """
    rows: list[tuple[str, Callable[[Prediction], bool]]]
    if any(prediction.group not in _GROUPS for prediction in predictions):
        domains = dict.fromkeys(prediction.domain for prediction in predictions)
        rows = [(domain, partial(_is_of, domain)) for domain in domains]
        return [*rows, ("all", lambda prediction: True)] if len(rows) > 1 else rows

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


def _is_of(domain: str, prediction: Prediction) -> bool:
    return prediction.domain == domain


def ordinary(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return the predictions that comparisons and summaries are about: of drawn figures the ordinary group, else all."""
    if any(prediction.group not in _GROUPS for prediction in predictions):
        return list(predictions)
    return [prediction for prediction in predictions if prediction.group == "held out"]


def accuracy_table(predictions: Mapping[str, Sequence[Prediction]]) -> str:
    """Return accuracies in percent with half-widths of Wilson's 95% interval, one column a model.

    Args:
        predictions: by model, on the same items.
    """
    return _table(predictions, table_rows(next(iter(predictions.values()))))


def type_table(predictions: Mapping[str, Sequence[Prediction]]) -> str:
    """Return accuracies in percent with both ends of Wilson's 95% interval, by domain and question type.

    Args:
        predictions: by model, on the same items.
    """
    asked = dict.fromkeys((p.group, p.domain, p.type) for p in next(iter(predictions.values())))
    ordered = sorted(asked, key=lambda kind: (_place(kind[0], _GROUPS), _place(kind[1], _DOMAINS), kind))
    single = len({group for group, _, _ in asked}) == 1
    rows = [
        (
            f"{domain}, {type}" if single or group == "held out" else f"{group}: {domain}, {type}",
            _of(group, domain, type),
        )
        for group, domain, type in ordered
    ]
    return _table(predictions, rows, _cell_with_ends)


def _of(group: str, domain: str, type: str) -> Callable[[Prediction], bool]:
    return lambda prediction: (prediction.group, prediction.domain, prediction.type) == (group, domain, type)


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _table(
    predictions: Mapping[str, Sequence[Prediction]],
    rows: Rows,
    cell: Callable[[Sequence[Prediction]], str] | None = None,
) -> str:
    lines = [["questions", "n", *predictions]]
    for name, chosen in rows:
        picked = {model: [p for p in made if chosen(p) and p.scored] for model, made in predictions.items()}
        count = max(map(len, picked.values()))
        if count:
            lines.append([name, str(count), *map(cell or accuracy_cell, picked.values())])
    return markdown(lines)


def accuracy_cell(predictions: Sequence[Prediction]) -> str:
    """Return the accuracy in percent with the half-width of Wilson's 95% interval."""
    if not predictions:
        return "-"
    right = sum(prediction.score for prediction in predictions)
    low, high = wilson(right, len(predictions))
    return f"{100 * right / len(predictions):5.1f} ±{50 * (high - low):4.1f}"


def _cell_with_ends(predictions: Sequence[Prediction]) -> str:
    if not predictions:
        return "-"
    right = sum(prediction.score for prediction in predictions)
    low, high = wilson(right, len(predictions))
    return f"{100 * right / len(predictions):5.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def difference_line(name: str, before: Sequence[Prediction], after: Sequence[Prediction]) -> str:
    """Return one line: how much more often `after` is right than `before` on the same questions."""
    mean, half = paired_difference([p.correct for p in before], [p.correct for p in after])
    return f"{name}: {100 * mean:+.1f} points, 95% interval ±{100 * half:.1f} (paired, {len(before)} questions)"


def comparison_line(name: str, before: Sequence[Prediction], after: Sequence[Prediction]) -> str:
    """Return one line: two models on the same questions, by paired bootstrap and McNemar's exact test."""
    mean, low, high = paired_bootstrap([p.score for p in before], [p.score for p in after])
    lost, won, p_value = mcnemar([p.correct for p in before], [p.correct for p in after])
    return (
        f"{name}: {100 * mean:+.1f} points, 95% interval [{100 * low:+.1f}, {100 * high:+.1f}] (paired bootstrap, "
        f"{len(before)} questions); {won} wrong -> right, {lost} right -> wrong, McNemar's exact p = {p_value:.2g}"
    )


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


def table_cells(table: str) -> list[list[str]]:
    """Return the rows of cells of a table that `markdown` wrote, its header first."""
    header, _, *rows = table.splitlines()
    cells = []
    for line in [header, *rows]:
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells

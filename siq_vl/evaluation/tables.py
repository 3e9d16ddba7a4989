"""Accuracy tables with 95% intervals, as aligned text that is Markdown too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from siq_vl.evaluation.metrics import METRICS
from siq_vl.evaluation.predictions import Prediction
from siq_vl.evaluation.statistics import mcnemar, paired_bootstrap, paired_difference, wilson

PredictionsOfModels = Mapping[str, Sequence[Prediction]]

_DOMAINS = ("scenes", "charts", "documents")
_GROUPS = ("held out", "combinations", "hard")


@dataclass(frozen=True)
class _Row:
    """A row of an accuracy table: its title, and which questions it counts; None stands for any."""

    title: str
    group: str | None = None
    domain: str | None = None
    type: str | None = None
    multi_step: bool | None = None

    def counts(self, prediction: Prediction) -> bool:
        """Return whether a question is of this row."""
        for name in ("group", "domain", "type", "multi_step"):
            wanted = getattr(self, name)
            if wanted is not None and getattr(prediction, name) != wanted:
                return False
        return True


def _is_drawn(predictions: Sequence[Prediction]) -> bool:
    """Return whether all questions are about drawn figures."""
    return all(prediction.group in _GROUPS for prediction in predictions)


def _accuracy_rows(predictions: Sequence[Prediction]) -> list[_Row]:
    """Return the rows of the accuracy table.

    For drawn figures every domain by single- and multi-step, their totals, and the reported-only groups; for other data
    its domains and their total.
    """
    rows = []
    # Sources of other data know nothing of steps and groups.
    if not _is_drawn(predictions):
        for domain in dict.fromkeys(prediction.domain for prediction in predictions):
            rows.append(_Row(domain, domain=domain))
        if len(rows) > 1:
            rows.append(_Row("all"))
        return rows
    for domain in (*_DOMAINS, None):  # None: all of them
        rows.append(_Row(domain or "all", "held out", domain))
        rows.append(_Row("- single-step", "held out", domain, multi_step=False))
        rows.append(_Row("- multi-step", "held out", domain, multi_step=True))
    rows.append(_Row("new combinations", "combinations"))
    rows.append(_Row("hard (reported only)", "hard"))
    return rows


def _type_rows(predictions: Sequence[Prediction]) -> list[_Row]:
    """Return a row for every type of question, ordinary ones first, by domain."""
    asked = {(prediction.group, prediction.domain, prediction.type) for prediction in predictions}
    groups = {group for group, _, _ in asked}

    def order(kind: tuple[str, str, str]) -> tuple:
        group, domain, _ = kind
        return _place(group, _GROUPS), _place(domain, _DOMAINS), kind

    rows = []
    for group, domain, type in sorted(asked, key=order):
        title = f"{domain}, {type}"
        if len(groups) > 1 and group != "held out":
            title = f"{group}: {title}"
        rows.append(_Row(title, group, domain, type))
    return rows


def _place(name: str, order: Sequence[str]) -> int:
    """Return where a name stands in an order; names that are not in it come last."""
    if name in order:
        return order.index(name)
    return len(order)


def ordinary(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return the predictions that comparisons and summaries are about: of drawn figures the ordinary group, else all."""
    if not _is_drawn(predictions):
        return list(predictions)
    return [prediction for prediction in predictions if prediction.group == "held out"]


def accuracy_table(predictions: PredictionsOfModels) -> str:
    """Return accuracies in percent with half-widths of Wilson's 95% interval, one column a model.

    Args:
        predictions: by model, on the same items.
    """
    first = next(iter(predictions.values()))
    return _table(predictions, _accuracy_rows(first), accuracy_cell)


def type_table(predictions: PredictionsOfModels) -> str:
    """Return accuracies in percent with both ends of Wilson's 95% interval, by domain and question type.

    Args:
        predictions: by model, on the same items.
    """
    first = next(iter(predictions.values()))
    return _table(predictions, _type_rows(first), _cell_with_ends)


def _table(predictions: PredictionsOfModels, rows: Sequence[_Row], cell: Callable[[Sequence[Prediction]], str]) -> str:
    """Return a table of accuracies, rows without a question left out."""
    lines = [["questions", "n", *predictions]]
    for row in rows:
        cells = []
        most = 0
        for of_model in predictions.values():
            counted = [prediction for prediction in of_model if prediction.scored and row.counts(prediction)]
            # Models differ in their number of questions only where one could not read a picture.
            most = max(most, len(counted))
            cells.append(cell(counted))
        if most:
            lines.append([row.title, str(most), *cells])
    return markdown(lines)


def accuracy_cell(predictions: Sequence[Prediction]) -> str:
    """Return the accuracy in percent with the half-width of Wilson's 95% interval."""
    if not predictions:
        return "-"
    accuracy, low, high = _accuracy(predictions)
    return f"{100 * accuracy:5.1f} ±{50 * (high - low):4.1f}"


def _cell_with_ends(predictions: Sequence[Prediction]) -> str:
    if not predictions:
        return "-"
    accuracy, low, high = _accuracy(predictions)
    return f"{100 * accuracy:5.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def _accuracy(predictions: Sequence[Prediction]) -> tuple[float, float, float]:
    """Return the mean score and both ends of its interval."""
    # Scores, not truth values: some metrics give part marks.
    total = sum(prediction.score for prediction in predictions)
    return total / len(predictions), *wilson(total, len(predictions))


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


def yes_no_table(predictions: PredictionsOfModels) -> str:
    """Return POPE's numbers of answers to yes-or-no questions, in percent, a row a model."""
    lines = [["yes or no", "n", "accuracy", "precision", "recall", "F1", "yes", "neither"]]
    for name, of_model in predictions.items():
        counted = [prediction for prediction in of_model if prediction.scored]
        if not counted:
            continue
        answers = ["" if prediction.unparseable else prediction.answer for prediction in counted]
        found = METRICS["pope"].compute(answers, [[prediction.gold] for prediction in counted])
        line = [name, str(len(counted))]
        for share in ("accuracy", "precision", "recall", "f1", "yes_rate", "unparseable"):
            line.append(f"{100 * found[share]:.1f}")
        lines.append(line)
    return markdown(lines)


def caption_table(scores: Mapping[str, Mapping[str, float]], count: int) -> str:
    """Return the caption facts that are right, in percent, by domain and by what the model was shown."""
    titles = {"picture": "its picture", "blind": "no picture", "shuffled": "another's picture"}
    lines = [[f"caption facts right ({count} pictures)"]]
    for shown in scores:
        lines[0].append(titles[shown])
    for domain in _DOMAINS:
        shares = [f"{100 * by_domain[domain]:5.1f}" for by_domain in scores.values()]
        lines.append([domain, *shares])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as an aligned Markdown table, the first row its header."""
    widths = []
    for column in zip(*lines, strict=True):
        widths.append(max(map(len, column)))
    drawn = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        drawn.append(f"| {' | '.join(cells)} |")
    rule = "-|-".join("-" * width for width in widths)
    drawn.insert(1, f"| {rule} |")
    return "\n".join(drawn)


def table_cells(table: str) -> list[list[str]]:
    """Return the rows of cells of a table that `markdown` wrote, its header first."""
    header, _, *rows = table.splitlines()
    cells = []
    for line in [header, *rows]:
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells

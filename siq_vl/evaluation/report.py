"""One self-contained page and its tables as Markdown: scores, plots, and what each model said, side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from siq_vl.data.conversations import Dropped
from siq_vl.evaluation.items import Item
from siq_vl.evaluation.predictions import Prediction
from siq_vl.evaluation.summaries import Summary, summarize, table3
from siq_vl.evaluation.tables import accuracy_table, ordinary, table_cells, type_table
from siq_vl.html import image_data_url, render
from siq_vl.plots import inline, length_plot, loss_plot, running_accuracy_plot

SHOWN = 300  # questions in the gallery
_SMALL, _LARGE = 256, 640  # pixels: up to the first a picture is kept as it is, above the second it is scaled down
# Filters of the gallery; what each of them shows is decided in templates/report.js.
FILTERS = {
    "all": "all",
    "lost": "right \u2192 wrong",
    "won": "wrong \u2192 right",
    "hallucinated": "hallucinated",
    "longest": "longest",
}
PredictionsByModel = dict[str, Prediction]


def write_report(
    path: Path,
    items: Sequence[Item],
    answers: Mapping[str, Sequence[Prediction]],
    tables: Mapping[str, str] | None = None,
    curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    *,
    notes: Sequence[str] = (),
    shown: int = SHOWN,
) -> None:
    """Write the page, and beside it its tables as Markdown.

    Args:
        path: the HTML file; the Markdown file has its name.
        items: the questions, with their pictures.
        answers: by model, predictions that include those of `items`.
        tables: by heading, further tables as text.
        curves: by stage, (step, training loss) points.
        notes: lines below the scores, such as comparisons and faults.
        shown: questions in the gallery at most; those that a filter finds come first.
    """
    title = "SiQ-VL: " + ", ".join(answers)
    asked = {name: ordinary(predictions) for name, predictions in answers.items()}
    summaries = {name: summarize(predictions) for name, predictions in asked.items()}
    scores = {
        "Scores by domain": accuracy_table(answers),
        "The report's Table 3": table3(summaries),
        "Scores by domain and question type": type_table(answers),
    }
    most_asked = max(len(predictions) for predictions in asked.values())
    intro = (
        "Accuracy in percent with half-widths of 95% Wilson intervals. Table 3, plots and comparisons are about the "
        f"{most_asked} ordinary questions."
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(
        _as_markdown(title, intro, {**scores, **(tables or {})}, notes), encoding="utf-8"
    )

    # What every model said to a question, by the question's id.
    by_id: dict[str, PredictionsByModel] = {item.id: {} for item in items}
    for name, predictions in answers.items():
        for prediction in predictions:
            if prediction.id in by_id:
                by_id[prediction.id][name] = prediction
    picked = select(items, [by_id[item.id] for item in items], shown)
    selection = "Every question."
    if len(picked) < len(items):
        selection = (
            f"{len(picked)} of {len(items)} questions, chosen so that every filter finds some: count in the tables, not "
            "here."
        )
    further = []
    for heading, text in (tables or {}).items():
        # What is no table stands as it is; below a table there may be lines of text.
        table, _, note = text.partition("\n\n")
        if table.startswith("|"):
            further.append((heading, table_cells(table), note))
        else:
            further.append((heading, [], text))
    page = render(
        "report.html.jinja",
        title=title,
        intro=intro,
        scores=[(heading, table_cells(text)) for heading, text in scores.items()],
        notes=notes,
        score_plots=_score_plots(asked, summaries),
        tables=further,
        loss_plots=[(Markup(inline(loss_plot(points))), name) for name, points in (curves or {}).items()],
        selection=selection,
        filters=FILTERS,
        models=list(answers),
        domains=["", *dict.fromkeys(item.domain for item in picked)],
        cards=[_card(item, by_id[item.id]) for item in picked],
    )
    path.write_text(page, encoding="utf-8")


def _as_markdown(title: str, intro: str, tables: Mapping[str, str], notes: Sequence[str]) -> str:
    """Return the page's tables and notes as Markdown."""
    parts = [f"# {title}", intro]
    for heading, table in tables.items():
        parts.append(f"## {heading}\n\n{table}")
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _score_plots(
    asked: Mapping[str, Sequence[Prediction]], summaries: Mapping[str, Summary]
) -> list[tuple[Markup, str]]:
    """Return running accuracies and lengths of rationales, each with its caption."""
    curves = {name: summary.curve for name, summary in summaries.items()}
    lengths = {}
    for name, predictions in asked.items():
        lengths[name] = [prediction.length for prediction in predictions if prediction.scored]
    return [
        (Markup(inline(running_accuracy_plot(curves))), "Running accuracy by number of questions asked"),
        (Markup(inline(length_plot(lengths))), "Share of outputs by length of the rationale"),
    ]


def select(items: Sequence[Item], said: Sequence[PredictionsByModel], count: int) -> list[Item]:
    """Return `count` items in their order, as many for each filter of the gallery as can be had.

    Args:
        items: the questions.
        said: what each model said to them, in the same order.
        count: how many are wanted.
    """
    if len(items) <= count:
        return list(items)
    last_model = list(said[0])[-1]
    places = range(len(items))
    lost, won, hallucinated = [], [], []
    for place in places:
        if _went(said[place], True, False):
            lost.append(place)
        if _went(said[place], False, True):
            won.append(place)
        if any(prediction.hallucinated for prediction in said[place].values()):
            hallucinated.append(place)
    longest = sorted(places, key=lambda place: -said[place][last_model].length)
    # What each filter of the page would find, in the order in which it would show it.
    found_by_filter = [lost, won, hallucinated, list(places), longest]
    # One from each filter in turn, until there are enough; a question that two of them find is shown once.
    queues = [iter(found) for found in found_by_filter]
    chosen: set[int] = set()
    while len(chosen) < count:
        for queue in queues:
            fresh = next((place for place in queue if place not in chosen), None)
            if fresh is not None and len(chosen) < count:
                chosen.add(fresh)
    return [items[place] for place in sorted(chosen)]


def _went(said: PredictionsByModel, before: bool, after: bool) -> bool:
    """Return whether some model was `before` and a later one `after`: right or wrong."""
    outcomes = [prediction.correct for prediction in said.values() if prediction.scored]
    return before in outcomes and after in outcomes[outcomes.index(before) :]


def _card(item: Item, predictions: PredictionsByModel) -> dict:
    """Return what the template shows of a question: its pictures, and what each model said."""
    # What the page's filters read: right (or null where nothing is scored), hallucinated, length of the rationale.
    marks = {}
    for name, prediction in predictions.items():
        correct = prediction.correct if prediction.scored else None
        marks[name] = [correct, prediction.hallucinated, prediction.length]
    pictures, missing = [], ""
    try:
        pictures = [_picture(image) for image in item.open_images()]
    except Dropped as dropped:
        missing = str(dropped)
    return {
        "item": item,
        "marks": json.dumps(marks),
        "pictures": pictures,
        "missing": missing,
        "predictions": predictions,
    }


def _picture(image: Image.Image) -> dict[str, str]:
    """Return a picture's `data:` address, and whether it is small enough to be shown with sharp pixels."""
    if max(image.size) <= _SMALL:
        return {"size": "small", "address": image_data_url(image, "PNG", optimize=True)}
    scaled = image.convert("RGB")
    scaled.thumbnail((_LARGE, _LARGE))
    return {"size": "large", "address": image_data_url(scaled, "JPEG", quality=82)}

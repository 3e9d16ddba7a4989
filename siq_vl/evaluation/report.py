"""One self-contained page and its tables as Markdown: scores, plots, and what each model said, side by side."""

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from siq_vl.data.conversations import Dropped
from siq_vl.evaluation.plots import length_plot, loss_plot, running_accuracy_plot
from siq_vl.evaluation.predictions import Prediction
from siq_vl.evaluation.questions import Item
from siq_vl.evaluation.summary import summarize, table3
from siq_vl.evaluation.tables import accuracy_table, ordinary, type_table

SHOWN = 300  # questions in the gallery
_SMALL, _LARGE = 256, 640  # pixels: up to the first a picture is kept as it is, above the second it is scaled down
_PAGE = Path(__file__).with_name("page")
_FILTERS = {
    "all": "all",
    "lost": "right \u2192 wrong",
    "won": "wrong \u2192 right",
    "hallucinated": "hallucinated",
    "longest": "longest",
}
Said = Mapping[str, Prediction]


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
    by_id = {name: {prediction.id: prediction for prediction in made} for name, made in answers.items()}
    asked = {name: ordinary(made) for name, made in answers.items()}
    summaries = {name: summarize(made) for name, made in asked.items()}
    scores = {
        "Scores by domain": accuracy_table(answers),
        "The report's Table 3": table3(summaries),
        "Scores by domain and question type": type_table(answers),
    }
    intro = (
        "Accuracy in percent with half-widths of 95% Wilson intervals. Table 3, plots and comparisons are about the "
        f"{max(map(len, asked.values()))} ordinary questions."
    )
    picked = select(items, [{name: found[item.id] for name, found in by_id.items()} for item in items], shown)
    cards = "".join(_card(item, {name: found[item.id] for name, found in by_id.items()}) for item in picked)
    plots = [running_accuracy_plot({name: summary.curve for name, summary in summaries.items()})]
    plots.append(length_plot({name: [p.length for p in made if p.scored] for name, made in asked.items()}))
    losses = [(loss_plot(points), name) for name, points in (curves or {}).items()]
    title = "SiQ-VL: " + ", ".join(answers)
    first, *rest = scores.items()
    chosen = (
        "Every question."
        if len(picked) == len(items)
        else (
            f"{len(picked)} of {len(items)} questions, chosen so that every filter finds some: count in the tables, not here."
        )
    )
    sections = [
        f"<h1>{html.escape(title)}</h1><p>{intro}</p>",
        _section(*first),
        "".join(f"<p>{html.escape(note)}</p>" for note in notes),
        *(_section(*pair) for pair in rest[:1]),
        f"<h2>Running accuracy and length of rationales</h2>{_figures([(plot, '') for plot in plots])}",
        *(f"<details><summary>{name}</summary>{_scrolled(table)}</details>" for name, table in rest[1:]),
        *(f"<h2>{html.escape(name)}</h2><pre>{html.escape(table)}</pre>" for name, table in (tables or {}).items()),
        f"<h2>Training loss</h2>{_figures(losses)}" if losses else "",
        f"<h2>What they said</h2><p>{chosen}</p>{_controls(list(answers), picked)}<div id=gallery>{cards}</div>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{(_PAGE / 'style.css').read_text(encoding='utf-8')}</style>"
        + "".join(sections)
        + f"<script>{(_PAGE / 'script.js').read_text(encoding='utf-8')}</script></html>",
        encoding="utf-8",
    )
    parts = [f"# {title}", intro, *(f"## {name}\n\n{table}" for name, table in {**scores, **(tables or {})}.items())]
    lines = "\n".join(f"- {note}" for note in notes)
    path.with_suffix(".md").write_text("\n\n".join([*parts, *([lines] if lines else [])]) + "\n", encoding="utf-8")


def select(items: Sequence[Item], said: Sequence[Said], count: int) -> list[Item]:
    """Return `count` items in their order, as many for each filter of the gallery as can be had."""
    if len(items) <= count:
        return list(items)
    last = list(said[0])[-1]
    by_length = sorted(range(len(items)), key=lambda place: -said[place][last].length)
    tests: list[Callable[[Said], bool]] = [
        lambda found: _went(found, True, False),
        lambda found: _went(found, False, True),
        lambda found: any(prediction.hallucinated for prediction in found.values()),
        lambda found: True,
    ]
    queues = [iter([place for place in range(len(items)) if test(said[place])]) for test in tests]
    queues.append(iter(by_length))
    chosen: set[int] = set()
    while len(chosen) < count:
        for queue in queues:
            fresh = next((place for place in queue if place not in chosen), None)
            if fresh is not None and len(chosen) < count:
                chosen.add(fresh)
    return [items[place] for place in sorted(chosen)]


def _went(said: Said, before: bool, after: bool) -> bool:
    """Return whether some model was `before` and a later one `after`: right or wrong."""
    outcomes = [prediction.correct for prediction in said.values() if prediction.scored]
    return before in outcomes and after in outcomes[outcomes.index(before) :]


def _section(title: str, table: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{_scrolled(table)}"


def _scrolled(table: str) -> str:
    return f"<div class=scroll>{_html_table(table)}</div>"


def _html_table(table: str) -> str:
    """Return an aligned Markdown table as HTML; a row whose name begins with a dash is part of the one above."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    drawn = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"
    for name, *cells in rows:
        part = " class=part" if name.startswith("- ") else ""
        inner = "".join(f"<td>{html.escape(cell)}</td>" for cell in (name.removeprefix("- "), *cells))
        drawn += f"<tr{part}>{inner}</tr>"
    return f"<table>{drawn}</table>"


def _figures(plots: Sequence[tuple[str, str]]) -> str:
    drawn = "".join(
        f"<figure class=plot>{plot}<figcaption>{html.escape(name)}</figcaption></figure>" for plot, name in plots
    )
    return f"<div class=plots>{drawn}</div>"


def _controls(models: Sequence[str], items: Sequence[Item]) -> str:
    def options(names: Sequence[str], chosen: str) -> str:
        return "".join(
            f"<option value='{html.escape(name, quote=True)}'{' selected' if name == chosen else ''}>"
            f"{html.escape(name or 'every domain')}</option>"
            for name in names
        )

    names = list(models)
    buttons = "".join(
        f"<button type=button data-filter={key} aria-pressed=false>{label}</button>" for key, label in _FILTERS.items()
    )
    domains = ["", *dict.fromkeys(item.domain for item in items)]
    return (
        f"<div class=filters>{buttons}"
        f"<label>from <select id=before>{options(names, names[-2] if len(names) > 1 else names[0])}</select></label>"
        f"<label>to <select id=after>{options(names, names[-1])}</select></label>"
        f"<label>in <select id=domain>{options(domains, '')}</select></label><output id=count></output></div>"
    )


def _card(item: Item, said: Said) -> str:
    steps = ", multi-step" if item.multi_step else ""
    marks = {name: [p.correct if p.scored else None, p.hallucinated, p.length] for name, p in said.items()}
    columns = "".join(_said(name, prediction) for name, prediction in said.items())
    return (
        f"<article data-domain='{html.escape(item.domain, quote=True)}' data-marks='{html.escape(json.dumps(marks), quote=True)}'>"
        f"<div class=question>{html.escape(item.question)}<small>{html.escape(f'{item.domain}, {item.type}{steps}')}; truth: "
        f"{html.escape(item.answer) or '(none)'}</small></div><div>{_pictures(item)}</div>{columns}</article>"
    )


def _pictures(item: Item) -> str:
    try:
        pictures = item.open_images()
    except Dropped as dropped:
        return f"<div class=missing>{html.escape(str(dropped))}</div>"
    return "".join(
        f"<img class={'small' if max(picture.size) <= _SMALL else 'large'} "
        f"alt='{html.escape(item.caption or item.id, quote=True)}' src='{_data_url(picture)}'>"
        for picture in pictures
    )


def _said(name: str, prediction: Prediction) -> str:
    rationale = f"<div class=rationale>{html.escape(prediction.rationale)}</div>" if prediction.rationale else ""
    verdict = "right" if prediction.correct else "wrong"
    answer = html.escape(prediction.answer) or "(no answer)"
    notes = [f"{prediction.contradicted} of {prediction.stated} stated facts contradicted"] * prediction.hallucinated
    notes += [f"{prediction.fault}: {prediction.detail}"] if prediction.fault else []
    return (
        f"<div class=said><h3>{html.escape(name)}</h3>{rationale}<span class='answer {verdict}'>{answer}</span>"
        + "".join(f"<div class=note>{html.escape(note)}</div>" for note in notes)
        + "</div>"
    )


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    if max(image.size) <= _SMALL:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.convert("RGB")
        image.thumbnail((_LARGE, _LARGE))
        image.save(buffer, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()

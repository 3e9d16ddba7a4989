"""One self-contained page about a store: yield, rules, lengths, agreement, and traces with their pictures."""

from pathlib import Path

import pyarrow.parquet as pq
from markupsafe import Markup
from PIL import Image

from siq_vl.distill.questions import EncodedPicture
from siq_vl.distill.traces import evaluated
from siq_vl.distill.yields import LENGTH_BINS, store_yield, tables
from siq_vl.evaluation.tables import table_cells
from siq_vl.files import write_text
from siq_vl.html import image_data_url, render
from siq_vl.plots import histogram_plot, inline

_SIDE = 192  # pixels
_LONGEST = 3000  # characters of a rationale
_SHOWN = (
    "images", "question", "golds", "teacher", "output", "rationale", "answer", "verdict", "rejected_by", "error", "injected", "hinted",
)  # fmt: skip


def write_page(folder: Path, path: Path | None = None, *, shown: int = 24) -> Path:
    """Write the page of a store and return its path, `report.html` in the store by default.

    Args:
        folder: the store.
        path: the HTML file.
        shown: most kept and most rejected traces in the gallery, spread over teachers and rules.
    """
    summary = store_yield(folder)
    path = path or folder / "report.html"
    shown_tables = []
    for heading, text in tables(summary).items():
        # Below a table there may be a line of text.
        table, _, note = text.partition("\n\n")
        shown_tables.append((heading, table_cells(table), note))
    histograms = []
    for name, teacher in sorted(summary.teachers.items()):
        counts = {bound: teacher.lengths[bound] for bound in LENGTH_BINS}
        histograms.append((Markup(inline(histogram_plot(counts))), name))
    galleries = []
    for heading, verdict in (("Kept", "kept"), ("Rejected", "rejected")):
        galleries.append((heading, [_card(row) for row in gallery(folder, verdict, shown)]))
    page = render(
        "traces.html.jinja",
        title="Traces",
        summary=summary,
        evaluated=evaluated(folder),
        tables=shown_tables,
        histograms=histograms,
        galleries=galleries,
    )
    write_text(path, page)
    return path


def gallery(folder: Path, verdict: str, count: int) -> list[dict]:
    """Return up to `count` traces with a verdict, round by round over (teacher, first rule), in the store's order.

    Only these traces' pictures are read: the first pass looks at names alone.
    """
    groups: dict[tuple[str, str], list[tuple[Path, int]]] = {}
    for path in sorted((folder / "data").glob("traces-*.parquet")):
        light = pq.read_table(path, columns=["teacher", "verdict", "rejected_by"]).to_pylist()
        for row_number, row in enumerate(light):
            if row["verdict"] != verdict:
                continue
            first_rule = (row["rejected_by"] or [""])[0]
            places = groups.setdefault((row["teacher"], first_rule), [])
            if len(places) < count:
                places.append((path, row_number))
    chosen: list[tuple[Path, int]] = []
    for turn in range(count):
        for _, places in sorted(groups.items()):
            if turn < len(places):
                chosen.append(places[turn])
    chosen = chosen[:count]
    found: dict[tuple[Path, int], dict] = {}
    for path in dict.fromkeys(path for path, _ in chosen):
        wanted = sorted(row_number for other, row_number in chosen if other == path)
        rows = pq.read_table(path, columns=list(_SHOWN)).take(wanted).to_pylist()
        for row_number, row in zip(wanted, rows, strict=True):
            found[path, row_number] = row
    return [found[place] for place in chosen]


def _card(row: dict) -> dict:
    """Return what the template shows of a trace."""
    notes = [row["teacher"]]
    if row["hinted"]:
        notes.append("hinted")
    notes.append(f"truth: {' or '.join(row['golds']) or 'unknown'}")
    if row["injected"]:
        notes.append(f"the oracle put in: {row['injected']}")
    said = row["rationale"] or row["output"] or row["error"]
    if len(said) > _LONGEST:
        said = said[:_LONGEST] + " \u2026"
    pictures = [_picture(image["bytes"]) for image in row["images"] or () if image["bytes"]]
    return {
        "question": row["question"],
        "notes": notes,
        "pictures": pictures,
        "said": said,
        "verdict": row["verdict"],
        "answer": row["answer"],
        "rules": row["rejected_by"],
    }


def _picture(data: bytes) -> dict[str, str]:
    """Return a picture's size and `data:` address, no larger than it is shown; no address where it is unreadable."""
    try:
        image = EncodedPicture(data).image
    except ValueError:
        return {"size": "", "address": ""}
    size = "small" if max(image.size) < _SIDE else "large"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return {"size": size, "address": image_data_url(image, "PNG", optimize=True)}

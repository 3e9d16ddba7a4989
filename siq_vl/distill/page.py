"""One self-contained page about a store: yield, rules, lengths, agreement, and traces with their pictures."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from siq_vl.distill.questions import Picture
from siq_vl.distill.summary import LENGTH_BINS, Summary, summarize, tables
from siq_vl.distill.traces import write_text

_SIDE = 192
_STYLE = """
:root { --ink: #1c2430; --soft: #5d6b7c; --line: #dfe4ea; --right: #1a7f4b; --wrong: #b3372f; --ground: #f6f7f9; }
body { margin: 0 auto; max-width: 1180px; padding: 32px 24px 64px; color: var(--ink); background: var(--ground);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 12px; } p { color: var(--soft); max-width: 75ch; }
pre { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, monospace; }
article { display: grid; grid-template-columns: 200px 1fr; gap: 16px; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; padding: 16px; margin-bottom: 14px; }
article img { max-width: 192px; max-height: 192px; border: 1px solid var(--line); border-radius: 6px; image-rendering: auto; }
article img.small { width: 192px; image-rendering: pixelated; }
.question { grid-column: 1 / -1; font-weight: 600; } small { color: var(--soft); font-weight: 400; margin-left: 8px; }
.rationale { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; white-space: pre-wrap; border-left: 3px solid var(--line);
  padding-left: 8px; max-height: 240px; overflow-y: auto; }
.tag { display: inline-block; margin: 6px 6px 0 0; padding: 2px 10px; border-radius: 999px; color: #fff; overflow-wrap: anywhere; }
.kept { background: var(--right); } .rejected { background: var(--wrong); }
figure { margin: 0 14px 14px 0; display: inline-block; } figcaption { font-size: 13px; color: var(--soft); }
"""
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
    summary = summarize(folder)
    path = path or folder / "report.html"
    sections = [
        f"<h2>{html.escape(title)}</h2><pre>{html.escape(table)}</pre>" for title, table in tables(summary).items()
    ]
    cards = {verdict: [_card(row) for row in gallery(folder, verdict, shown)] for verdict in ("kept", "rejected")}
    write_text(
        path,
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Traces</title><style>{_STYLE}</style><h1>Traces</h1>"
        f"<p>{summary.made} traces, {summary.kept} kept. Reasoning is shown in grey; the answer in green where the trace is "
        "kept and in red where a rule rejects it, with the rules' names.</p>"
        + "".join(sections)
        + f"<h2>Length of rationales, in words and marks</h2>{_histograms(summary)}"
        + "".join(f"<h2>{title}</h2>{''.join(cards[verdict]) or '<p>None.</p>'}" for verdict, title in (("kept", "Kept"), ("rejected", "Rejected")))
        + "</html>",
    )  # fmt: skip
    return path


def gallery(folder: Path, verdict: str, count: int) -> list[dict]:
    """Return up to `count` traces with a verdict, round by round over (teacher, first rule), in the store's order.

    Only these traces' pictures are read: the first pass looks at names alone.
    """
    groups: dict[tuple[str, str], list[tuple[Path, int]]] = {}
    for path in sorted((folder / "data").glob("traces-*.parquet")):
        light = pq.read_table(path, columns=["teacher", "verdict", "rejected_by"]).to_pylist()
        for place, row in enumerate(light):
            if row["verdict"] == verdict:
                places = groups.setdefault((row["teacher"], (row["rejected_by"] or [""])[0]), [])
                if len(places) < count:
                    places.append((path, place))
    chosen = [places[turn] for turn in range(count) for _, places in sorted(groups.items()) if turn < len(places)][
        :count
    ]
    found: dict[tuple[Path, int], dict] = {}
    for path in dict.fromkeys(path for path, _ in chosen):
        wanted = sorted(place for other, place in chosen if other == path)
        part = pq.read_table(path, columns=list(_SHOWN)).take(wanted).to_pylist()
        found.update({(path, place): row for place, row in zip(wanted, part, strict=True)})
    return [found[place] for place in chosen]


def _card(row: dict) -> str:
    pictures = "".join(_picture(image["bytes"]) for image in row["images"] or () if image["bytes"])
    notes = [row["teacher"], *(["hinted"] if row["hinted"] else []), f"truth: {' or '.join(row['golds']) or 'unknown'}"]
    if row["injected"]:
        notes.append(f"the oracle put in: {row['injected']}")
    said = row["rationale"] or row["output"] or row["error"]
    said = said if len(said) <= 3000 else said[:3000] + " …"
    rules = "".join(f"<span class='tag rejected'>{html.escape(rule)}</span>" for rule in row["rejected_by"])
    return (
        f"<article><div class=question>{html.escape(row['question'])}<small>{html.escape('; '.join(notes))}</small></div>"
        f"<div>{pictures}</div><div><div class=rationale>{html.escape(said)}</div>"
        f"<span class='tag {row['verdict']}'>{html.escape(row['answer']) or '(no answer)'}</span>{rules}</div></article>"
    )


def _picture(data: bytes) -> str:
    """Return a picture as an `<img>`, no larger than it is shown."""
    try:
        image = Picture(data).image
    except ValueError:
        return "<p>(unreadable picture)</p>"
    small = "small" if max(image.size) < _SIDE else ""
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"<img class='{small}' alt='' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _histograms(summary: Summary) -> str:
    return "".join(
        f"<figure>{_bars([teacher.lengths[bound] for bound in LENGTH_BINS], LENGTH_BINS)}"
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, teacher in sorted(summary.teachers.items())
    )


def _bars(counts: Sequence[int], bounds: Iterable[int], width: int = 340, height: int = 150) -> str:
    """Return an SVG of a histogram: a bar a bin with its count above and its lower bound below."""
    step, top = (width - 16) / len(counts), max(max(counts), 1)
    text = "font-size='10' fill='#5d6b7c' text-anchor='middle'"
    drawn = []
    for place, (count, bound) in enumerate(zip(counts, bounds, strict=True)):
        tall, left = count / top * (height - 44), 8 + place * step
        drawn.append(
            f"<rect x={left + 2:.1f} y={height - 20 - tall:.1f} width={step - 4:.1f} height={tall:.1f} fill='#2f6fd0' />"
            f"<text x={left + step / 2:.1f} y={height - 6} {text}>{bound}</text>"
            + (f"<text x={left + step / 2:.1f} y={height - 24 - tall:.1f} {text}>{count}</text>" if count else "")
        )
    style = "background:#fff;border:1px solid #dfe4ea;border-radius:8px"
    return f"<svg width={width} height={height} style='{style}'>{''.join(drawn)}</svg>"

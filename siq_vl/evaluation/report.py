"""One self-contained page: held-out pictures, and what each stage said about them, side by side."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from siq_vl.evaluation.figures import Item
from siq_vl.evaluation.predictions import Prediction

_SCALE = 3  # drawn pictures are small: enlarge them, pixels kept sharp
_STYLE = """
:root { --ink: #1c2430; --soft: #5d6b7c; --line: #dfe4ea; --right: #1a7f4b; --wrong: #b3372f; --ground: #f6f7f9; }
body { margin: 0 auto; max-width: 1180px; padding: 32px 24px 64px; color: var(--ink); background: var(--ground);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 12px; } p { color: var(--soft); max-width: 75ch; }
pre { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, monospace; }
article { display: grid; grid-template-columns: 200px repeat(auto-fit, minmax(220px, 1fr)); gap: 16px; background: #fff;
  border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin-bottom: 14px; }
article img { width: 192px; height: 192px; image-rendering: pixelated; border: 1px solid var(--line); border-radius: 6px; }
.question { grid-column: 1 / -1; font-weight: 600; } .question small { color: var(--soft); font-weight: 400; margin-left: 8px; }
.said h3 { font-size: 13px; margin: 0 0 6px; color: var(--soft); font-weight: 600; }
.rationale { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: 8px; }
.answer { display: inline-block; margin-top: 6px; padding: 2px 10px; border-radius: 999px; color: #fff; overflow-wrap: anywhere; }
.right { background: var(--right); } .wrong { background: var(--wrong); }
figure { margin: 0 14px 0 0; display: inline-block; } figcaption { font-size: 13px; color: var(--soft); }
"""


def write_report(
    path: Path,
    items: Sequence[Item],
    answers: Mapping[str, Sequence[Prediction]],
    tables: Mapping[str, str],
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        items: the questions to show, with their pictures.
        answers: by model, predictions that include those of `items`.
        tables: by heading, tables as text.
        curves: by stage, (step, training loss) points.
    """
    by_id = {name: {prediction.id: prediction for prediction in made} for name, made in answers.items()}
    cards = [_card(item, {name: found[item.id] for name, found in by_id.items()}) for item in items]
    sections = [f"<h2>{html.escape(title)}</h2><pre>{html.escape(table)}</pre>" for title, table in tables.items()]
    drawn = "".join(
        f"<figure>{_curve(points)}<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, points in curves.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>SiQ-VL, stage by stage</title><style>{_STYLE}</style>"
        "<h1>SiQ-VL, stage by stage</h1>"
        "<p>Pictures that no stage was trained on. Reasoning is shown in grey, the answer in green where it is right and "
        "in red where it is wrong.</p>" + "".join(cards) + "".join(sections) + f"<h2>Training loss</h2>{drawn}</html>",
        encoding="utf-8",
    )


def pick(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` ordinary items, spread over domains and over single- and multi-step questions.

    The choice looks at the questions only, never at how a model answered.
    """
    ordinary = [item for item in items if item.group == "held out"]
    kinds: dict[tuple[str, bool], list[Item]] = {}
    for item in ordinary:
        kinds.setdefault((item.domain, item.multi_step), []).append(item)
    rounds = zip(*(kinds[key] for key in sorted(kinds)), strict=False)
    return [item for around in rounds for item in around][:count]


def _card(item: Item, said: Mapping[str, Prediction]) -> str:
    steps = "multi-step" if item.multi_step else "single-step"
    columns = "".join(_said(name, prediction) for name, prediction in said.items())
    return (
        f"<article><div class=question>{html.escape(item.question)}<small>{item.domain}, {steps}; truth: "
        f"{html.escape(item.answer)}</small></div><img alt='{html.escape(item.caption, quote=True)}' src='{_data_url(item.image)}'>"
        f"{columns}</article>"
    )


def _said(name: str, prediction: Prediction) -> str:
    rationale = f"<div class=rationale>{html.escape(prediction.rationale)}</div>" if prediction.rationale else ""
    verdict = "right" if prediction.correct else "wrong"
    answer = html.escape(prediction.answer) or "(no answer)"
    return (
        f"<div class=said><h3>{html.escape(name)}</h3>{rationale}<span class='answer {verdict}'>{answer}</span></div>"
    )


def _data_url(image: Image.Image) -> str:
    large = image.resize((image.width * _SCALE, image.height * _SCALE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    large.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curve(points: Sequence[tuple[int, float]], width: int = 260, height: int = 130) -> str:
    """Return an SVG of a loss curve with its first and last value written at the ends."""
    last_step, top = max(step for step, _ in points), max(loss for _, loss in points)
    line = " ".join(
        f"{8 + step / last_step * (width - 16):.1f},{height - 18 - loss / top * (height - 36):.1f}"
        for step, loss in points
    )
    (_, first), (_, last) = points[0], points[-1]
    text = "font-size='11' fill='#5d6b7c'"
    return (
        f"<svg width={width} height={height} style='background:#fff;border:1px solid #dfe4ea;border-radius:8px'>"
        f"<polyline points='{line}' fill=none stroke='#2f6fd0' stroke-width=1.5 />"
        f"<text x=8 y=14 {text}>{first:.2f}</text>"
        f"<text x={width - 8} y={height - 4} text-anchor=end {text}>{last:.3f} at step {last_step}</text></svg>"
    )

"""Answer cards as HTML. All that comes from models, users and files is escaped here, and only here."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from siq_vl.page.attention import Gaze
from siq_vl.page.reading import Part, Pieces, take_apart
from siq_vl.page.streaming import Output

_SHOWN = 640  # pixels: longer pictures are scaled down for the card
_PIXEL_ART = 256  # pixels: shorter pictures are shown with sharp pixels
_COLD, _HOT = np.array([15, 23, 42, 185]), np.array([255, 130, 10, 110])  # red, green, blue, opacity


def empty_card(name: str) -> str:
    """Return the card of a model that has not been asked yet."""
    hint = "Reasoning and answer appear here, and where in the picture the model looked."
    return _article(name, "idle", "", f"<p class='siq-hint'>{hint}</p>")


def card(name: str, picture: str, ratio: float, question: str, output: Output) -> str:
    """Return the card of an output, finished or still growing.

    Args:
        name: the model's.
        picture: what `picture_address` made of the picture.
        ratio: the picture's width over its height.
        question: what was asked.
        output: what the model has said so far.
    """
    pieces = take_apart(output.text)
    gaze = output.gaze if output.finished else None
    state = "done" if output.finished else "answering" if pieces.answer else "thinking"
    group = f"look-{escape(name, quote=True)}"
    asked = f"<p class='siq-question'>{escape(question.strip())}</p>"
    seen = f"<figure class='siq-seen'><img src='{picture}' alt='the picture asked about'></figure>"
    body = f"{_answer(pieces.answer, output.finished, gaze, group)}{_steps(pieces, gaze, group)}"
    note = (
        "<p class='siq-note'>Point at words, or tap them, to see where the model looked while it wrote them.</p>"
        if gaze
        else ""
    )
    return _article(
        name,
        state,
        asked,
        f"<div class='siq-body' style='--ratio: {ratio:.4f}'>{seen}<div class='siq-said'>{body}{note}</div></div>",
    )


def picture_address(image: Image.Image) -> str:
    """Return a picture as a `data:` address, scaled down where it is large."""
    shown = image.copy()
    shown.thumbnail((_SHOWN, _SHOWN))
    if max(image.size) < _PIXEL_ART:  # sharp edges at any size
        times = -(-_PIXEL_ART // max(image.size))
        shown = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return _address(shown)


def heat_address(heat: np.ndarray) -> str:
    """Return a heat map, of shape `(rows, columns)`, as the `data:` address of a veil: dark where cold, orange where hot."""
    share = (heat / max(heat.max(), 1e-12))[..., None]
    return _address(Image.fromarray((_COLD + share * (_HOT - _COLD)).round().astype(np.uint8)))


def _address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _article(name: str, state: str, asked: str, body: str) -> str:
    return (
        f"<article class='siq-card' data-state='{state}' data-model='{escape(name, quote=True)}'>"
        f"<header><span class='siq-name'>{escape(name)}</span><span class='siq-state' role='status'></span></header>"
        f"{asked}{body}</article>"
    )


def _answer(answer: Part | None, finished: bool, gaze: Gaze | None, group: str) -> str:
    said = _look(answer, gaze, group, chosen=True) if answer else "" if finished else "<span class='siq-wait'></span>"
    missing = "<span class='siq-missing'>No answer within the bound on tokens.</span>"
    return f"<div class='siq-answer'><h3>Answer</h3><p>{said or missing}</p></div>"


def _steps(pieces: Pieces, gaze: Gaze | None, group: str) -> str:
    if not pieces.steps:
        return ""
    steps = "".join(f"<li>{' '.join(_look(part, gaze, group) for part in step)}</li>" for step in pieces.steps)
    return f"<div class='siq-reasoning'><h3>Reasoning</h3><ol>{steps}</ol></div>"


def _look(part: Part, gaze: Gaze | None, group: str, chosen: bool = False) -> str:
    """Return words which, pointed at or chosen, lay their heat map over the picture."""
    words = escape(part.text)
    if gaze is None:
        return f"<span>{words}</span>"
    heat, share = gaze.of(part.start, part.end)
    checked = " checked" if chosen else ""
    return (
        f"<label class='siq-look'><input type='radio' name='{group}'{checked}><span>{words}</span>"
        f"<span class='siq-heat'><img src='{heat_address(heat)}' alt=''>"
        f"<small>{share:.0%} of the attention was on the picture</small></span></label>"
    )

"""What a model's card on the page shows: its answer, its reasoning, and where it looked. The HTML is `card.html.jinja`."""

import numpy as np
from PIL import Image

from siq_vl.html import image_data_url, render
from siq_vl.page.attention import AttentionMap
from siq_vl.page.parts import Part, take_apart
from siq_vl.page.streaming import Output

_SHOWN = 640  # pixels: longer pictures are scaled down for the card
_PIXEL_ART = 256  # pixels: shorter pictures are shown with sharp pixels
_COLD, _HOT = np.array([15, 23, 42, 185]), np.array([255, 130, 10, 110])  # red, green, blue, opacity


def empty_card(name: str) -> str:
    """Return the card of a model that has not been asked yet."""
    return render("card.html.jinja", name=name, state="idle")


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
    # Where it looked is computed at the end: a growing answer has plain words.
    attention = output.attention if output.finished else None
    if output.finished:
        state = "done"
    elif pieces.answer:
        state = "answering"
    else:
        state = "thinking"
    steps = []
    for step in pieces.steps:
        steps.append([_words(part, attention) for part in step])
    return render(
        "card.html.jinja",
        name=name,
        state=state,
        question=question.strip(),
        picture=picture,
        ratio=f"{ratio:.4f}",
        answer=_words(pieces.answer, attention) if pieces.answer else None,
        steps=steps,
        can_look=attention is not None,
    )


def picture_address(image: Image.Image) -> str:
    """Return a picture as a `data:` address, scaled down where it is large."""
    if max(image.size) < _PIXEL_ART:
        # Repeated pixels keep their edges sharp, however the browser scales the picture.
        times = -(-_PIXEL_ART // max(image.size))
        return image_data_url(image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST))
    shown = image.copy()
    shown.thumbnail((_SHOWN, _SHOWN))
    return image_data_url(shown)


def heat_address(heat: np.ndarray) -> str:
    """Return a heat map, of shape `(rows, columns)`, as the `data:` address of a veil: dark where cold, orange where hot."""
    share = (heat / max(heat.max(), 1e-12))[..., None]
    veil = _COLD + share * (_HOT - _COLD)  # (rows, columns, 4)
    return image_data_url(Image.fromarray(veil.round().astype(np.uint8)))


def _words(part: Part, attention: AttentionMap | None) -> dict:
    """Return what the template shows of a part of the output; `heat` is None where it is not known."""
    if attention is None:
        return {"text": part.text, "heat": None, "share": ""}
    heat, share = attention.of(part.start, part.end)
    return {"text": part.text, "heat": heat_address(heat), "share": f"{share:.0%}"}

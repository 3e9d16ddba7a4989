"""Drawn pictures changed a little, each answer still the same, to see on what of a picture a model depends."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from siq_vl.evaluation.items import Item
from siq_vl.evaluation.predictions import Prediction
from siq_vl.evaluation.tables import accuracy_cell, markdown

CLEAN = "as drawn"
Shift = Callable[[Image.Image, Random], Image.Image]


def on_canvas(image: Image.Image, size: tuple[int, int], corner: tuple[int, int]) -> Image.Image:
    """Return a picture of another size, in the drawing's background colour, with the drawing in it.

    Args:
        image: a drawn figure, whose top-left pixel has its background colour.
        size: width and height in pixels.
        corner: x and y of the drawing's top-left corner, in pixels; what lies outside is lost.
    """
    canvas = Image.new("RGB", size, image.getpixel((0, 0)))
    canvas.paste(image, corner)
    return canvas


def in_a_quarter(image: Image.Image, quarter: int) -> Image.Image:
    """Return a picture twice as wide and high, with the drawing in one of its quarters, 0 to 3 in reading order."""
    row, column = divmod(quarter, 2)
    return on_canvas(image, (2 * image.width, 2 * image.height), (column * image.width, row * image.height))


def anywhere(image: Image.Image, rng: Random) -> Image.Image:
    """Return a picture twice as wide and high, with the whole drawing at a random place, mostly across the quarters."""
    corner = (rng.randint(0, image.width), rng.randint(0, image.height))
    return on_canvas(image, (2 * image.width, 2 * image.height), corner)


def _moved(pixels: int, image: Image.Image, rng: Random) -> Image.Image:
    """Move the drawing on both axes, on each towards its wider margin, so that as little as possible leaves the picture."""
    blank = Image.new("RGB", image.size, image.getpixel((0, 0)))
    left, top, right, bottom = ImageChops.difference(image, blank).getbbox() or (0, 0, *image.size)
    x = y = pixels
    if left > image.width - right:
        x = -pixels
    if top > image.height - bottom:
        y = -pixels
    return on_canvas(image, image.size, (x, y))


def _border(pixels: int, image: Image.Image, rng: Random) -> Image.Image:
    return on_canvas(image, (image.width + 2 * pixels, image.height + 2 * pixels), (pixels, pixels))


def _twice_as_wide(image: Image.Image, rng: Random) -> Image.Image:
    return on_canvas(image, (2 * image.width, image.height), (image.width // 2, 0))


def _rotated(degrees: float, image: Image.Image, rng: Random) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0)))


def _blurred(radius: float, image: Image.Image, rng: Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _grey(image: Image.Image, rng: Random) -> Image.Image:
    return image.convert("L").convert("RGB")


def _jpeg(quality: int, image: Image.Image, rng: Random) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _noisy(deviation: float, image: Image.Image, rng: Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).round().astype(np.uint8))


SHIFTS: Mapping[str, Shift] = {
    CLEAN: lambda image, rng: image,
    "moved by 1 px": partial(_moved, 1),
    "moved by 3 px": partial(_moved, 3),
    "moved by 6 px": partial(_moved, 6),
    "border of 12 px": partial(_border, 12),
    "canvas twice as wide": _twice_as_wide,
    "rotated by 2 degrees": partial(_rotated, 2),
    "blurred, radius 1 px": partial(_blurred, 1),
    "grey": _grey,
    "JPEG, quality 50": partial(_jpeg, 50),
    "noise, deviation 10 of 255": partial(_noisy, 10),
}


def shifted(items: Sequence[Item], shift: str) -> list[Item]:
    """Return questions with their pictures changed; the same question and shift give the same picture every time.

    Args:
        items: questions about drawn figures.
        shift: a key of `SHIFTS`.
    """
    # The draw belongs to question and shift: neither the order of questions nor another shift changes it.
    changed = []
    for item in items:
        images = [SHIFTS[shift](image, Random(f"{item.id}/{shift}")) for image in item.open_images()]
        changed.append(replace(item, images=tuple(images)))
    return changed


def shift_table(answers: Mapping[str, Mapping[str, Sequence[Prediction]]]) -> str:
    """Return accuracies in percent with half-widths of Wilson's 95% interval: a row a shift, a column a model.

    Args:
        answers: by model and shift, on the same questions.
    """
    shifts = next(iter(answers.values())).keys()
    lines = [["picture", "n", *answers]]
    for shift in shifts:
        predictions = [by_shift[shift] for by_shift in answers.values()]
        lines.append([shift, str(len(predictions[0])), *map(accuracy_cell, predictions)])
    return markdown(lines)

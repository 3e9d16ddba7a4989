"""A canvas that remembers what was drawn on it and where, and the finish that a camera or a printer gives a picture."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Self

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from siq_vl.data.world.fonts import Face, letter

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Letter:
    """A character and its centre, in pixels from the picture's top-left corner; `word` numbers the picture's words."""

    character: str
    x: float
    y: float
    word: int


@dataclass(frozen=True)
class Region:
    """What a part of the picture shows.

    Attributes:
        box: the part, in pixels.
        seen: the words that are read or seen in it: a word as printed, an object and its colour.
        facts: the words of the facts that the part belongs to. A bar's facts hold its label and its value, wherever
            these are printed, and whether or not they are.
    """

    box: Box
    seen: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A picture and the exact place of everything on it."""

    image: Image.Image
    letters: tuple[Letter, ...]
    regions: tuple[Region, ...]

    def moved(self, image: Image.Image, to: Callable[[float, float], tuple[float, float]]) -> Self:
        """Return the same content on another picture; `to` maps a point of the old one to the new one."""
        letters = []
        for each in self.letters:
            x, y = to(each.x, each.y)
            letters.append(Letter(each.character, x, y, each.word))
        regions = []
        for region in self.regions:
            # The centre goes where `to` takes it; the sides stretch, and do not turn.
            left, top, right, bottom = region.box
            x, y = to((left + right) / 2, (top + bottom) / 2)
            wide, _ = to(right, (top + bottom) / 2)
            _, high = to((left + right) / 2, bottom)
            box = (2 * x - wide, 2 * y - high, wide, high)
            regions.append(Region(box, region.seen, region.facts))
        return replace(self, image=image, letters=tuple(letters), regions=tuple(regions))

    def resized(self, width: int, height: int) -> Self:
        """Return the picture at another size, as an image processor makes it."""
        if self.image.size == (width, height):
            return self
        across, down = width / self.image.width, height / self.image.height
        image = self.image.resize((width, height), Image.Resampling.BILINEAR)
        return self.moved(image, lambda x, y: (x * across, y * down))


class Canvas:
    """A blank picture, a pen for it, and a memory of what was written and marked."""

    def __init__(self, width: int, height: int, background: RGB) -> None:
        self.image = Image.new("RGB", (width, height), background)
        self.pen = ImageDraw.Draw(self.image)
        self.background = background
        self._letters: list[Letter] = []
        self._words = 0
        self._regions: list[Region] = []

    def write(
        self,
        x: float,
        y: float,
        text: str,
        face: Face,
        size: int,
        fill: RGB,
        *,
        align: float = 0.0,
        facts: tuple[str, ...] = (),
    ) -> Box:
        """Letter `text` with its middle line at height `y`, and return the box of its ink.

        Args:
            x: left end of the text, or the point that `align` says.
            y: height of the middle of its small letters.
            text: any number of words; each is remembered as one, without punctuation and currency.
            face: see `fonts`.
            size: in pixels.
            fill: colour of the ink.
            align: which part of the text stands at `x`: 0 its left end, 0.5 its middle, 1 its right end.
            facts: words of the facts that the text belongs to.
        """
        lettering = letter(text, face, size)
        left = round(x - align * lettering.mask.width)
        top = round(y - lettering.middle)
        self.image.paste(fill, (left, top), lettering.mask)
        box = (left, y - 0.5 * size, left + lettering.mask.width, y + 0.45 * size)
        start = 0
        for word in text.split(" "):
            centres = lettering.centres[start : start + len(word)]
            start += len(word) + 1
            if not centres:
                continue
            for character, centre in zip(word, centres, strict=True):
                self._letters.append(Letter(character, left + centre, y, self._words))
            self._words += 1
            half = (centres[-1] - centres[0]) / (2 * max(1, len(word) - 1)) if len(word) > 1 else 0.3 * size
            word_box = (left + centres[0] - half, box[1], left + centres[-1] + half, box[3])
            self._regions.append(Region(word_box, seen=(bare(word),), facts=facts))
        return box

    def mark(self, box: Box, *, seen: tuple[str, ...] = (), facts: tuple[str, ...] = ()) -> None:
        """Remember that a part of the picture shows something."""
        self._regions.append(Region(box, seen, facts))

    @property
    def drawn(self) -> Drawn:
        """The picture as it stands."""
        return Drawn(self.image, tuple(self._letters), tuple(self._regions))


def bare(word: str) -> str:
    """Return a printed word or number as facts and answers have it: `$12.00`, `12%` and `12.-` are all `12`."""
    return word.removesuffix(".00").strip(".,:%$-!?")


def pixel(image: Image.Image, x: int, y: int) -> RGB:
    """Return the colour of a pixel of an RGB picture."""
    found = image.getpixel((x, y))
    if not isinstance(found, tuple) or len(found) != 3:
        raise ValueError(f"the picture's mode is {image.mode!r}; convert it to RGB first")
    red, green, blue = found
    return red, green, blue


def finish(drawn: Drawn, rng: Random, background: RGB, *, gray: bool = True) -> Drawn:
    """Return the picture as it comes from a camera, a scanner or the web: now and then turned, blurred, noisy.

    Each defect comes in a part of the pictures, and half of the pictures have none. Without `gray` none loses its
    colours.
    """
    if rng.random() < 0.5:
        return drawn
    if rng.random() < 0.5:
        drawn = turned(drawn, rng.uniform(-3.5, 3.5), background)
    image = drawn.image
    if rng.random() < 0.35:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0) * min(1.4, image.height / 128)))
    if rng.random() < 0.3:
        image = with_contrast(image, rng.uniform(0.6, 1.0), rng.uniform(0.0, 1.0))
    if rng.random() < 0.3:
        image = with_noise(image, rng.randint(3, 20), rng.getrandbits(32))
    if gray and rng.random() < 0.12:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.35:
        image = as_jpeg(image, rng.randint(35, 92))
    return replace(drawn, image=image)


def turned(drawn: Drawn, degrees: float, background: RGB) -> Drawn:
    """Return the picture turned about its centre, anticlockwise, at its size."""
    width, height = drawn.image.size
    image = drawn.image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=background)
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def to(x: float, y: float) -> tuple[float, float]:
        x, y = x - width / 2, y - height / 2
        return width / 2 + cosine * x + sine * y, height / 2 - sine * x + cosine * y

    return drawn.moved(image, to)


def bordered(drawn: Drawn, left: int, top: int, right: int, bottom: int, background: RGB) -> Drawn:
    """Return the picture with margins of these many pixels, negative ones cut."""
    size = (drawn.image.width + left + right, drawn.image.height + top + bottom)
    image = Image.new("RGB", size, background)
    image.paste(drawn.image, (left, top))
    return drawn.moved(image, lambda x, y: (x + left, y + top))


def with_contrast(image: Image.Image, contrast: float, brightness: float) -> Image.Image:
    """Scale the range of values to `contrast` of it, and lift it by `brightness` (0 to 1) of what that leaves."""
    lift = 255 * (1 - contrast) * brightness
    table = [round(value * contrast + lift) for value in range(256)]
    return image.point(table * 3)


def with_noise(image: Image.Image, strength: int, seed: int) -> Image.Image:
    """Add noise of at most `strength` to every channel of every pixel."""
    pixels = np.asarray(image, dtype=np.int16)
    noise = np.random.default_rng(seed).integers(-strength, strength + 1, pixels.shape, dtype=np.int16)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Save as JPEG and read again."""
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=quality)
    return Image.open(stored).convert("RGB")

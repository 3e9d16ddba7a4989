"""What a figure of the world is: content from which every text follows, and a look that changes no fact."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

from PIL import Image

from siq_vl.data.figures.figure import Fact, Question
from siq_vl.data.world.canvas import RGB, Canvas, Drawn, finish
from siq_vl.data.world.fonts import FACES, Face
from siq_vl.data.world.lexicon import COLORS

NATIVE = 128  # pixels; side of what a tower sees of a picture, or of one of its tiles
NOT_SHOWN = "not shown"  # the answer to a question about something that is not in the picture


@dataclass(frozen=True)
class Look:
    """How contents are drawn, whatever they are.

    Attributes:
        faces: of the lettering.
        charts: `"own"` draws charts here, in the styles of training; `"unseen"` in styles kept out of training;
            `"matplotlib"` and `"matplotlib unseen"` have matplotlib draw them, in styles of either sort.
        large: a picture several times `NATIVE` with small print, to be read in tiles.
        finished: now and then blur, noise and the like; see `canvas.finish`.
    """

    faces: tuple[Face, ...] = FACES
    charts: str = "own"
    large: bool = False
    finished: bool = True


@dataclass(frozen=True)
class Figure(ABC):
    """A figure's content, from which the picture and every text follow."""

    domain: ClassVar[str]
    kind: ClassVar[str]
    gray: ClassVar[bool] = True  # whether the facts survive the loss of colour

    @classmethod
    @abstractmethod
    def sample(cls, rng: Random) -> Self:
        """Draw the content at random."""

    @property
    @abstractmethod
    def facts(self) -> tuple[Fact, ...]:
        """The facts in reading order, each a tuple of words: the key right before its value."""

    @property
    def held_out(self) -> bool:
        """Whether the content holds a combination that no training picture shows."""
        return False

    @abstractmethod
    def questions(self, rng: Random) -> list[Question]:
        """Return a question of every type that this content can answer, and one that it cannot."""

    @abstractmethod
    def paint(self, look: Look, rng: Random) -> Drawn:
        """Return the picture and the place of everything on it; `rng` decides sizes, places, colours and layout."""

    def draw(self, rng: Random) -> Image.Image:
        """Return the picture in the look of training."""
        return self.paint(Look(), rng).image

    def finished(self, canvas: Canvas, look: Look, rng: Random) -> Drawn:
        """Return what is on the canvas, as it comes from a camera or a printer where the look has it so."""
        return finish(canvas.drawn, rng, canvas.background, gray=self.gray) if look.finished else canvas.drawn

    @property
    def hard(self) -> bool:
        """Whether the figure belongs to the reported-only hard row."""
        return False

    @property
    def caption(self) -> str:
        """The kind, then every fact in reading order."""
        return f"{self.kind}: " + ", ".join(" ".join(fact) for fact in self.facts)

    @property
    def content(self) -> str:
        """The text whose checksum decides the split: the facts alone, so that neither order nor drawing matters."""
        return f"{self.domain}: " + ", ".join(sorted(" ".join(fact) for fact in self.facts))


def unanswerable(text: str, missing: str) -> Question:
    """Return a question about what the picture does not show; `missing` is what was looked for in vain."""
    return Question("unanswerable", text, NOT_SHOWN, (f"no {missing}",))


@dataclass(frozen=True)
class Page:
    """A blank canvas with the room on it that a figure fills.

    Attributes:
        canvas: the picture, of any size.
        unit: pixels of the picture to one pixel of what the tower sees, on average over both directions.
        area: left, top, right, bottom of the room, in pixels; it lies anywhere on the canvas.
        face: of most of the lettering.
        ink: colour of lettering and lines, dark on light or light on dark.
        line: width of lines, in pixels.
    """

    canvas: Canvas
    unit: float
    area: tuple[float, float, float, float]
    face: Face
    ink: RGB
    line: int

    @property
    def dark(self) -> bool:
        return sum(self.canvas.background) < 380


def blank(look: Look, rng: Random, *, background: RGB | None = None, smallest: float = 0.78) -> Page:
    """Return a page of random size, aspect and background, with the figure's room placed freely on it.

    Args:
        look: whether the picture is a large one, and its faces.
        rng: decides the rest.
        background: fixed instead of random.
        smallest: share of the canvas that the room takes at least, in either direction.
    """
    if look.large:
        width, height = rng.randint(230, 400), rng.randint(230, 400)
        unit = rng.uniform(1.0, 1.25)
    else:
        # Half of the pictures are square and of the tower's own size; the others are resized on their way to it.
        shape = (1.0, 1.0) if rng.random() < 0.5 else (rng.uniform(0.75, 1.8), rng.uniform(0.75, 1.5))
        width, height = (round(NATIVE * stretch) for stretch in shape)
        unit = (shape[0] * shape[1]) ** 0.5
    if background is None:
        background = paper(rng)
    dark = sum(background) < 380
    ink = _gray_or_tinted(rng, 215, 255) if dark else _gray_or_tinted(rng, 0, 70)
    wide, high = (side * rng.uniform(smallest, 0.98) for side in (width, height))
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    line = max(1, round(unit * rng.choice((1, 1, 1, 1.5, 2))))
    return Page(
        Canvas(width, height, background), unit, (left, top, left + wide, top + high), rng.choice(look.faces), ink, line
    )


def paper(rng: Random) -> RGB:
    """Return a background: white or nearly so, a light tint, or one in eight times dark."""
    kind = rng.random()
    if kind < 0.35:
        return (255, 255, 255)
    if kind < 0.875:
        return _gray_or_tinted(rng, 205, 255)
    return _gray_or_tinted(rng, 0, 60)


def _gray_or_tinted(rng: Random, low: int, high: int) -> RGB:
    if rng.random() < 0.5:
        return (rng.randint(low, high),) * 3
    red, green, blue = (rng.randint(low, high) for _ in range(3))
    return red, green, blue


def shade(color: str, rng: Random) -> RGB:
    """Return the named colour, a little lighter or darker and, unless it is a gray, of a little another hue."""
    lift = rng.randint(-14, 14)
    tint = 3 if color in ("black", "white", "gray") else 12
    red, green, blue = (min(255, max(0, channel + lift + rng.randint(-tint, tint))) for channel in COLORS[color])
    return red, green, blue


def contrast(one: RGB, other: RGB) -> int:
    """Return how far apart two colours are: the sum over the channels, 0 to 765."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def palette(rng: Random, count: int, background: RGB) -> list[RGB]:
    """Return fills that stand out from the background: mostly all different, at times one for all or shades of one."""
    colors: list[RGB] = []
    for name in rng.sample(tuple(COLORS), len(COLORS)):
        color = shade(name, rng)
        if contrast(color, background) > 150:
            colors.append(color)
    kind = rng.random()
    if kind < 0.25:
        return [colors[0]] * count
    return [colors[index % len(colors)] for index in range(count)]


def ink_on(fill: RGB) -> RGB:
    """Return an ink that can be read on `fill`."""
    return (255, 255, 255) if 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] < 130 else (15, 15, 15)

"""Drawing primitives. Bitmap lettering and integer geometry only, so that a figure is the same bytes everywhere."""

from collections.abc import Callable
from random import Random

from PIL import Image, ImageDraw, ImageFont

from siq_vl.data.figures.lexicon import COLORS

SIZE = 96  # pixels; the canvas is SIZE x SIZE
CELL = 24  # pixels; one image token of the tiny model covers CELL x CELL
GLYPH_WIDTH, GLYPH_HEIGHT = 6, 11  # pixels; Pillow's built-in bitmap font is monospaced

RGB = tuple[int, int, int]
INK: RGB = (20, 20, 20)

_FONT = ImageFont.load_default_imagefont()


def canvas(background: RGB) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return a blank RGB picture of `SIZE` x `SIZE` pixels and a pen for it."""
    image = Image.new("RGB", (SIZE, SIZE), background)
    return image, ImageDraw.Draw(image)


def shade(color: str, rng: Random, spread: int = 12) -> RGB:
    """Return the named colour, each channel moved by at most `spread`."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in COLORS[color])
    return red, green, blue


def write(pen: ImageDraw.ImageDraw, x: int, y: int, text: str, fill: RGB = INK) -> None:
    """Letter `text` with its top-left corner at (x, y)."""
    pen.text((x, y), text, font=_FONT, fill=fill)


def write_large(image: Image.Image, x: int, y: int, text: str, fill: RGB = INK) -> None:
    """Letter `text` at twice the size (12 x 22 pixels a glyph) with its top-left corner at (x, y)."""
    mask = Image.new("1", (GLYPH_WIDTH * len(text), GLYPH_HEIGHT))
    ImageDraw.Draw(mask).text((0, 0), text, font=_FONT, fill=1)
    image.paste(fill, (x, y), mask.resize((2 * mask.width, 2 * mask.height), Image.Resampling.NEAREST))


def _ball(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: RGB) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=INK)


def _star(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: RGB) -> None:
    # Five outer and five inner corners on a 100-unit circle, as integers.
    corners = (
        (0, -100),
        (24, -32),
        (95, -31),
        (38, 12),
        (59, 81),
        (0, 40),
        (-59, 81),
        (-38, 12),
        (-95, -31),
        (-24, -32),
    )
    pen.polygon([(x + dx * r // 100, y + dy * r // 100) for dx, dy in corners], fill=fill, outline=INK)


def _house(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: RGB) -> None:
    pen.rectangle((x - r * 3 // 4, y - r // 6, x + r * 3 // 4, y + r), fill=fill, outline=INK)
    pen.polygon([(x - r, y - r // 6), (x, y - r), (x + r, y - r // 6)], fill=fill, outline=INK)
    pen.rectangle((x - r // 5, y + r // 3, x + r // 5, y + r), fill=(250, 250, 250), outline=INK)


def _tree(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: RGB) -> None:
    pen.rectangle((x - r // 6, y + r // 3, x + r // 6, y + r), fill=(120, 80, 40))
    pen.polygon([(x - r * 3 // 4, y), (x, y - r), (x + r * 3 // 4, y)], fill=fill, outline=INK)
    pen.polygon([(x - r, y + r // 2), (x, y - r // 3), (x + r, y + r // 2)], fill=fill, outline=INK)


def _fish(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: RGB) -> None:
    pen.polygon([(x + r // 3, y), (x + r, y - r // 2), (x + r, y + r // 2)], fill=fill, outline=INK)
    pen.ellipse((x - r, y - r // 2, x + r // 2, y + r // 2), fill=fill, outline=INK)
    pen.rectangle((x - r * 2 // 3, y - r // 5, x - r * 2 // 3 + 1, y - r // 5 + 1), fill=(250, 250, 250))


def _boat(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: RGB) -> None:
    pen.polygon(
        [(x - r, y + r // 3), (x + r, y + r // 3), (x + r // 2, y + r), (x - r // 2, y + r)], fill=fill, outline=INK
    )
    pen.line((x, y + r // 3, x, y - r), fill=INK, width=2)
    pen.polygon([(x + 2, y - r), (x + r * 3 // 4, y + r // 6), (x + 2, y + r // 6)], fill=(250, 250, 250), outline=INK)


def _cup(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: RGB) -> None:
    pen.ellipse((x + r // 3, y - r // 3, x + r, y + r // 2), outline=fill, width=3)
    pen.polygon([(x - r, y - r * 2 // 3), (x + r * 2 // 3, y - r * 2 // 3), (x + r // 3, y + r), (x - r * 2 // 3, y + r)], fill=fill, outline=INK)  # fmt: skip


def _kite(pen: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: RGB) -> None:
    pen.polygon([(x, y - r), (x + r * 2 // 3, y - r // 4), (x, y + r * 2 // 3), (x - r * 2 // 3, y - r // 4)], fill=fill, outline=INK)  # fmt: skip
    pen.line((x, y + r * 2 // 3, x + r // 3, y + r), fill=INK)
    pen.line((x, y - r, x, y + r * 2 // 3), fill=INK)


OBJECT_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, int, int, int, RGB], None]] = {
    "ball": _ball,
    "star": _star,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "boat": _boat,
    "cup": _cup,
    "kite": _kite,
}

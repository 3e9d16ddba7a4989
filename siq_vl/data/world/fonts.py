"""The faces that pictures are lettered in: those of matplotlib and of Pillow, some of them never seen in training.

Both libraries ship their fonts, and Pillow ships the rasteriser, so a lettering is the same bytes on any machine.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# What every face has, and what a tower is taught to tell apart.
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:%$+-/&!?"


@dataclass(frozen=True)
class Face:
    """A face by its family and style; `file` is in matplotlib's folder of fonts, or one of Pillow's own two."""

    family: str
    file: str


_PILLOW, _BITMAP = "pillow", "bitmap"
FACES = (
    Face("DejaVu Sans", "DejaVuSans.ttf"),
    Face("DejaVu Sans", "DejaVuSans-Bold.ttf"),
    Face("DejaVu Sans", "DejaVuSans-Oblique.ttf"),
    Face("DejaVu Serif", "DejaVuSerif.ttf"),
    Face("DejaVu Serif", "DejaVuSerif-Bold.ttf"),
    Face("STIX", "STIXGeneral.ttf"),
    Face("STIX", "STIXGeneralBol.ttf"),
    Face("STIX", "STIXGeneralItalic.ttf"),
    Face("Computer Modern Sans", "cmss10.ttf"),
    Face("Computer Modern Typewriter", "cmtt10.ttf"),
    Face("Aileron", _PILLOW),
    Face("bitmap", _BITMAP),
)
# Families that no training picture shows: a monospaced one and a serif.
HELD_OUT_FACES = (
    Face("DejaVu Sans Mono", "DejaVuSansMono.ttf"),
    Face("Computer Modern Roman", "cmr10.ttf"),
)
_BITMAP_WIDTH, _BITMAP_HEIGHT = 6, 11  # pixels of a character of Pillow's bitmap font, which has one size


@dataclass(frozen=True)
class Lettering:
    """A text rendered in one face and size.

    Attributes:
        mask: the ink, mode "L"; its top is the face's ascent and its bottom the descent, whatever the text.
        centres: x of each character's centre, in pixels from the left.
        middle: y of the middle of a small letter, in pixels from the top.
    """

    mask: Image.Image
    centres: tuple[float, ...]
    middle: float


@lru_cache(maxsize=1)
def _folder() -> Path:
    # Found without importing matplotlib, which takes longer than drawing a hundred pictures.
    found = find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        raise ValueError("the drawn world letters in matplotlib's fonts; install it: pip install matplotlib")
    return Path(found.submodule_search_locations[0], "mpl-data", "fonts", "ttf")


@lru_cache(maxsize=512)
def _font(face: Face, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout: the other one depends on a library that some machines have.
    if face.file == _PILLOW:
        made = ImageFont.load_default(size)
        if not isinstance(made, ImageFont.FreeTypeFont):
            raise ValueError(
                "Pillow was built without FreeType, so its default font has one size; install another build"
            )
        return made.font_variant(layout_engine=ImageFont.Layout.BASIC)
    return ImageFont.truetype(_folder() / face.file, size, layout_engine=ImageFont.Layout.BASIC)


def letter(text: str, face: Face, size: int) -> Lettering:
    """Render `text`; `size` is the face's, in pixels, of which a capital takes some 70%."""
    if face.file == _BITMAP:
        return _letter_bitmap(text, size)
    ascent, descent = _metrics(face, size)
    mask = Image.new("L", (max(1, round(text_width(text, face, size)) + 1), ascent + descent))
    end, centres = 0.0, []
    for character in text:
        glyph, advance = _glyph(character, face, size)
        mask.paste(255, (round(end) - _margin(size), 0), glyph)
        centres.append(end + advance / 2)
        end += advance
    return Lettering(mask, tuple(centres), ascent - 0.27 * size)


def text_width(text: str, face: Face, size: int) -> float:
    """Return the width of a text in pixels, without rendering it. Characters do not move closer in pairs."""
    if face.file == _BITMAP:
        return _BITMAP_WIDTH * len(text) * size / _BITMAP_HEIGHT
    return sum(_glyph(character, face, size)[1] for character in text)


@lru_cache(maxsize=1024)
def _metrics(face: Face, size: int) -> tuple[int, int]:
    return _font(face, size).getmetrics()


def _margin(size: int) -> int:
    return size // 3  # for what a slanted letter reaches beyond its own room


@lru_cache(maxsize=100_000)
def _glyph(character: str, face: Face, size: int) -> tuple[Image.Image, float]:
    """Return a character's ink, with a margin on either side, and its advance in pixels."""
    font = _font(face, size)
    advance = font.getlength(character)
    ascent, descent = font.getmetrics()
    mask = Image.new("L", (int(advance) + 1 + 2 * _margin(size), ascent + descent))
    ImageDraw.Draw(mask).text((_margin(size), 0), character, font=font, fill=255)
    return mask, advance


@lru_cache(maxsize=10_000)
def _letter_bitmap(text: str, size: int) -> Lettering:
    font = ImageFont.load_default_imagefont()
    mask = Image.new("1", (max(1, _BITMAP_WIDTH * len(text)), _BITMAP_HEIGHT))
    ImageDraw.Draw(mask).text((0, 0), text, font=font, fill=1)
    width = max(1, round(mask.width * size / _BITMAP_HEIGHT))
    filtered = Image.Resampling.NEAREST if size % _BITMAP_HEIGHT == 0 else Image.Resampling.BILINEAR
    scaled = mask.convert("L").resize((width, size), filtered)
    advance = width / max(1, len(text))
    return Lettering(scaled, tuple(advance * (index + 0.5) for index in range(len(text))), 0.55 * size)

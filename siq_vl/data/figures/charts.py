"""Charts: two to four monthly values. Mirrors ChartQA: read a value, compare, yes/no, difference, sum."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

from PIL import Image, ImageDraw

from siq_vl.data.figures.drawing import CELL, GLYPH_WIDTH, INK, SIZE, canvas, shade, write
from siq_vl.data.figures.figure import Fact, Figure, Question, compare_and_add, total
from siq_vl.data.figures.lexicon import COLORS, HELD_OUT_SERIES_COUNT, MONTHS

MAX_VALUE = 20
_GRID = (214, 214, 214)
_WORDINGS = {
    "value": ("What is the value of {a}?", "What value does {a} have?"),
    "label": ("Which month has the value {x}?", "Which month is at {x}?"),
    "compare": ("Which is higher, {a} or {b}?", "Which month has more, {a} or {b}?"),
    "yes_no": ("Is {a} higher than {b}?", "Does {a} have more than {b}?"),
    "difference": ("What is the difference between {a} and {b}?", "How far apart are {a} and {b}?"),
    "sum": ("What is the sum of {a} and {b}?", "How much are {a} and {b} together?"),
    "maximum": ("Which month is the highest?", "Which month has the most?"),
    "minimum": ("Which month is the lowest?", "Which month has the least?"),
}


@dataclass(frozen=True)
class Chart(Figure):
    """Entries as (month, value), in calendar order, values distinct and between 1 and `MAX_VALUE`."""

    entries: tuple[tuple[str, int], ...]

    domain: ClassVar[str] = "charts"

    @classmethod
    def sample(cls, rng: Random) -> Self:
        count = rng.choice((2, 3, 4, 4))
        months = sorted(rng.sample(range(12), count))
        values = rng.sample(range(1, MAX_VALUE + 1), count)
        entries = []
        for month, value in zip(months, values, strict=True):
            entries.append((MONTHS[month], value))
        return cls(tuple(entries))

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple((month, str(value)) for month, value in self.entries)

    @property
    def held_out(self) -> bool:
        return len(self.entries) == HELD_OUT_SERIES_COUNT

    def questions(self, rng: Random) -> list[Question]:
        asked = compare_and_add(rng, self.entries, _WORDINGS)
        if len(self.entries) > 2:
            asked.append(total(self.entries, "What is the sum of all values?"))
        return asked

    def _colors(self, rng: Random) -> list[tuple[int, int, int]]:
        return [shade(color, rng) for color in rng.sample(tuple(COLORS), len(self.entries))]


def _cells_below(facts: tuple[Fact, ...]) -> dict[tuple[int, int], Fact]:
    """Return the cells of a chart whose labels stand below its bars, in the last row of cells."""
    found = {}
    for column, fact in enumerate(facts):
        found[3, column] = fact
    return found


def _bar(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], fill: tuple[int, int, int]) -> None:
    pen.rectangle(box, fill=fill, outline=INK)


def _label(pen: ImageDraw.ImageDraw, x: int, y: int, month: str, value: int) -> None:
    # Month above value, both inside one cell, so that one image token reads the pair.
    write(pen, x + 3, y + 1, month)
    write(pen, x + (CELL - GLYPH_WIDTH * len(str(value))) // 2, y + 12, str(value))


class ColumnChart(Chart):
    """Vertical bars; the month and its printed value stand below each."""

    kind: ClassVar[str] = "columns"

    def cells(self) -> dict[tuple[int, int], Fact]:
        return _cells_below(self.facts)

    def draw(self, rng: Random) -> Image.Image:
        image, pen = canvas((255, 255, 255))
        base = 3 * CELL - 1
        for column, ((month, value), color) in enumerate(zip(self.entries, self._colors(rng), strict=True)):
            _bar(pen, (CELL * column + 5, base - value * 66 // MAX_VALUE, CELL * column + 18, base), color)
            _label(pen, CELL * column, 3 * CELL, month, value)
        pen.line((0, base, SIZE, base), fill=INK)
        return image


class RowChart(Chart):
    """Horizontal bars; the month and its printed value stand left of each."""

    kind: ClassVar[str] = "rows"

    def cells(self) -> dict[tuple[int, int], Fact]:
        found = {}
        for row, fact in enumerate(self.facts):
            found[row, 0] = fact
        return found

    def draw(self, rng: Random) -> Image.Image:
        image, pen = canvas((255, 255, 255))
        for row, ((month, value), color) in enumerate(zip(self.entries, self._colors(rng), strict=True)):
            _bar(pen, (CELL, CELL * row + 5, CELL + value * 68 // MAX_VALUE, CELL * row + 18), color)
            _label(pen, 0, CELL * row, month, value)
        pen.line((CELL, 0, CELL, SIZE), fill=INK)
        return image


class AxisChart(Chart):
    """Vertical bars without printed values: heights are read off gridlines five units apart. Part of the hard row."""

    kind: ClassVar[str] = "axis"

    @property
    def hard(self) -> bool:
        return True

    def cells(self) -> dict[tuple[int, int], Fact]:
        return _cells_below(self.facts)

    def draw(self, rng: Random) -> Image.Image:
        image, pen = canvas((255, 255, 255))
        base = 3 * CELL + 8
        for tick in range(5, MAX_VALUE + 1, 5):
            pen.line((0, base - tick * 4, SIZE, base - tick * 4), fill=_GRID)
        for column, ((month, value), color) in enumerate(zip(self.entries, self._colors(rng), strict=True)):
            _bar(pen, (CELL * column + 5, base - value * 4, CELL * column + 18, base), color)
            write(pen, CELL * column + 3, 3 * CELL + 11, month)
        pen.line((0, base, SIZE, base), fill=INK)
        return image

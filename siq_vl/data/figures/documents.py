"""Documents: receipts, signs and number plates. Mirrors OCR-VQA: the answer has to be read."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

from PIL import Image

from siq_vl.data.figures.drawing import CELL, GLYPH_WIDTH, INK, SIZE, canvas, shade, write, write_large
from siq_vl.data.figures.figure import Fact, Figure, Question, compare_and_add, phrase, total, verdict
from siq_vl.data.figures.lexicon import COLORS, HELD_OUT_SIGNS, ITEMS, LETTERS, SIGNS

MAX_PRICE = 20
_PAPER = (255, 255, 255)
_DESK = ((206, 214, 222), (222, 210, 196), (208, 220, 204))
_WORDINGS = {
    "value": ("How much is the {a}?", "What does the {a} cost?"),
    "label": ("Which item costs {x}?", "What has the price {x}?"),
    "compare": ("Which costs more, {a} or {b}?", "Which has the higher price, {a} or {b}?"),
    "yes_no": ("Is the {a} more than the {b}?", "Does the {a} cost more than the {b}?"),
    "difference": ("What is the difference between {a} and {b}?", "How far apart are {a} and {b}?"),
    "sum": ("How much are {a} and {b} together?", "What is the sum of {a} and {b}?"),
    "maximum": ("Which item costs the most?", "What is the most expensive item?"),
    "minimum": ("Which item costs the least?", "What is the cheapest item?"),
}


@dataclass(frozen=True)
class Receipt(Figure):
    """Lines as (item, price), items and prices distinct, prices between 1 and `MAX_PRICE`."""

    lines: tuple[tuple[str, int], ...]

    domain: ClassVar[str] = "documents"
    kind: ClassVar[str] = "receipt"

    @classmethod
    def sample(cls, rng: Random) -> Self:
        count = rng.choice((2, 3, 3))
        prices = rng.sample(range(1, MAX_PRICE + 1), count)
        return cls(tuple(zip(rng.sample(ITEMS, count), prices, strict=True)))

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple((item, str(price)) for item, price in self.lines)

    @property
    def held_out(self) -> bool:
        return False

    def cells(self) -> dict[tuple[int, int], Fact]:
        found: dict[tuple[int, int], Fact] = {}
        for row, fact in enumerate(self.facts, 1):  # the top of the receipt is blank
            found[row, 1] = found[row, 2] = fact
        return found

    def draw(self, rng: Random) -> Image.Image:
        image, pen = canvas(rng.choice(_DESK))
        pen.rectangle((CELL - 6, 2, 3 * CELL + 5, SIZE - 3), fill=_PAPER, outline=INK)
        for x in range(CELL - 2, 3 * CELL + 2, 4):
            pen.line((x, 16, x + 1, 16), fill=INK)
        for row, (item, price) in enumerate(self.lines, 1):
            write(pen, CELL, CELL * row + 6, item)
            write(pen, 3 * CELL - GLYPH_WIDTH * len(str(price)) - 3, CELL * row + 6, str(price))
        return image

    def questions(self, rng: Random) -> list[Question]:
        asked = compare_and_add(rng, self.lines, _WORDINGS)
        if len(self.lines) > 2:
            asked.append(total(self.lines, "What is the total?"))
        return asked


@dataclass(frozen=True)
class Signs(Figure):
    """One or two signs, upper first, as (color, word); colours and words distinct."""

    boards: tuple[tuple[str, str], ...]

    domain: ClassVar[str] = "documents"
    kind: ClassVar[str] = "sign"

    @classmethod
    def sample(cls, rng: Random) -> Self:
        count = rng.choice((1, 2, 2))
        return cls(tuple(zip(rng.sample(tuple(COLORS), count), rng.sample(SIGNS, count), strict=True)))

    @property
    def facts(self) -> tuple[Fact, ...]:
        return self.boards

    @property
    def held_out(self) -> bool:
        return any(word in HELD_OUT_SIGNS for _, word in self.boards)

    def cells(self) -> dict[tuple[int, int], Fact]:
        found: dict[tuple[int, int], Fact] = {}
        for row, fact in enumerate(self.boards):  # a sign is two cells high; its word is in the lower
            found[2 * row + 1, 1] = found[2 * row + 1, 2] = fact
        return found

    def draw(self, rng: Random) -> Image.Image:
        image, pen = canvas(rng.choice(_DESK))
        left = rng.randint(6, 12)
        for row, (color, word) in enumerate(self.boards):
            top = 2 * CELL * row + rng.randint(8, 14)
            pen.rounded_rectangle((left, top, SIZE - left, 2 * CELL * row + 45), 6, fill=shade(color, rng), outline=INK)
            pen.rectangle((CELL, 2 * CELL * row + CELL + 1, 3 * CELL - 1, 2 * CELL * row + CELL + 15), fill=_PAPER)
            write(pen, SIZE // 2 - GLYPH_WIDTH * len(word) // 2, 2 * CELL * row + CELL + 3, word)
        return image

    def questions(self, rng: Random) -> list[Question]:
        color, word = rng.choice(self.boards)
        # Another word half of the time; the last two of `SIGNS` are kept out of training.
        other = rng.choice(SIGNS[:-2]) if rng.random() < 0.5 else word
        says_other = "yes" if other == word else "no"
        read = f"{color} {word}"
        asked = [
            Question("text", phrase(rng, f"What does the {color} sign say?", f"Which word is on the {color} sign?"), word, (read,)),
            Question("color", phrase(rng, f"What color is the {word} sign?", f"Which color has the {word} sign?"), color, (f"{word} {color}",)),
            Question("yes_no", phrase(rng, f"Does the {color} sign say {other}?", f"Is {other} on the {color} sign?"), says_other, (read, verdict(other, word))),
        ]  # fmt: skip
        if len(self.boards) == 2:
            (_, upper), (lower_color, lower) = self.boards
            # Each step leads from what is known to what is asked.
            down, up = f"{upper}, {lower_color} {lower}", f"{lower} {lower_color}, {upper}"
            asked.append(Question("order", f"What does the sign below {upper} say?", lower, (down,), multi_step=True))
            asked.append(Question("order", f"What does the sign above {lower} say?", upper, (up,), multi_step=True))
        return asked


@dataclass(frozen=True)
class Plate(Figure):
    """A car of some colour with a number plate: one letter and a number between 10 and 99."""

    color: str
    letter: str
    number: int

    domain: ClassVar[str] = "documents"
    kind: ClassVar[str] = "plate"

    @classmethod
    def sample(cls, rng: Random) -> Self:
        return cls(rng.choice(tuple(COLORS)), rng.choice(LETTERS), rng.randint(10, 99))

    @property
    def facts(self) -> tuple[Fact, ...]:
        return ((self.color, self.letter, str(self.number)),)

    @property
    def held_out(self) -> bool:
        return False

    def cells(self) -> dict[tuple[int, int], Fact]:
        return {(2, 1): self.facts[0], (2, 2): self.facts[0]}

    def draw(self, rng: Random) -> Image.Image:
        image, pen = canvas(rng.choice(_DESK))
        paint = shade(self.color, rng)
        roof = rng.randint(12, 18)
        pen.polygon([(26, roof), (69, roof), (80, 40), (15, 40)], fill=paint, outline=INK)
        pen.polygon([(31, roof + 4), (64, roof + 4), (71, 36), (24, 36)], fill=(220, 236, 246), outline=INK)
        pen.rounded_rectangle((7, 38, 88, 84), 6, fill=paint, outline=INK)
        for x in (12, 74):
            pen.ellipse((x, 50, x + 9, 59), fill=(255, 250, 200), outline=INK)
            pen.rectangle((x, 82, x + 9, 90), fill=INK)
        pen.rectangle((25, 47, 72, 72), fill=_PAPER, outline=INK)
        write_large(image, 30, 49, self.letter)
        write_large(image, 47, 49, str(self.number))
        return image

    def questions(self, rng: Random) -> list[Question]:
        tens, ones = divmod(self.number, 10)
        read, digits = f"{self.color} {self.letter} {self.number}", f"{self.number} is {tens} {ones}"
        parity, is_even = ("odd", "no") if ones % 2 else ("even", "yes")
        return [
            Question("text", phrase(rng, "What number is on the plate?", "Which number does the plate have?"), str(self.number), (read,)),
            Question("text", phrase(rng, "What letter is on the plate?", "Which letter does the plate have?"), self.letter, (read,)),
            Question("color", phrase(rng, "What color is the car?", "Which color does the car have?"), self.color, (read,)),
            Question("yes_no", phrase(rng, "Is the number on the plate even?", "Does the plate have an even number?"), is_even, (read, digits, f"{ones} {parity}"), multi_step=True),
            Question("digit_sum", phrase(rng, "What is the sum of the digits on the plate?", "How much are the digits of the plate together?"), str(tens + ones), (read, digits, f"{tens} + {ones} = {tens + ones}"), multi_step=True),
        ]  # fmt: skip

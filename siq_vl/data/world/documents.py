"""Documents: receipts, signs, plates, book covers and forms. Mirrors OCR-VQA: the answer has to be read."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

from siq_vl.data.figures.figure import Fact, Question, compare_and_add, phrase, total, verdict
from siq_vl.data.world import lexicon
from siq_vl.data.world.canvas import RGB, Drawn
from siq_vl.data.world.chart_drawing import fitting
from siq_vl.data.world.figure import Figure, Look, Page, blank, contrast, ink_on, shade, unanswerable
from siq_vl.data.world.fonts import text_width

_PRICES = {
    "value": ("How much is the {a}?", "What does the {a} cost?"),
    "label": ("Which item costs {x}?", "What has the price {x}?"),
    "compare": ("Which costs more, {a} or {b}?", "Which has the higher price, {a} or {b}?"),
    "yes_no": ("Is the {a} more than the {b}?", "Does the {a} cost more than the {b}?"),
    "difference": ("What is the difference between {a} and {b}?", "How far apart are {a} and {b}?"),
    "sum": ("How much are {a} and {b} together?", "What is the sum of {a} and {b}?"),
    "maximum": ("Which item costs the most?", "What is the most expensive item?"),
    "minimum": ("Which item costs the least?", "What is the cheapest item?"),
}
MAX_PRICE = 50


def _sheet(page: Page, rng: Random) -> tuple[float, float, float, float]:
    """Lay a sheet of paper over the page's area, with an edge or none, and return the room inside its margins."""
    left, top, right, bottom = page.area
    pen = page.canvas.pen
    if rng.random() < 0.7:
        tone = (255, 255, 255) if not page.dark else (20, 22, 28)
        pen.rectangle((left, top, right, bottom), fill=tone, outline=page.ink if rng.random() < 0.5 else None)
    margin = page.unit * rng.uniform(3, 7)
    return left + margin, top + margin, right - margin, bottom - margin


@dataclass(frozen=True)
class Receipt(Figure):
    """Lines as (item, price), items and prices distinct, prices between 1 and `MAX_PRICE`; a shop's name, or none."""

    shop: str
    lines: tuple[tuple[str, int], ...]

    domain: ClassVar[str] = "documents"
    kind: ClassVar[str] = "receipt"

    @classmethod
    def sample(cls, rng: Random) -> Self:
        count = rng.choice((2, 3, 3, 4, 4, 5, 6))
        most = rng.choice((10, 20, MAX_PRICE))
        prices = rng.sample(range(1, most + 1), count)
        shop = rng.choice(lexicon.SHOPS) if rng.random() < 0.5 else ""
        return cls(shop, tuple(zip(rng.sample(lexicon.ITEMS, count), prices, strict=True)))

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple((item, str(price)) for item, price in self.lines)

    @property
    def caption(self) -> str:
        listed = super().caption
        return f"{listed}, shop {self.shop}" if self.shop else listed

    def questions(self, rng: Random) -> list[Question]:
        asked = compare_and_add(rng, self.lines, _PRICES)
        if len(self.lines) > 2:
            asked.append(total(self.lines, phrase(rng, "What is the total?", "How much is everything together?")))
        if self.shop:
            asked.append(Question("text", phrase(rng, "What is the shop called?", "Which shop is the receipt from?"), self.shop, (f"shop {self.shop}",)))  # fmt: skip
        present = {item for item, _ in self.lines}
        missing = rng.choice([item for item in lexicon.ITEMS if item not in present])
        asked.append(unanswerable(phrase(rng, *_PRICES["value"]).format(a=missing), missing))
        return asked

    def paint(self, look: Look, rng: Random) -> Drawn:
        page = blank(look, rng)
        left, top, right, bottom = _sheet(page, rng)
        layout = rng.choice(("receipt", "receipt", "dots", "table"))
        form = rng.choice(("{}", "{}", "{}", "{}.00", "${}", "{}.-"))
        prices = [form.format(price) for _, price in self.lines]
        rows = len(self.lines) + (1.3 if self.shop else 0)
        pitch = (bottom - top) / (rows + 0.2)
        size = min(round(page.unit * rng.choice((10, 11, 12, 13, 15))), round(0.92 * pitch))
        widest = [f"{item}  {price}" for (item, _), price in zip(self.lines, prices, strict=True)]
        size = fitting(widest, right - left, page, size)
        pitch = min(pitch, size * rng.uniform(1.15, 2.2))
        y = top + 0.6 * pitch
        if self.shop:
            large = fitting([self.shop], right - left, page, round(1.25 * size))
            page.canvas.write((left + right) / 2, y, self.shop, page.face, large, page.ink, align=0.5, facts=("shop", self.shop))  # fmt: skip
            y += 1.3 * pitch
        column = right
        if rng.random() < 0.3:  # the prices nearer to the items than the far edge
            column = min(right, left + max(text_width(text, page.face, size) for text in widest) + rng.uniform(0, 1) * (right - left) / 3)  # fmt: skip
        for (item, price), shown in zip(self.lines, prices, strict=True):
            fact = (item, str(price))
            box = page.canvas.write(left, y, item, page.face, size, page.ink, facts=fact)
            start = column - text_width(shown, page.face, size)
            if layout == "dots":
                for x in range(round(box[2]) + 3, round(start) - 2, max(3, round(3 * page.unit))):
                    page.canvas.pen.point((x, y + 0.25 * size), fill=page.ink)
            elif layout == "table":
                page.canvas.pen.line((left, y + 0.5 * pitch, column, y + 0.5 * pitch), fill=page.ink)
            page.canvas.write(column, y, shown, page.face, size, page.ink, align=1.0, facts=fact)
            page.canvas.mark((left, y - 0.3 * size, column, y + 0.3 * size), facts=fact)
            y += pitch
        return self.finished(page.canvas, look, rng)


@dataclass(frozen=True)
class Signs(Figure):
    """One to three signs from top to bottom, as (color, word); colours and words distinct."""

    boards: tuple[tuple[str, str], ...]

    domain: ClassVar[str] = "documents"
    kind: ClassVar[str] = "sign"
    gray: ClassVar[bool] = False

    @classmethod
    def sample(cls, rng: Random) -> Self:
        count = rng.choice((1, 2, 2, 3))
        return cls(tuple(zip(rng.sample(tuple(lexicon.COLORS), count), rng.sample(lexicon.SIGNS, count), strict=True)))

    @property
    def facts(self) -> tuple[Fact, ...]:
        return self.boards

    @property
    def held_out(self) -> bool:
        return any(word in lexicon.HELD_OUT_SIGNS for _, word in self.boards)

    def questions(self, rng: Random) -> list[Question]:
        color, word = rng.choice(self.boards)
        allowed = [sign for sign in lexicon.SIGNS if sign not in lexicon.HELD_OUT_SIGNS]
        other = rng.choice(allowed) if rng.random() < 0.5 else word
        read = f"{color} {word}"
        shown = {board for board, _ in self.boards}
        missing = rng.choice([name for name in lexicon.COLORS if name not in shown])
        asked = [
            Question("text", phrase(rng, f"What does the {color} sign say?", f"Which word is on the {color} sign?"), word, (read,)),
            Question("color", phrase(rng, f"What color is the {word} sign?", f"Which color has the {word} sign?"), color, (f"{word} {color}",)),
            Question("yes_no", phrase(rng, f"Does the {color} sign say {other}?", f"Is {other} on the {color} sign?"), "yes" if other == word else "no", (read, verdict(other, word))),
            unanswerable(phrase(rng, f"What does the {missing} sign say?", f"Which word is on the {missing} sign?"), missing),
        ]  # fmt: skip
        if len(self.boards) > 1:
            index = rng.randrange(len(self.boards) - 1)
            (upper_color, upper), (lower_color, lower) = self.boards[index : index + 2]
            # From the known to the asked.
            down, up = f"{upper}, {lower_color} {lower}", f"{lower} {lower_color}, {upper} {upper_color}"
            asked.append(Question("order", f"What does the sign below {upper} say?", lower, (down,), multi_step=True))
            asked.append(Question("order", f"What color is the sign above {lower}?", upper_color, (up,), multi_step=True))  # fmt: skip
        return asked

    def paint(self, look: Look, rng: Random) -> Drawn:
        page = blank(look, rng, smallest=0.85)
        left, top, right, bottom = page.area
        slot = (bottom - top) / max(len(self.boards), rng.choice((1, 2, 3)))
        y = top + rng.uniform(0, bottom - top - slot * len(self.boards))
        for color, word in self.boards:
            fill = shade(color, rng)
            high = slot * rng.uniform(0.6, 0.92)
            size = min(round(page.unit * rng.choice((12, 14, 16, 20, 24, 30))), round(0.8 * high))
            size = fitting([word], 0.78 * (right - left), page, size)
            wide = min(right - left, text_width(word, page.face, size) + size * rng.uniform(0.9, 2.2))
            x, middle = rng.uniform(left, right - wide), y + slot / 2
            box = (x, middle - high / 2, x + wide, middle + high / 2)
            _board(page, box, fill, rng)
            ink, face = ink_on(fill), page.face
            page.canvas.write(x + wide / 2, middle, word, face, size, ink, align=0.5, facts=(color, word))
            page.canvas.mark(box, seen=(color,), facts=(color, word))
            y += slot
        return self.finished(page.canvas, look, rng)


def _board(page: Page, box: tuple[float, float, float, float], fill: RGB, rng: Random) -> None:
    """Draw a sign's board: square, rounded or a stadium, with an edge, an inner line, or posts."""
    pen = page.canvas.pen
    left, top, right, bottom = box
    radius = rng.choice((0, 0, 0.15, 0.5)) * min(right - left, bottom - top)
    distinct = contrast(fill, page.canvas.background) > 120
    edge = page.ink if rng.random() < 0.5 or not distinct else None
    if rng.random() < 0.2:
        x = (left + right) / 2
        pen.rectangle((x - 2 * page.unit, bottom - 1, x + 2 * page.unit, bottom + 9 * page.unit), fill=page.ink)
    pen.rounded_rectangle(box, radius, fill=fill, outline=edge, width=page.line)
    inset = 2 * page.unit
    if rng.random() < 0.3:
        inner = (left + inset, top + inset, right - inset, bottom - inset)
        pen.rounded_rectangle(inner, max(0, radius - inset), outline=ink_on(fill), width=1)


@dataclass(frozen=True)
class Plate(Figure):
    """A car of some colour with a number plate: one letter and a number between 10 and 99."""

    color: str
    letter: str
    number: int

    domain: ClassVar[str] = "documents"
    kind: ClassVar[str] = "plate"
    gray: ClassVar[bool] = False

    @classmethod
    def sample(cls, rng: Random) -> Self:
        return cls(rng.choice(tuple(lexicon.COLORS)), rng.choice(lexicon.LETTERS), rng.randint(10, 99))

    @property
    def facts(self) -> tuple[Fact, ...]:
        return ((self.color, self.letter, str(self.number)),)

    def questions(self, rng: Random) -> list[Question]:
        tens, ones = divmod(self.number, 10)
        read, digits = f"{self.color} {self.letter} {self.number}", f"{self.number} is {tens} {ones}"
        missing = rng.choice([color for color in lexicon.COLORS if color != self.color])
        return [
            Question("text", phrase(rng, "What number is on the plate?", "Which number does the plate have?"), str(self.number), (read,)),
            Question("text", phrase(rng, "What letter is on the plate?", "Which letter does the plate have?"), self.letter, (read,)),
            Question("color", phrase(rng, "What color is the car?", "Which color does the car have?"), self.color, (read,)),
            Question("yes_no", phrase(rng, "Is the number on the plate even?", "Does the plate have an even number?"), "no" if ones % 2 else "yes", (read, digits, f"{ones} {'odd' if ones % 2 else 'even'}"), multi_step=True),
            Question("digit_sum", phrase(rng, "What is the sum of the digits on the plate?", "How much are the digits of the plate together?"), str(tens + ones), (read, digits, f"{tens} + {ones} = {tens + ones}"), multi_step=True),
            unanswerable(phrase(rng, f"What number has the {missing} car?", f"Which letter has the {missing} car?"), missing),
        ]  # fmt: skip

    def paint(self, look: Look, rng: Random) -> Drawn:
        page = blank(look, rng)
        left, top, right, bottom = page.area
        pen, unit = page.canvas.pen, page.unit
        width = (right - left) * rng.uniform(0.75, 1.0)
        height = min(bottom - top, width * rng.uniform(0.7, 1.0))
        left, top = rng.uniform(left, right - width), rng.uniform(top, bottom - height)
        right, bottom = left + width, top + height
        fill = shade(self.color, rng)
        dark: RGB = (20, 20, 20)
        edge = page.ink if rng.random() < 0.6 or contrast(fill, page.canvas.background) < 120 else fill
        roof = [(left + 0.25 * width, top), (right - 0.25 * width, top), (right - 0.1 * width, top + 0.42 * height), (left + 0.1 * width, top + 0.42 * height)]  # fmt: skip
        pen.polygon(roof, fill=fill, outline=edge)
        inset = 0.06 * width
        glass = [(roof[0][0] + inset, top + inset), (roof[1][0] - inset, top + inset), (roof[2][0] - inset, roof[2][1]), (roof[3][0] + inset, roof[3][1])]  # fmt: skip
        pen.polygon(glass, fill=(214, 232, 244), outline=edge)
        body = (left, top + 0.4 * height, right, bottom - 0.1 * height)
        pen.rounded_rectangle(body, 0.08 * width, fill=fill, outline=edge, width=page.line)
        for x in (left + 0.06 * width, right - 0.18 * width):
            lamp = 0.12 * width
            pen.ellipse((x, body[1] + 0.04 * height, x + lamp, body[1] + 0.04 * height + lamp), fill=(255, 250, 200), outline=dark)  # fmt: skip
            pen.rectangle((x, body[3], x + lamp, bottom), fill=dark)
        text = f"{self.letter}{rng.choice((' ', ' ', '-', '  '))}{self.number}"
        size = fitting([text], 0.56 * width, page, round(unit * rng.choice((14, 16, 20, 24))))
        size = min(size, round(0.34 * height))
        wide, middle = text_width(text, page.face, size), (body[1] + body[3]) / 2 + 0.05 * height
        x = (left + right) / 2
        plate_fill = rng.choice(((255, 255, 255), (255, 255, 255), (250, 214, 60)))
        plate = (x - wide / 2 - 0.3 * size, middle - 0.65 * size, x + wide / 2 + 0.3 * size, middle + 0.65 * size)
        pen.rectangle(plate, fill=plate_fill, outline=dark)
        fact = self.facts[0]
        shown = text.replace("-", " ").split()
        page.canvas.write(x, middle, text, page.face, size, dark, align=0.5, facts=fact)
        page.canvas.mark(plate, seen=tuple(shown), facts=fact)
        page.canvas.mark(body, seen=(self.color,), facts=fact)
        return self.finished(page.canvas, look, rng)


@dataclass(frozen=True)
class Book(Figure):
    """A book's cover: its colour, title of one word, author, and the year or none."""

    cover: str
    title: str
    author: str
    year: str

    domain: ClassVar[str] = "documents"
    kind: ClassVar[str] = "book"
    gray: ClassVar[bool] = False

    @classmethod
    def sample(cls, rng: Random) -> Self:
        year = rng.choice(lexicon.YEARS) if rng.random() < 0.5 else ""
        return cls(rng.choice(tuple(lexicon.COLORS)), rng.choice(lexicon.BOOK_WORDS), rng.choice(lexicon.NAMES), year)

    @property
    def facts(self) -> tuple[Fact, ...]:
        found = (("cover", self.cover), ("title", self.title), ("author", self.author))
        return (*found, ("year", self.year)) if self.year else found

    def questions(self, rng: Random) -> list[Question]:
        other = rng.choice(lexicon.NAMES) if rng.random() < 0.5 else self.author
        asked = [
            Question("text", phrase(rng, "What is the title?", "What is the book called?"), self.title, (f"title {self.title}",)),
            Question("text", phrase(rng, "Who is the author?", "Who wrote the book?"), self.author, (f"author {self.author}",)),
            Question("color", phrase(rng, "What color is the cover?", "Which color does the book have?"), self.cover, (f"cover {self.cover}",)),
            Question("yes_no", phrase(rng, f"Is the book by {other}?", f"Did {other} write the book?"), "yes" if other == self.author else "no", (f"author {self.author}", verdict(other, self.author))),
        ]  # fmt: skip
        text = phrase(rng, "What year is on the book?", "When did the book appear?")
        if self.year:
            asked.append(Question("text", text, self.year, (f"year {self.year}",)))
        else:
            asked.append(unanswerable(text, "year"))
        asked.append(unanswerable(phrase(rng, "What is the price of the book?", "How much is the book?"), "price"))
        return asked

    def paint(self, look: Look, rng: Random) -> Drawn:
        page = blank(look, rng)
        left, top, right, bottom = page.area
        width = (right - left) * rng.uniform(0.7, 1.0)
        left = rng.uniform(left, right - width)
        fill = shade(self.cover, rng)
        ink = ink_on(fill)
        edge = page.ink if rng.random() < 0.6 or contrast(fill, page.canvas.background) < 120 else None
        pen = page.canvas.pen
        pen.rectangle((left, top, left + width, bottom), fill=fill, outline=edge, width=page.line)
        if rng.random() < 0.4:
            spine = left + rng.uniform(2, 5) * page.unit
            pen.line((spine, top, spine, bottom), fill=ink)
        facts = ("cover", self.cover)
        page.canvas.mark((left, top, left + width, bottom), seen=(self.cover,), facts=facts)
        heights = sorted(rng.sample((0.14, 0.32, 0.5, 0.68, 0.86), 2))
        lines = [
            (self.title, ("title", self.title), 1.35, heights[0]),
            (self.author, ("author", self.author), 1.0, heights[1]),
        ]
        if self.year:
            lines.append((self.year, ("year", self.year), 0.95, rng.choice([at for at in (0.14, 0.32, 0.5, 0.68, 0.86) if at not in heights])))  # fmt: skip
        if rng.random() < 0.3:
            lines[1] = (f"by {self.author}", *lines[1][1:])
        align = rng.choice((0.5, 0.5, 0.12))
        for text, fact, scale, at in lines:
            wanted = round(page.unit * scale * rng.choice((10, 11, 12, 14)))
            size = min(fitting([text], 0.84 * width, page, wanted), round(0.17 * (bottom - top)))
            x = left + (0.5 * width if align == 0.5 else 0.1 * width)
            y = top + at * (bottom - top)
            page.canvas.write(x, y, text, page.face, size, ink, align=0.5 if align == 0.5 else 0.0, facts=fact)
        return self.finished(page.canvas, look, rng)


# What a field of a form may hold.
_FIELD_VALUES = {
    "Name": lexicon.NAMES,
    "City": lexicon.CITIES,
    "Age": tuple(str(age) for age in range(18, 100)),
    "Sport": lexicon.SPORTS,
    "Pet": lexicon.ANIMALS,
    "Country": lexicon.COUNTRIES,
    "Room": tuple(str(room) for room in range(1, 100)),
    "Seat": tuple(str(seat) for seat in range(1, 100)),
    "Day": lexicon.DAYS,
    "Month": lexicon.MONTHS,
}


@dataclass(frozen=True)
class Form(Figure):
    """Fields as (name, value), a form or a card filled in."""

    fields: tuple[tuple[str, str], ...]

    domain: ClassVar[str] = "documents"
    kind: ClassVar[str] = "form"

    @classmethod
    def sample(cls, rng: Random) -> Self:
        names = rng.sample(lexicon.FIELDS, rng.choice((2, 3, 3, 4, 5)))
        return cls(tuple((name, rng.choice(_FIELD_VALUES[name])) for name in names))

    @property
    def facts(self) -> tuple[Fact, ...]:
        return self.fields

    @property
    def held_out(self) -> bool:
        names = {name for name, _ in self.fields}
        return any(set(pair) <= names for pair in lexicon.HELD_OUT_FIELDS)

    def questions(self, rng: Random) -> list[Question]:
        name, value = rng.choice(self.fields)
        other = rng.choice(_FIELD_VALUES[name]) if rng.random() < 0.5 else value
        present = dict(self.fields)
        missing = rng.choice([field for field in lexicon.FIELDS if field not in present])
        wordings = ("What is the {a}?", "What does the form say for {a}?")
        asked = [
            Question("text", phrase(rng, *wordings).format(a=name), value, (f"{name} {value}",)),
            Question("yes_no", phrase(rng, f"Is the {name} {other}?", f"Does the form say {other} for {name}?"), "yes" if other == value else "no", (f"{name} {value}", verdict(other, value))),
            unanswerable(phrase(rng, *wordings).format(a=missing), missing),
        ]  # fmt: skip
        if list(present.values()).count(value) == 1:
            asked.append(Question("label", f"Which field says {value}?", name, (f"{value} {name}",)))
        return asked

    def paint(self, look: Look, rng: Random) -> Drawn:
        page = blank(look, rng)
        left, top, right, bottom = _sheet(page, rng)
        layout = rng.choice(("colon", "colon", "columns", "boxes"))
        colon = ":" if layout == "colon" or rng.random() < 0.4 else ""
        pitch = (bottom - top) / len(self.fields)
        size = min(round(page.unit * rng.choice((10, 11, 12, 14))), round(0.8 * pitch))
        names, values = [name + colon for name, _ in self.fields], [value for _, value in self.fields]
        size = fitting(
            [f"{name}  {value}" for name, value in zip(names, values, strict=True)], right - left, page, size
        )
        pitch = min(pitch, size * rng.uniform(1.4, 2.6))
        widest = max(text_width(f"{name} ", page.face, size) for name in names)
        room = right - left - widest - max(text_width(value, page.face, size) for value in values)
        column = left + widest + max(0.0, room) * rng.uniform(0, 0.8)
        tone: RGB = (120, 120, 120)
        y = top + pitch / 2
        for name, value in self.fields:
            fact = (name, value)
            box = page.canvas.write(left, y, name + colon, page.face, size, page.ink, facts=fact)
            x = box[2] + 0.4 * size if layout == "colon" else column
            if layout == "boxes":
                page.canvas.pen.rectangle((x - 3, y - 0.6 * size, right, y + 0.62 * size), outline=tone)
            page.canvas.write(x, y, value, page.face, size, page.ink, facts=fact)
            page.canvas.mark((left, y - 0.3 * size, x, y + 0.3 * size), facts=fact)
            y += pitch
        return self.finished(page.canvas, look, rng)

"""Scenes: one to six coloured objects anywhere. Mirrors COCO-QA's question types, and asks how objects stand."""

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

from siq_vl.data.figures.figure import Fact, Question, phrase, verdict
from siq_vl.data.world.canvas import RGB, Canvas, Drawn
from siq_vl.data.world.figure import Figure, Look, blank, contrast, shade, unanswerable
from siq_vl.data.world.lexicon import COLORS, HELD_OUT_OBJECTS, OBJECTS, PLACES
from siq_vl.data.world.shapes import paint

_NEIGHBOURS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (rows, columns)


def _neighbour(place: str, relation: str) -> str | None:
    """Return the place next to `place` in that direction, None outside the picture."""
    row, column = divmod(PLACES.index(place), 3)
    down, right = _NEIGHBOURS[relation]
    if 0 <= row + down < 3 and 0 <= column + right < 3:
        return PLACES[3 * (row + down) + column + right]
    return None


@dataclass(frozen=True)
class Scene(Figure):
    """Objects as (object, color, place), in reading order; objects and places are distinct, colours may repeat."""

    objects: tuple[tuple[str, str, str], ...]

    domain: ClassVar[str] = "scenes"
    kind: ClassVar[str] = "scene"
    gray: ClassVar[bool] = False

    @classmethod
    def sample(cls, rng: Random) -> Self:
        count = rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))
        names = rng.sample(OBJECTS, count)
        colors = rng.sample(tuple(COLORS), min(count, 3))
        places = sorted(rng.sample(range(9), count))
        return cls(tuple((name, rng.choice(colors), PLACES[place]) for name, place in zip(names, places, strict=True)))

    @property
    def facts(self) -> tuple[Fact, ...]:
        # The object between its place and its color: each of the three stands next to what is asked about it.
        return tuple((place, name, color) for name, color, place in self.objects)

    @property
    def held_out(self) -> bool:
        return any((color, name) in HELD_OUT_OBJECTS for name, color, _ in self.objects)

    def paint(self, look: Look, rng: Random) -> Drawn:
        background = _background(rng, [color for _, color, _ in self.objects])
        page = blank(look, rng, background=background)
        canvas = page.canvas
        _scenery(canvas, rng)
        width, height = canvas.image.size
        painted = []
        for name, color, place in self.objects:
            row, column = divmod(PLACES.index(place), 3)
            # The middle of the object stays clear of the thirds' borders, so its place is beyond doubt.
            x = width * (column + rng.uniform(0.27, 0.73)) / 3
            y = height * (row + rng.uniform(0.27, 0.73)) / 3
            radius = min(width, height) * rng.uniform(0.09, 0.17)
            x, y = min(max(x, radius), width - radius), min(max(y, radius), height - radius)
            painted.append((name, color, place, x, y, radius))
        rng.shuffle(painted)  # who overlaps whom
        for name, color, place, x, y, radius in painted:
            fill = shade(color, rng)
            line = rng.choice((0, 1, 1, 2)) if contrast(fill, background) > 120 else 2
            paint(canvas.pen, name, x, y, radius, fill, page.ink, background, round(line * page.unit))
            box = (x - radius, y - radius, x + radius, y + radius)
            canvas.mark(box, seen=(name, color), facts=(place, name, color))
        return self.finished(canvas, look, rng)

    def questions(self, rng: Random) -> list[Question]:
        name, color, place = rng.choice(self.objects)
        asked = [
            Question("color", phrase(rng, f"What color is the {name}?", f"Which color does the {name} have?"), color, (f"{name} {color}",)),
            Question("location", phrase(rng, f"Where is the {name}?", f"In which place is the {name}?"), place, (f"{name} {place}",)),
            self._count_all(rng),
            self._count_color(rng),
            self._exists(rng),
            self._absent(rng),
        ]  # fmt: skip
        if sum(other == color for _, other, _ in self.objects) == 1:
            text = phrase(rng, f"Which object is {color}?", f"What is {color}?")
            asked.append(Question("object", text, name, (f"{color} {name}",)))
        if len(self.objects) > 1:
            asked += [self._same_color(rng), self._compare_places(rng)]
        asked += self._relations(rng)
        return asked

    def _absent(self, rng: Random) -> Question:
        present = {name for name, _, _ in self.objects}
        name = rng.choice([other for other in OBJECTS if other not in present])
        return unanswerable(phrase(rng, f"What color is the {name}?", f"Where is the {name}?"), name)

    def _count_all(self, rng: Random) -> Question:
        listed = ", ".join(f"{number} {name}" for number, (name, _, _) in enumerate(self.objects, 1))
        text = phrase(rng, "How many objects are there?", "What is the number of objects?")
        return Question("number", text, str(len(self.objects)), (listed,), multi_step=True)

    def _count_color(self, rng: Random) -> Question:
        # Mostly a colour of the scene, the commonest half of the time, so that the answer is not nearly always 1.
        colors = [color for _, color, _ in self.objects]
        color = Counter(colors).most_common(1)[0][0] if rng.random() < 0.5 else rng.choice(colors)
        if rng.random() < 0.15:
            color = rng.choice([absent for absent in COLORS if absent not in colors])
        named = [name for name, other, _ in self.objects if other == color]
        step = ", ".join(f"{number} {name} {color}" for number, name in enumerate(named, 1)) or f"no {color}"
        text = phrase(rng, f"How many objects are {color}?", f"What is the number of {color} objects?")
        return Question("number", text, str(len(named)), (step,), multi_step=True)

    def _exists(self, rng: Random) -> Question:
        colors = {name: color for name, color, _ in self.objects}
        name = rng.choice(tuple(colors)) if rng.random() < 0.8 else rng.choice(OBJECTS)
        color = colors[name] if name in colors and rng.random() < 0.6 else rng.choice(tuple(COLORS))
        steps = (f"{name} {colors[name]}", verdict(color, colors[name])) if name in colors else (f"no {name}",)
        article = "an" if color[0] in "aeiou" else "a"
        text = phrase(rng, f"Is there {article} {color} {name}?", f"Does the picture show {article} {color} {name}?")
        return Question("yes_no", text, "yes" if colors.get(name) == color else "no", steps)

    def _same_color(self, rng: Random) -> Question:
        (a, color_a, _), (b, color_b, _) = rng.sample(self.objects, 2)
        answer = "yes" if color_a == color_b else "no"
        text = phrase(rng, f"Do the {a} and the {b} have the same color?", f"Are the {a} and the {b} of one color?")
        steps = (f"{a} {color_a}", f"{b} {color_b}", verdict(color_a, color_b))
        return Question("same_color", text, answer, steps, multi_step=True)

    def _compare_places(self, rng: Random) -> Question:
        """Ask whether one object stands further to the left, or higher, than another."""
        (a, _, place_a), (b, _, place_b) = rng.sample(self.objects, 2)
        (row_a, column_a), (row_b, column_b) = (divmod(PLACES.index(place), 3) for place in (place_a, place_b))
        if column_a != column_b and (row_a == row_b or rng.random() < 0.5):
            text, answer = f"Is the {a} further left than the {b}?", column_a < column_b
        else:
            text, answer = f"Is the {a} higher up than the {b}?", row_a < row_b
        steps = (f"{a} {place_a}", f"{b} {place_b}")
        return Question("relation", text, "yes" if answer else "no", steps, multi_step=True)

    def _relations(self, rng: Random) -> list[Question]:
        """Ask what stands next to an object, where there is something."""
        at = {place: (name, color) for name, color, place in self.objects}
        pairs = []
        for relation in _NEIGHBOURS:
            for anchor in at:
                place = _neighbour(anchor, relation)
                if place in at:
                    pairs.append((relation, anchor, place))
        if not pairs:
            return []
        relation, anchor, place = rng.choice(pairs)
        anchor_name, (name, color) = at[anchor][0], at[place]
        steps = (f"{anchor_name} {anchor}", f"{relation} {place}", f"{place} {name}")
        if rng.random() < 0.5:
            return [
                Question("object", f"What is next to the {anchor_name}, {relation} it?", name, steps, multi_step=True)
            ]
        text = f"What color is the object next to the {anchor_name}, {relation} it?"
        return [Question("color", text, color, (*steps, f"{name} {color}"), multi_step=True)]


def _background(rng: Random, colors: list[str]) -> RGB:
    """Return a background that none of the colours vanishes in."""
    while True:
        background = rng.choice(((246, 246, 240), (226, 240, 250), (232, 246, 228), (250, 240, 224), (240, 232, 246), (196, 214, 232), (205, 222, 190), (60, 66, 80)))  # fmt: skip
        if all(contrast(background, COLORS[color]) > 90 for color in colors) or rng.random() < 0.1:
            return background


def _scenery(canvas: Canvas, rng: Random) -> None:
    """Lay a horizon, a gradient or stripes over the background, in tones near its own; or nothing."""
    width, height = canvas.image.size
    kind = rng.choice(("plain", "plain", "horizon", "gradient", "stripes"))
    if kind == "plain":
        return
    step = {"horizon": height, "gradient": 4, "stripes": 2 * rng.randint(3, 8)}[kind]
    tone = rng.choice((-1, 1)) * rng.randint(6, 22)
    for top in range(rng.randint(height // 3, height * 2 // 3) if kind == "horizon" else 0, height, step):
        amount = round(tone * top / height) if kind == "gradient" else tone
        fill = tuple(min(255, max(0, channel + amount)) for channel in canvas.background)
        bottom = top + (step // 2 if kind == "stripes" else step)
        canvas.pen.rectangle((0, top, width, bottom), fill=fill)

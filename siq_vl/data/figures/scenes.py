"""Scenes: one to four coloured objects, each in its own quarter. Mirrors COCO-QA's four question types."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

from PIL import Image

from siq_vl.data.figures.drawing import OBJECT_PAINTERS, canvas, shade
from siq_vl.data.figures.figure import Fact, Figure, Question, phrase, verdict
from siq_vl.data.figures.lexicon import COLORS, HELD_OUT_OBJECTS, OBJECTS, PLACES

_BACKGROUNDS = ((246, 246, 240), (226, 240, 250), (232, 246, 228), (250, 240, 224), (240, 232, 246))
_NEIGHBOURS = {
    "left of": {"top-right": "top-left", "bottom-right": "bottom-left"},
    "right of": {"top-left": "top-right", "bottom-left": "bottom-right"},
    "above": {"bottom-left": "top-left", "bottom-right": "top-right"},
    "below": {"top-left": "bottom-left", "top-right": "bottom-right"},
}


@dataclass(frozen=True)
class Scene(Figure):
    """Objects as (object, color, place); objects are distinct, colours may repeat."""

    objects: tuple[tuple[str, str, str], ...]

    domain: ClassVar[str] = "scenes"
    kind: ClassVar[str] = "scene"

    @classmethod
    def sample(cls, rng: Random) -> Self:
        count = rng.choice((1, 2, 3, 3, 4, 4))
        places = sorted(rng.sample(range(4), count))
        names = rng.sample(OBJECTS, count)
        palette = rng.sample(tuple(COLORS), 3)
        objects = []
        for name, place in zip(names, places, strict=True):
            objects.append((name, rng.choice(palette), PLACES[place]))
        return cls(tuple(objects))

    @property
    def facts(self) -> tuple[Fact, ...]:
        # The object between its place and its color: each of the three stands next to what is asked about it.
        return tuple((place, name, color) for name, color, place in self.objects)

    @property
    def content(self) -> str:
        return f"{self.kind}: " + ", ".join(" ".join(described) for described in self.objects)

    @property
    def held_out(self) -> bool:
        return any((color, name) in HELD_OUT_OBJECTS for name, color, _ in self.objects)

    def cells(self) -> dict[tuple[int, int], Fact]:
        found = {}
        for fact in self.facts:
            # A quarter is two cells wide and two high; the object reaches into all four.
            row, column = divmod(PLACES.index(fact[0]), 2)
            for dy in (0, 1):
                for dx in (0, 1):
                    found[2 * row + dy, 2 * column + dx] = fact
        return found

    def draw(self, rng: Random) -> Image.Image:
        image, pen = canvas(rng.choice(_BACKGROUNDS))
        for name, color, place in self.objects:
            row, column = divmod(PLACES.index(place), 2)
            x, y = 24 + 48 * column + rng.randint(-3, 3), 24 + 48 * row + rng.randint(-3, 3)
            OBJECT_PAINTERS[name](pen, x, y, rng.randint(16, 20), shade(color, rng))
        return image

    def questions(self, rng: Random) -> list[Question]:
        name, color, place = rng.choice(self.objects)
        asked = [
            Question("color", phrase(rng, f"What color is the {name}?", f"Which color does the {name} have?"), color, (f"{name} {color}",)),
            Question("location", phrase(rng, f"Where is the {name}?", f"In which place is the {name}?"), place, (f"{name} {place}",)),
            Question("object", phrase(rng, f"What is {place}?", f"Which object is {place}?"), name, (f"{place} {name}",)),
            self._count_all(rng),
            self._count_color(rng),
            self._exists(rng),
        ]  # fmt: skip
        if [other for _, other, _ in self.objects].count(color) == 1:  # otherwise the question has two answers
            text = phrase(rng, f"Which object is {color}?", f"What is {color}?")
            asked.append(Question("object", text, name, (f"{color} {name}",)))
        asked.extend(self._relations(rng))
        if len(self.objects) > 1:
            asked.append(self._same_color(rng))
        return asked

    def _count_all(self, rng: Random) -> Question:
        # The step counts aloud: a number alone would have to be seen at a glance.
        listed = ", ".join(f"{number} {name}" for number, (name, _, _) in enumerate(self.objects, 1))
        text = phrase(rng, "How many objects are there?", "What is the number of objects?")
        return Question("number", text, str(len(self.objects)), (listed,), multi_step=True)

    def _count_color(self, rng: Random) -> Question:
        # Mostly a colour of the scene, the commonest half of the time, so that the answer is not nearly always 1.
        colors = [color for _, color, _ in self.objects]
        color = max(colors, key=colors.count) if rng.random() < 0.5 else rng.choice(colors)
        if rng.random() < 0.15:
            color = rng.choice([absent for absent in COLORS if absent not in colors])
        counted: list[str] = []
        for name, other, _ in self.objects:
            if other == color:
                counted.append(f"{len(counted) + 1} {name} {color}")
        step = ", ".join(counted) or f"no {color}"
        text = phrase(rng, f"How many objects are {color}?", f"What is the number of {color} objects?")
        return Question("number", text, str(len(counted)), (step,), multi_step=True)

    def _exists(self, rng: Random) -> Question:
        colors = {name: color for name, color, _ in self.objects}
        # Mostly an object of the scene, and mostly in its own colour, so that both answers are common.
        name = rng.choice(tuple(colors)) if rng.random() < 0.8 else rng.choice(OBJECTS)
        color = colors[name] if name in colors and rng.random() < 0.6 else rng.choice(tuple(COLORS))
        if name in colors:
            steps: tuple[str, ...] = (f"{name} {colors[name]}", verdict(color, colors[name]))
        else:
            steps = (f"no {name}",)
        article = "an" if color[0] in "aeiou" else "a"
        text = phrase(rng, f"Is there {article} {color} {name}?", f"Does the picture show {article} {color} {name}?")
        answer = "yes" if colors.get(name) == color else "no"
        return Question("yes_no", text, answer, steps)

    def _same_color(self, rng: Random) -> Question:
        (a, color_a, _), (b, color_b, _) = rng.sample(self.objects, 2)
        answer = "yes" if color_a == color_b else "no"
        text = phrase(rng, f"Do the {a} and the {b} have the same color?", f"Are the {a} and the {b} of one color?")
        steps = (f"{a} {color_a}", f"{b} {color_b}", verdict(color_a, color_b))
        return Question("same_color", text, answer, steps, multi_step=True)

    def _relations(self, rng: Random) -> list[Question]:
        at = {place: (name, color) for name, color, place in self.objects}
        # Every two objects of which one is next to the other.
        pairs = []
        for relation, neighbours in _NEIGHBOURS.items():
            for anchor in at:
                if neighbours.get(anchor) in at:
                    pairs.append((relation, anchor, neighbours[anchor]))
        if not pairs:
            return []
        relation, anchor, place = rng.choice(pairs)
        anchor_name, (name, color) = at[anchor][0], at[place]
        steps = (f"{anchor_name} {anchor}", f"{relation} {place}", f"{place} {name}")
        if rng.random() < 0.5:
            return [Question("object", f"What is {relation} the {anchor_name}?", name, steps, multi_step=True)]
        text = f"What color is the object {relation} the {anchor_name}?"
        return [Question("color", text, color, (*steps, f"{name} {color}"), multi_step=True)]

"""Charts: columns, rows, lines, pies and stacks over labels of many sorts. Mirrors ChartQA's questions."""

from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, Self

from siq_vl.data.figures.figure import Fact, Question, compare_and_add, phrase, total
from siq_vl.data.world import lexicon
from siq_vl.data.world.canvas import Canvas, Drawn, finish
from siq_vl.data.world.chart_drawing import draw_bars, draw_line, draw_pie, draw_stack
from siq_vl.data.world.figure import Figure, Look, unanswerable
from siq_vl.data.world.plots import plot

# What the labels of a chart are: a kind of thing in an order of its own, or in any order.
SERIES = {
    "months": lexicon.MONTHS,
    "days": lexicon.DAYS,
    "years": lexicon.YEARS,
    "names": lexicon.NAMES,
    "cities": lexicon.CITIES,
    "countries": lexicon.COUNTRIES,
    "items": lexicon.ITEMS,
    "animals": lexicon.ANIMALS,
    "sports": lexicon.SPORTS,
    "vehicles": lexicon.VEHICLES,
    "colors": tuple(color for color in lexicon.COLORS if color != "white"),
}
_ORDERED = ("months", "days", "years")
TOPS = (10, 20, 20, 50, 100)  # where a value axis ends
_MATPLOTLIB_SHARE = 0.03  # of the charts in the look of training; matplotlib takes thirty times as long
_WORDINGS = {
    "value": ("What is the value of {a}?", "What value does {a} have?", "How much is {a}?"),
    "label": ("Which one has the value {x}?", "Which one is at {x}?"),
    "compare": ("Which is higher, {a} or {b}?", "Which has more, {a} or {b}?"),
    "yes_no": ("Is {a} higher than {b}?", "Does {a} have more than {b}?"),
    "difference": ("What is the difference between {a} and {b}?", "How far apart are {a} and {b}?"),
    "sum": ("What is the sum of {a} and {b}?", "How much are {a} and {b} together?"),
    "maximum": ("Which is the highest?", "Which one has the most?"),
    "minimum": ("Which is the lowest?", "Which one has the least?"),
}


@dataclass(frozen=True)
class Chart(Figure):
    """Entries as (label, value), labels and values distinct.

    Attributes:
        about: key of `SERIES`, what the labels are.
        entries: in the order drawn.
        top: where the value axis ends, at least the largest value.
        printed: whether the values are printed; else they are read off the axis, and are multiples of a twentieth of
            `top`.
        title: a word above the chart, or none.
    """

    about: str
    entries: tuple[tuple[str, int], ...]
    top: int
    printed: bool
    title: str

    domain: ClassVar[str] = "charts"
    most: ClassVar[int] = 6  # entries
    room: ClassVar[int] = 26  # characters that all labels together may have
    always_printed: ClassVar[bool] = False

    @classmethod
    def sample(cls, rng: Random) -> Self:
        about = rng.choice(tuple(SERIES))
        top = rng.choice(TOPS)
        printed = cls.always_printed or rng.random() < 0.75
        step = 1 if printed else max(1, top // 20)
        while True:
            count = rng.choice((2, 3, 3, 4, 4, 5, 6))
            if count > cls.most or count > top // step:
                continue
            labels = rng.sample(SERIES[about], count)
            if about in _ORDERED:
                labels.sort(key=SERIES[about].index)
            if sum(max(3, len(label)) for label in labels) <= cls.room:
                break
        values = rng.sample(range(step, top + 1, step), count)
        title = rng.choice(lexicon.TITLES) if rng.random() < 0.4 else ""
        return cls(about, tuple(zip(labels, values, strict=True)), top, printed, title)

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple((label, str(value)) for label, value in self.entries)

    @property
    def held_out(self) -> bool:
        return (self.about, len(self.entries)) in lexicon.HELD_OUT_SERIES

    @property
    def hard(self) -> bool:
        return not self.printed

    def questions(self, rng: Random) -> list[Question]:
        asked = compare_and_add(rng, self.entries, _WORDINGS)
        if len(self.entries) > 2:
            asked.append(
                total(self.entries, phrase(rng, "What is the sum of all values?", "How much is everything together?"))
            )
        present = {label for label, _ in self.entries}
        missing = rng.choice([label for label in SERIES[self.about] if label not in present])
        asked.append(unanswerable(phrase(rng, *_WORDINGS["value"]).format(a=missing), missing))
        if self.title:
            asked.append(Question("text", phrase(rng, "What is the title?", "What is the chart about?"), self.title, (f"title {self.title}",)))  # fmt: skip
        return asked

    @property
    def caption(self) -> str:
        listed = super().caption
        return f"{listed}, title {self.title}" if self.title else listed

    def paint(self, look: Look, rng: Random) -> Drawn:
        by_matplotlib = look.charts.startswith("matplotlib")
        if by_matplotlib or (look.charts == "own" and not look.large and rng.random() < _MATPLOTLIB_SHARE):
            drawn, background = plot(self, look, rng)
            return finish(drawn, rng, background) if look.finished else drawn
        return self.finished(self._draw(look, rng), look, rng)

    def _draw(self, look: Look, rng: Random) -> Canvas:
        raise NotImplementedError


class ColumnChart(Chart):
    """Vertical bars, a label under each."""

    kind: ClassVar[str] = "columns"
    room: ClassVar[int] = 16

    def _draw(self, look: Look, rng: Random) -> Canvas:
        return draw_bars(self.entries, self.top, self.printed, self.title, look, rng, upright=True)


class RowChart(Chart):
    """Horizontal bars, a label left of each."""

    kind: ClassVar[str] = "rows"
    room: ClassVar[int] = 36

    def _draw(self, look: Look, rng: Random) -> Canvas:
        return draw_bars(self.entries, self.top, self.printed, self.title, look, rng, upright=False)


class LineChart(Chart):
    """Points joined by a line, a label under each."""

    kind: ClassVar[str] = "line"
    room: ClassVar[int] = 16

    def _draw(self, look: Look, rng: Random) -> Canvas:
        return draw_line(self.entries, self.top, self.printed, self.title, look, rng)


class PieChart(Chart):
    """Slices, each with its label and its value beside it, in it or in a legend."""

    kind: ClassVar[str] = "pie"
    most: ClassVar[int] = 5
    room: ClassVar[int] = 24
    always_printed: ClassVar[bool] = True

    @classmethod
    def sample(cls, rng: Random) -> Self:
        drawn = super().sample(rng)
        if rng.random() < 0.5:
            return drawn
        # Shares of a hundred: the parts between cuts, drawn again until they differ.
        while True:
            cuts = sorted(rng.sample(range(3, 98), len(drawn.entries) - 1))
            parts = [right - left for left, right in zip([0, *cuts], [*cuts, 100], strict=True)]
            if len(set(parts)) == len(parts):
                entries = tuple((label, part) for (label, _), part in zip(drawn.entries, parts, strict=True))
                return replace(drawn, entries=entries, top=100)

    def _draw(self, look: Look, rng: Random) -> Canvas:
        return draw_pie(self.entries, self.title, look, rng)


@dataclass(frozen=True)
class StackedChart(Figure):
    """Two or three columns of two parts each, told apart by a legend. Part of the hard row.

    Attributes:
        columns: labels under the columns.
        parts: names of the lower and of the upper part.
        values: for each column the two values.
        top: where the value axis ends.
    """

    columns: tuple[str, ...]
    parts: tuple[str, str]
    values: tuple[tuple[int, int], ...]
    top: int

    domain: ClassVar[str] = "charts"
    kind: ClassVar[str] = "stack"

    @classmethod
    def sample(cls, rng: Random) -> Self:
        about = rng.choice(_ORDERED)
        labels = sorted(rng.sample(SERIES[about], rng.choice((2, 2, 3))), key=SERIES[about].index)
        first, second = rng.sample(lexicon.ITEMS, 2)
        top = rng.choice((20, 40, 100))
        values = tuple((rng.randint(top // 5, top // 2), rng.randint(top // 5, top // 2)) for _ in labels)
        return cls(tuple(labels), (first, second), values, top)

    @property
    def facts(self) -> tuple[Fact, ...]:
        found = []
        for column, values in zip(self.columns, self.values, strict=True):
            for part, value in zip(self.parts, values, strict=True):
                found.append((column, part, str(value)))
        return tuple(found)

    @property
    def hard(self) -> bool:
        return True

    def questions(self, rng: Random) -> list[Question]:
        index = rng.randrange(len(self.columns))
        column, (low, high) = self.columns[index], self.values[index]
        part = rng.randrange(2)
        name, value = self.parts[part], self.values[index][part]
        read = f"{column} {self.parts[0]} {low}, {column} {self.parts[1]} {high}"
        missing = rng.choice([item for item in lexicon.ITEMS if item not in self.parts])
        more = self.parts[0] if low > high else self.parts[1]
        asked = [
            Question("value", phrase(rng, f"What is the value of {name} in {column}?", f"How much {name} is in {column}?"), str(value), (f"{column} {name} {value}",)),
            Question("sum", f"How much is {column} in all?", str(low + high), (read, f"{low} + {high} = {low + high}"), multi_step=True),
            unanswerable(f"What is the value of {missing} in {column}?", missing),
        ]  # fmt: skip
        if low != high:
            order = f"{low} {'>' if low > high else '<'} {high}"
            asked.append(Question("compare", f"Which has more in {column}?", more, (read, order), multi_step=True))
        return asked

    def paint(self, look: Look, rng: Random) -> Drawn:
        canvas = draw_stack(self.columns, self.parts, self.values, self.top, look, rng)
        return self.finished(canvas, look, rng)

"""What a drawn figure is: its facts, the caption that states them, and the questions they answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

from PIL import Image

Fact = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about a figure, with its exact answer and the reasoning that leads there.

    Attributes:
        type: what is asked (`"color"`, `"sum"`, ...), the unit of the evaluation's finest table.
        text: the question as put to the model.
        answer: the gold answer, one or two words.
        steps: the reasoning, one look-up or calculation a step; a look-up is what is known, then what is found.
        multi_step: whether more than one look-up, or any arithmetic, is needed.
        hard: whether the question belongs to the reported-only hard row.
    """

    type: str
    text: str
    answer: str
    steps: tuple[str, ...]
    multi_step: bool = False
    hard: bool = False


@dataclass(frozen=True)
class Figure(ABC):
    """A figure's content, from which the picture and every text follow."""

    domain: ClassVar[str]
    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def sample(cls, rng: Random) -> Self:
        """Draw the content at random."""

    @property
    @abstractmethod
    def facts(self) -> tuple[Fact, ...]:
        """The facts in reading order, each a tuple of words: the key right before its value."""

    @property
    @abstractmethod
    def held_out(self) -> bool:
        """Whether the content holds a combination that no training picture shows."""

    @abstractmethod
    def questions(self, rng: Random) -> list[Question]:
        """Return one question of every type that this content can answer."""

    @abstractmethod
    def draw(self, rng: Random) -> Image.Image:
        """Return the picture, `drawing.SIZE` pixels square; `rng` moves and tints, it changes no fact."""

    @abstractmethod
    def cells(self) -> dict[tuple[int, int], Fact]:
        """Map (row, column) of `drawing.CELL`-pixel cells to the fact that can be read there."""

    @property
    def hard(self) -> bool:
        """Whether the figure belongs to the reported-only hard row."""
        return False

    @property
    def caption(self) -> str:
        """The dense caption: every fact, in reading order."""
        return f"{self.kind}: " + ", ".join(" ".join(fact) for fact in self.facts)

    @property
    def content(self) -> str:
        """What the picture shows, as the text whose checksum decides its split; never reworded, unlike the caption."""
        return self.caption


def phrase(rng: Random, *wordings: str) -> str:
    """Return one of several wordings of the same question."""
    return rng.choice(wordings)


def verdict(a: str, b: str) -> str:
    """Return the step that holds two words against each other."""
    if a == b:
        return f"{a} {b} same"
    return f"{a} {b} different"


def compare_and_add(
    rng: Random, entries: tuple[tuple[str, int], ...], wordings: Mapping[str, tuple[str, ...]]
) -> list[Question]:
    """Return the questions that any list of (label, value) pairs answers, in a domain's own wordings.

    Args:
        rng: picks the entries asked about and the wording.
        entries: two or more (label, value) pairs with distinct labels and distinct values.
        wordings: for each of `value`, `label`, `compare`, `yes_no`, `difference`, `sum`, `maximum` and `minimum` some
            sentences, in which `{a}` and `{b}` stand for labels; for `label` too, in which `{x}` stands for a value.
    """
    (a, x), (b, y) = rng.sample(entries, 2)
    read = (f"{a} {x}", f"{b} {y}")
    # As asked, the first before the second: the sign alone decides the answer.
    sign, greater, first_is_greater = "<", b, "no"
    if x > y:
        sign, greater, first_is_greater = ">", a, "yes"
    order = f"{x} {sign} {y}"
    high, low = max(x, y), min(x, y)

    def ask(kind: str) -> str:
        return phrase(rng, *wordings[kind]).format(a=a, b=b, x=x)

    return [
        Question("value", ask("value"), str(x), (f"{a} {x}",)),
        Question("label", ask("label"), a, (f"{x} {a}",)),
        Question("compare", ask("compare"), greater, (*read, order), multi_step=True),
        Question("yes_no", ask("yes_no"), first_is_greater, (*read, order), multi_step=True),
        Question("difference", ask("difference"), str(high - low), (*read, f"{high} - {low} = {high - low}"), multi_step=True),
        Question("sum", ask("sum"), str(x + y), (*read, f"{x} + {y} = {x + y}"), multi_step=True),
        _extreme("maximum", ask("maximum"), entries, max),
        _extreme("minimum", ask("minimum"), entries, min),
    ]  # fmt: skip


def _extreme(type: str, text: str, entries: tuple[tuple[str, int], ...], choose: Callable) -> Question:
    """Return the question for the largest or smallest value: each value is read, and what that makes the best so far."""
    answer, best = entries[0]
    read = [f"{answer} {best}"]
    for label, value in entries[1:]:
        if choose(value, best) == value:
            answer, best = label, value
        read.append(f"{label} {value} so {best}")
    return Question(type, text, answer, (", ".join(read), f"{best} {answer}"), multi_step=True)


def total(entries: tuple[tuple[str, int], ...], text: str) -> Question:
    """Return the question for the sum of three or more values, part of the hard row."""
    everything = ", ".join(f"{label} {value}" for label, value in entries)
    running, steps = entries[0][1], [everything]
    for _, value in entries[1:]:
        steps.append(f"{running} + {value} = {running + value}")
        running += value
    return Question("total", text, str(running), tuple(steps), multi_step=True, hard=True)

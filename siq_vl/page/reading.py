"""An output taken apart for reading: the steps of its reasoning, their clauses, and the answer, each with its place."""

import re
from dataclasses import dataclass

from siq_vl.evaluation.answers import TAGS, parse

_STEP = re.compile(r"(?<=[.!?])\s+|\n+")
_CLAUSE = re.compile(r"(?<=[,;:])\s+")
_NUMBERING = re.compile(r"(?:\(?\d{1,2}[.)]|[-*•])")


@dataclass(frozen=True)
class Part:
    """A piece of a text and the place of its characters in it."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Pieces:
    """An output's reasoning, step by step and clause by clause, and its answer, where there is one yet."""

    steps: tuple[tuple[Part, ...], ...]
    answer: Part | None


def take_apart(text: str) -> Pieces:
    """Take an output apart, finished or still growing; a tag that has only begun is left out."""
    text = _without_begun_tag(text)
    parsed = parse(text)
    steps: tuple[tuple[Part, ...], ...] = ()
    answer = None
    if parsed.rationale:
        start = text.index(parsed.rationale)
        steps = tuple(tuple(_split(_CLAUSE, step)) for step in _numbered(_split(_STEP, Part(parsed.rationale, start))))
    if parsed.answer:
        answer = Part(parsed.answer, text.index(parsed.answer, max(text.find("<answer>"), 0)))
    return Pieces(steps, answer)


def _without_begun_tag(text: str) -> str:
    for length in range(max(map(len, TAGS)) - 1, 0, -1):
        if any(tag.startswith(text[-length:]) for tag in TAGS) and len(text) >= length:
            return text[:-length]
    return text


def _split(where: re.Pattern, part: Part) -> list[Part]:
    cuts = [0, *(position for found in where.finditer(part.text) for position in found.span()), len(part.text)]
    return [Part(part.text[a:b], part.start + a) for a, b in zip(cuts[::2], cuts[1::2], strict=True) if b > a]


def _numbered(steps: list[Part]) -> list[Part]:
    """Leave out numbers and dashes that stood before steps: the page numbers them itself."""
    return [step for step in steps if not _NUMBERING.fullmatch(step.text)]

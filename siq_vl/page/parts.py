"""An output taken apart for reading: the steps of its reasoning, their clauses, and the answer, each with its place."""

import re
from dataclasses import dataclass

from siq_vl.parsing.answers import TAGS, parse

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
        for step in _without_numbering(_split(_STEP, Part(parsed.rationale, start))):
            steps = (*steps, tuple(_split(_CLAUSE, step)))
    if parsed.answer:
        answer = Part(parsed.answer, text.index(parsed.answer, max(text.find("<answer>"), 0)))
    return Pieces(steps, answer)


def _without_begun_tag(text: str) -> str:
    """Cut off the end of a text that may be the beginning of a tag."""
    for length in range(max(map(len, TAGS)) - 1, 0, -1):
        if any(tag.startswith(text[-length:]) for tag in TAGS) and len(text) >= length:
            return text[:-length]
    return text


def _split(where: re.Pattern, part: Part) -> list[Part]:
    """Return what lies between the matches of a pattern, each piece with its place; empty pieces are left out."""
    pieces = []
    begin = 0
    for separator in where.finditer(part.text):
        pieces.append(Part(part.text[begin : separator.start()], part.start + begin))
        begin = separator.end()
    pieces.append(Part(part.text[begin:], part.start + begin))
    return [piece for piece in pieces if piece.text]


def _without_numbering(steps: list[Part]) -> list[Part]:
    """Leave out numbers and dashes that stood before steps: the page numbers them itself."""
    return [step for step in steps if not _NUMBERING.fullmatch(step.text)]

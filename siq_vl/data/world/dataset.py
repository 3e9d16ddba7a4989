"""Samples of the drawn world by split and index.

Splits are disjoint by *content*: the facts that a figure states, in any order and however drawn, fall by their checksum
to one of `train`, `validation` and `test`, so no evaluated figure was ever drawn, captioned or described in training,
under any seed. Combinations that training never shows (a colour with an object, a word on a sign, a number of bars
about one subject, two fields of a form) make up the split `combinations`. Looks are held out apart from contents:
`LOOKS` names the faces, chart styles and the other library that training never sees.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from zlib import crc32

from PIL import Image

from siq_vl.data.figures.figure import Question
from siq_vl.data.world.canvas import Drawn
from siq_vl.data.world.charts import ColumnChart, LineChart, PieChart, RowChart, StackedChart
from siq_vl.data.world.documents import Book, Form, Plate, Receipt, Signs
from siq_vl.data.world.figure import Figure, Look
from siq_vl.data.world.fonts import HELD_OUT_FACES
from siq_vl.data.world.nothing import Nothing
from siq_vl.data.world.scenes import Scene

DOMAINS: Mapping[str, tuple[type[Figure], ...]] = {
    "scenes": (Scene,),
    "charts": (ColumnChart, ColumnChart, RowChart, RowChart, LineChart, PieChart),
    "documents": (Receipt, Receipt, Receipt, Signs, Form, Form, Plate, Book),
}
HARD_KINDS: tuple[type[Figure], ...] = (ColumnChart, RowChart, LineChart, StackedChart)
SPLITS = ("train", "validation", "test", "combinations")
STYLES = ("structured", "terse", "text_first")
LOOKS: Mapping[str, Look] = {
    "trained": Look(),
    "fonts": Look(faces=HELD_OUT_FACES),
    "monospace": Look(faces=HELD_OUT_FACES[:1]),
    "serif": Look(faces=HELD_OUT_FACES[1:]),
    "styles": Look(charts="unseen"),
    "matplotlib": Look(charts="matplotlib"),
    "matplotlib styles": Look(charts="matplotlib unseen"),
    "large": Look(large=True),
}

_NOTHING_SHARE = 0.02  # of the samples whose domain is not asked for
_UNANSWERABLE_SHARE = 0.08  # of all others
_HARD_SHARE = 0.15
_PARTS = 16  # checksum classes: one each for validation and test, the rest for training
_CONTENT_SPLITS = {0: "test", 1: "validation"}


@dataclass(frozen=True)
class Sample:
    """A figure, one question about it, and the picture on demand.

    `hard` marks the row that is reported apart: values off an axis, stacks, and sums of three or more terms.
    """

    seed: str
    figure: Figure
    question: Question
    look: Look

    @property
    def hard(self) -> bool:
        return self.figure.hard or self.question.hard

    @property
    def drawn(self) -> Drawn:
        """The picture, and the place of everything on it."""
        return self.figure.paint(self.look, Random(f"{self.seed}/draw"))

    @property
    def image(self) -> Image.Image:
        return self.drawn.image


def content_split(figure: Figure) -> str:
    """Return the split that a figure's content belongs to."""
    if figure.held_out:
        return "combinations"
    return _CONTENT_SPLITS.get(crc32(figure.content.encode()) % _PARTS, "train")


def sample(
    split: str,
    index: int,
    *,
    seed: int = 0,
    domain: str | None = None,
    hard: bool | None = None,
    look: str = "trained",
) -> Sample:
    """Draw one sample; the same arguments give the same sample on any machine.

    Args:
        split: one of `SPLITS`.
        index: position in the split, any integer >= 0.
        seed: an independent stream of samples for each value; contents stay inside their split.
        domain: `"scenes"`, `"charts"`, `"documents"` or `"nothing"`; by default each of the first three in turn, with
            some of the last.
        hard: only hard samples, only ordinary ones, or (None) a share of hard ones.
        look: one of `LOOKS`; contents and questions are the same in every look.

    Raises:
        ValueError: unknown split, domain or look, or a domain that has no such samples.
    """
    for value, name, known in ((split, "split", SPLITS), (look, "look", tuple(LOOKS))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if domain not in (None, "nothing", *DOMAINS):
        raise ValueError(f"domain is {domain!r}; it must be one of {', '.join(DOMAINS)}, nothing")
    if hard and domain in ("scenes", "nothing"):
        raise ValueError(f"domain is {domain!r}, which has no hard samples; use 'charts' or 'documents', or hard=False")
    if hard and split == "combinations" and domain == "documents":
        raise ValueError("split 'combinations' has no hard documents; use domain 'charts', or hard=False")
    name = f"{split}/{seed}/{domain or 'any'}/{index}"
    rng = Random(name)
    if domain is None:
        turns: tuple[str, ...] = tuple(DOMAINS)
        if hard:
            turns = ("charts",) if split == "combinations" else ("charts", "documents")
        domain = "nothing" if not hard and rng.random() < _NOTHING_SHARE else turns[index % len(turns)]
    if domain == "nothing":
        return _nothing(split, name, rng, LOOKS[look])
    while True:
        wants_hard = rng.random() < _HARD_SHARE if hard is None else hard
        kinds = HARD_KINDS if wants_hard and domain == "charts" and rng.random() < 0.8 else DOMAINS[domain]
        figure = rng.choice(kinds).sample(rng)
        if content_split(figure) != split:
            continue
        question = _question(figure, wants_hard, hard is None, rng)
        if question is not None:
            return Sample(name, figure, question, LOOKS[look])


def rationale(figure: Figure, question: Question, style: str = "structured") -> str:
    """Return the reasoning that leads to the answer, in the style of one of the report's three teachers.

    Args:
        figure: the figure asked about.
        question: one of its questions.
        style: `"structured"` states the whole picture, then every step; `"terse"` the steps alone;
            `"text_first"` the whole picture, then the conclusion.

    Raises:
        ValueError: unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; it must be one of {', '.join(STYLES)}")
    if style == "terse":
        return ". ".join(question.steps)
    # What the caption has just listed is not listed again.
    listed = ", ".join(" ".join(fact) for fact in figure.facts)
    steps = [step for step in question.steps if step != listed]
    return ". ".join((figure.caption, *(steps if style == "structured" else steps[-1:])))


def _question(figure: Figure, wants_hard: bool, either: bool, rng: Random) -> Question | None:
    """Choose a question of the wanted sort, the unanswerable one in its share; None if the figure has none."""
    if figure.hard and not (wants_hard or either):
        return None
    answerable: list[Question] = []
    beyond: list[Question] = []
    for question in figure.questions(rng):
        (beyond if question.type == "unanswerable" else answerable).append(question)
    if rng.random() < _UNANSWERABLE_SHARE and (either or not wants_hard or figure.hard):
        return rng.choice(beyond)
    wanted = [question for question in answerable if figure.hard or question.hard == wants_hard]
    if not wanted and either:
        wanted = [question for question in answerable if not question.hard]
    return rng.choice(wanted) if wanted else None


def _nothing(split: str, name: str, rng: Random, look: Look) -> Sample:
    """Return a texture, and a question that was meant for another figure."""
    while True:
        other = rng.choice(DOMAINS[rng.choice(tuple(DOMAINS))]).sample(rng)
        figure = Nothing(rng.getrandbits(32), rng.choice(other.questions(rng)).text)
        # A texture has no combinations, and every split has textures of its own.
        if split == "combinations" or content_split(figure) == split:
            return Sample(name, figure, figure.questions(rng)[0], look)

"""Samples of drawn figures by split and index, and the training rows made from them.

Splits are disjoint by *content*: what a figure shows falls, by its checksum, to one of `train`, `validation` and
`test`, so no evaluated figure was ever drawn, captioned or described in training, under any seed. Combinations
that training never shows (a colour with an object, a word, a series count) make up the split `combinations`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from zlib import crc32

from PIL import Image

from siq_vl.data.figures.charts import AxisChart, ColumnChart, RowChart
from siq_vl.data.figures.documents import Plate, Receipt, Signs
from siq_vl.data.figures.figure import Figure, Question
from siq_vl.data.figures.scenes import Scene

DOMAINS: Mapping[str, tuple[type[Figure], ...]] = {
    "scenes": (Scene,),
    "charts": (ColumnChart, RowChart),
    "documents": (Receipt, Receipt, Signs, Plate),
}
HARD_KINDS: tuple[type[Figure], ...] = (AxisChart,)
SPLITS = ("train", "validation", "test", "combinations")
STYLES = ("structured", "terse", "text_first")
CAPTION_PROMPT = "Describe the image."

_HARD_SHARE = 0.06
_PARTS = 16  # checksum classes: one each for validation and test, the rest for training
_CONTENT_SPLITS = {0: "test", 1: "validation"}


@dataclass(frozen=True)
class FigureSample:
    """A figure, one question about it, and the picture on demand.

    `hard` marks the reported-only row: axis reading without printed values, and sums of three or more terms.
    """

    seed: str
    figure: Figure
    question: Question

    @property
    def hard(self) -> bool:
        return self.figure.hard or self.question.hard

    @property
    def image(self) -> Image.Image:
        return self.figure.draw(Random(f"{self.seed}/draw"))


def content_split(figure: Figure) -> str:
    """Return the split that a figure's content belongs to."""
    if figure.held_out:
        return "combinations"
    return _CONTENT_SPLITS.get(crc32(figure.content.encode()) % _PARTS, "train")


def sample(
    split: str, index: int, *, seed: int = 0, domain: str | None = None, hard: bool | None = None
) -> FigureSample:
    """Draw one sample; the same arguments give the same sample on any machine.

    Args:
        split: one of `SPLITS`.
        index: position in the split, any integer >= 0.
        seed: an independent stream of samples for each value; contents stay inside their split.
        domain: `"scenes"`, `"charts"` or `"documents"`; by default each in turn.
        hard: only hard samples, only ordinary ones, or (None) a small share of hard ones.

    Raises:
        ValueError: unknown split or domain, or a domain that has no hard samples.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if domain is None:
        domains = tuple(DOMAINS)
        if hard:  # scenes have none
            domains = ("charts", "documents")
        domain = domains[index % len(domains)]
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}; it must be one of {', '.join(DOMAINS)}")
    if hard and domain == "scenes":
        raise ValueError("domain is 'scenes', which has no hard samples; use 'charts' or 'documents', or hard=False")
    # The sample's name is its seed: neither its neighbours nor the order in which they are drawn can change it.
    name = f"{split}/{seed}/{domain}/{index}"
    rng = Random(name)
    # Figures are drawn until one belongs to the split and has a question of the wanted kind.
    while True:
        wants_hard = rng.random() < _HARD_SHARE if hard is None else hard
        kinds = DOMAINS[domain]
        if wants_hard and domain == "charts" and rng.random() < 0.5:
            kinds = HARD_KINDS
        figure = rng.choice(kinds).sample(rng)
        if content_split(figure) != split:
            continue
        questions = figure.questions(rng)
        allowed = [question for question in questions if figure.hard or question.hard == wants_hard]
        if not allowed and hard is None:  # nobody insists on a hard one
            allowed = [question for question in questions if not question.hard]
        if allowed:
            return FigureSample(name, figure, rng.choice(allowed))


def rationale(figure: Figure, question: Question, style: str = "structured") -> str:
    """Return the reasoning that leads to the answer, in the style of one of the report's three teachers.

    Args:
        figure: the figure asked about.
        question: one of its questions.
        style: `"structured"` states the whole picture, then every step; `"terse"` the steps alone;
            `"text_first"` the whole picture, then the conclusion.
    """
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; it must be one of {', '.join(STYLES)}")
    if style == "terse":
        return ". ".join(question.steps)
    # What the caption has just listed is not listed again.
    steps = [step for step in question.steps if not figure.caption.endswith(f": {step}")]
    if style == "text_first":
        steps = steps[-1:]
    return ". ".join((figure.caption, *steps))

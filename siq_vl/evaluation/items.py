"""Questions to evaluate on: of the drawn data set, or of any source that a recipe can train on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL import Image

from siq_vl.data.conversations import Dropped, text_of
from siq_vl.data.fields import as_items
from siq_vl.data.images import decode_image
from siq_vl.data.preprocessing import DropLog, Preprocessor
from siq_vl.data.sources import Source
from siq_vl.parsing.answers import parse

# The metric that a format's published evaluation uses; others compare words and numbers.
METRIC_OF_FORMAT = {"chartqa": "relaxed", "scienceqa": "choice", "textvqa": "vqa"}
_TYPE_COLUMNS = ("question_type", "type", "types", "category", "human_or_machine")
_DOMAIN_COLUMNS = ("domain", "subject", "topic")


@dataclass(frozen=True)
class Item:
    """One evaluation question.

    Args:
        id: names it in files and reports.
        group: for drawn figures `"held out"`, `"combinations"` or `"hard"`; otherwise the split.
        domain: row of the tables: a domain of drawn figures, or the source.
        type: what is asked, the finest row of the tables.
        multi_step: whether more than one look-up is needed, where that is known.
        question: its text, as reports show it.
        golds: every answer that counts as right, in the annotators' order; none where it is missing.
        messages: the conversation, up to and with the question.
        images: its pictures, as their source stores them.
        metric: how an answer is compared with the gold ones, see `predictions.ANSWER_METRICS`.
        choices: the texts of a multiple choice.
        caption: every fact of the picture, where they are known.
        reasoning: a reference rationale, where there is one.
        source: where pictures that are not at hand are read from.
        fault: why the row cannot be asked at all, or the empty string.
        template_options: given to the chat template.
    """

    id: str
    group: str
    domain: str
    type: str
    multi_step: bool
    question: str
    golds: tuple[str, ...]
    messages: Sequence[Mapping] = ()
    images: Sequence[Any] = ()
    metric: str = "words"
    choices: tuple[str, ...] = ()
    caption: str = ""
    reasoning: str = ""
    source: Source | None = field(default=None, compare=False, repr=False)
    fault: str = ""
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The gold answer that reports show: the first, or the empty string."""
        return self.golds[0] if self.golds else ""

    @property
    def image(self) -> Image.Image:
        """The first picture, opened."""
        return self.open_images()[0]

    def open_images(self) -> list[Image.Image]:
        """Return the pictures, decoded.

        Raises:
            Dropped: one of them is missing or damaged.
        """
        if self.source is None:  # they are at hand, as drawn ones are
            return [_decoded(image, self.id) for image in self.images]
        # As training reads them; a picture that cannot be read is the caller's to count, so any share may be bad.
        preprocessor = Preprocessor(DropLog(1.0))
        return [preprocessor.image(image, self.source) for image in self.images]

    def prompt(self, blind: bool = False) -> list[dict]:
        """Return the conversation to complete, on request with every picture withheld."""
        turns = []
        for turn in self.messages:
            content = [part for part in turn["content"] if not (blind and part["type"] == "image")]
            turns.append({**turn, "content": content})
        return turns


def _decoded(image: Any, name: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    try:
        return decode_image(image, name)
    except ValueError as error:
        raise Dropped("image that cannot be read", str(error), defect=True) from error


def items_of(source: Source, count: int | None = None, *, metric: str | None = None) -> list[Item]:
    """Return the questions of a source's rows, in their order.

    Every user turn that an assistant turn follows is a question, asked after the turns before it. A row that cannot be
    read is an item with a `fault`, so that it is counted and named; an empty gold answer leaves `golds` empty.

    Args:
        source: what to read; streams are read from their beginning.
        count: rows to read at most; all by default.
        metric: how answers are compared; by default what the format's published evaluation uses.
    """
    rows: Iterable
    if source.streaming:
        rows = islice(source.stored(), count)
    else:
        # One after the other: a table of pictures is not read into memory as a whole.
        rows = map(source.__getitem__, range(min(len(source), count or len(source))))
    items = []
    for number, row in enumerate(rows):
        items += _items(source, number, row, metric)
    return items


def _items(source: Source, number: int, row: Mapping | None, metric: str | None) -> list[Item]:
    """Return the questions of one row; one item with a fault where it has none that can be asked."""
    name = f"{source.name}/{number}"
    columns = row if isinstance(row, Mapping) else {}
    common: dict[str, Any] = {
        "group": source.split,
        "domain": _label(columns, _DOMAIN_COLUMNS) or source.name,
        "type": _label(columns, _TYPE_COLUMNS) or "any",
        "multi_step": False,
    }
    try:
        conversation = source.conversation(row)
    except Dropped as dropped:
        return [Item(id=name, question="", golds=(), fault=str(dropped), **common)]
    turns = conversation.messages
    answer_places = [place for place in range(1, len(turns)) if turns[place]["role"] == "assistant"]
    if not answer_places:
        return [Item(id=name, question="", golds=(), fault="no answer: no assistant turn", **common)]
    choices = tuple(map(str, as_items(columns.get("choices"))))
    items = []
    for order, place in enumerate(answer_places):
        asked = turns[:place]
        # Later turns may show further pictures, which a question must not see.
        pictures = 0
        for turn in asked:
            pictures += sum(part["type"] == "image" for part in turn["content"])
        answer, reasoning = text_of(turns[place]), ""
        reference = parse(answer)
        if reference.well_formed:  # a trace: a rationale, then the answer
            answer, reasoning = reference.answer, reference.rationale
        items.append(
            Item(
                id=name if len(answer_places) == 1 else f"{name}/{order}",
                question=text_of(asked[-1]),
                golds=_golds(columns, answer, len(answer_places)),
                messages=asked,
                images=conversation.images[:pictures],
                metric=metric or METRIC_OF_FORMAT.get(source.adapter.__name__, "number"),
                choices=choices,
                reasoning=reasoning,
                source=source,
                template_options=conversation.template_options,
                **common,
            )
        )
    return items


def _golds(columns: Mapping, answer: str, answers: int) -> tuple[str, ...]:
    """Return every gold answer of a row: those of all annotators, where it holds them, else the one that trains."""
    # Annotators answer one question; in a conversation it is not told which.
    several = columns.get("answers")
    if answers == 1 and isinstance(several, (list, tuple)) and all(isinstance(gold, str) for gold in several):
        return tuple(gold for gold in several if gold.strip())
    if not answer.strip():
        return ()
    return (answer,)


def _label(columns: Mapping, names: Sequence[str]) -> str:
    """Return what stands in the first of these columns that holds a text or a whole number; "" where none does."""
    for name in names:
        value = columns.get(name)
        if isinstance(value, (str, int)) and str(value):
            return str(value)
    return ""

"""Questions for teachers from what recipes train on: any `Source`, through its adapter.

A row with several questions (OCR-VQA, FineVision) gives as many, each asked by itself, with the row's pictures and without
the turns before it. A question's id is the source, the split (or the file that is named in its place) and the row's number, so
that it stays the same from run to run and tells where it is from.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from siq_vl.data.conversations import Conversation, Dropped, text_of
from siq_vl.data.fields import Unreadable, as_items, as_list, bad_row, texts_of
from siq_vl.data.preprocessing import locate
from siq_vl.data.sources import Source
from siq_vl.distill.questions import (
    MOST_LETTERS,
    MOST_PICTURES,
    EncodedPicture,
    FileReference,
    LeftOut,
    TraceQuestion,
)
from siq_vl.parsing.answers import parse
from siq_vl.processing_siq_vl import SPECIAL_TOKENS

TURNS = ("all", "first")
# The prompt that suits a format, or a subset of FineVision that has its name.
_TASK_OF_FORMAT = {"chartqa": "chart", "ocrvqa": "document", "textvqa": "document", "cocoqa": "scene"}
_FEW_ANSWERS = 3  # so many answers are ways of writing one; more are those of as many annotators
_FULL_SCORE = 3  # annotators from which on an answer has the full score of the published VQA metric


def source_questions(
    source: Source,
    *,
    task: str | None = None,
    turns: str = "all",
    limit: int = 0,
    left_out: LeftOut | None = None,
) -> Iterator[TraceQuestion]:
    """Yield the questions of a source's rows.

    Args:
        source: what to read.
        task: which prompt is used; None: the one that suits the format.
        turns: of a row with several questions, `"all"`, or the `"first"`, since those after it may refer to it.
        limit: questions to yield at most, of rows drawn at random (the first ones of a stream); 0: all. A greater limit
            yields the same and more.
        left_out: takes note of the rows that cannot be asked; without it, the first of them is an error.

    Raises:
        ValueError: a row that cannot be asked, unless `left_out` takes note of it; no row at all that can be.
    """
    if turns not in TURNS:
        raise ValueError(f"turns is {turns!r}; it must be one of {', '.join(TURNS)}")
    name = source.adapter.__name__
    task = task or _TASK_OF_FORMAT.get(name) or _TASK_OF_FORMAT.get(source.config.subset or "") or "general"
    count = 0
    first_error = ""
    for number, row in _numbered(source, drawn=bool(limit)):
        try:
            of_row = _questions(source, number, row, task, turns)
        except Dropped as dropped:
            where = f"{source.name}, row {number + 1}: {dropped}"
            if left_out is None:
                raise ValueError(where) from dropped
            left_out.add(source.name, number + 1, str(dropped))
            first_error = first_error or where
            continue
        for question in of_row:
            yield question
            count += 1
            if count == limit:
                return
    if not count:
        raise ValueError(f"{source.name} holds no question that can be asked: {first_error or 'it is empty'}")


def _numbered(source: Source, drawn: bool) -> Iterator[tuple[int, Mapping | Unreadable]]:
    """Yield every row with its number; on request in an order at random, the same one every time."""
    if source.streaming:
        yield from enumerate(source.stored())
        return
    order = list(range(len(source)))
    if drawn:
        Random(source.name).shuffle(order)
    for number in order:
        yield number, source[number]


def _questions(source: Source, number: int, row: Mapping | Unreadable, task: str, turns: str) -> list[TraceQuestion]:
    """Return the questions of one row.

    Raises:
        Dropped: the row is broken, or one of its questions cannot be asked.
    """
    if isinstance(row, Unreadable):
        raise bad_row(f"it is {row.why}")
    conversation = source.conversation(row)
    messages = conversation.messages
    # A question is a turn of the user that an answer follows, be the answer empty.
    places = [
        place
        for place in range(1, len(messages))
        if messages[place]["role"] == "assistant" and messages[place - 1]["role"] == "user"
    ]
    if not places:
        raise Dropped("no question", "no turn of the user that an answer follows", defect=True)
    pictures = [_picture(image, source) for image in conversation.images]
    if len(pictures) > MOST_PICTURES:
        raise bad_row(f"it has {len(pictures)} pictures: at most {MOST_PICTURES} are shown with one question")
    choices = _choices(row)
    questions = []
    for order, place in enumerate(places):
        if order and turns == "first":
            break
        shown = sum(part["type"] == "image" for turn in messages[:place] for part in turn["content"])
        id = f"{source.name}/{source.config.data_files or source.split}/{number}"
        if len(places) > 1:
            id = f"{id}#{order}"
        questions.append(
            TraceQuestion(
                id=id,
                question=_text(messages[place - 1], choices),
                golds=_golds(source.adapter.__name__, row, conversation, place, alone=len(places) == 1),
                kind="choice" if choices else "open",
                task=task,
                choices=choices,
                sources=tuple(pictures[:shown]),
                origin=f"{source.name}, row {number + 1}",
            )
        )
    return questions


def _choices(row: Mapping) -> tuple[str, ...]:
    """Return the texts of a multiple choice; none where the row is no such question."""
    choices = tuple(texts_of(as_items(row.get("choices")), "choices"))
    if len(choices) > MOST_LETTERS:
        raise bad_row(f"it has {len(choices)} choices: at most {MOST_LETTERS} can be lettered")
    return choices


def _text(turn: Mapping, choices: Sequence[str]) -> str:
    """Return a question, without the choices that an adapter has written below it: prompts letter them themselves."""
    text = text_of(turn)
    lettered = "\n".join(f"{chr(ord('A') + place)}. {choice}" for place, choice in enumerate(choices))
    if lettered:
        text = text.replace(f"\n{lettered}", "")
    text = text.strip()
    if not text:
        raise Dropped("empty question", defect=True)
    for token in SPECIAL_TOKENS:
        # It could end its turn in the teacher's prompt, and no student could be trained on it.
        if token in text:
            raise Dropped("special token in the text", f"the text holds {token}", defect=True)
    return text


def _golds(name: str, row: Mapping, conversation: Conversation, place: int, *, alone: bool) -> tuple[str, ...]:
    """Return the gold answers, the commonest first; none where the answer is missing.

    Args:
        name: of the adapter.
        row: as it is stored.
        conversation: what the adapter makes of it.
        place: of the turn that answers.
        alone: whether the row has no other question: `answers` are those of this one.
    """
    if alone and name == "chartqa":
        return _by_number(texts_of(as_items(row.get("label")), "label"))
    if alone and isinstance(row.get("answers"), (list, tuple)):
        return _by_number(texts_of(as_list(row["answers"], "answers"), "an answer"))
    answered = text_of(conversation.messages[place])
    parsed = parse(answered)  # rows may be traces themselves
    if parsed.well_formed:
        answered = parsed.answer
    return _by_number([answered])


def _by_number(answers: Sequence[str]) -> tuple[str, ...]:
    """Return the different answers, the commonest first.

    Of many annotators' answers only those count that have the full score, or the commonest where none has: what one in ten
    has written is no answer to hold a teacher to.
    """
    counts = Counter(answer.strip() for answer in answers if answer.strip())
    if sum(counts.values()) > _FEW_ANSWERS:
        enough = min(_FULL_SCORE, max(counts.values()))
        counts = Counter({answer: count for answer, count in counts.items() if count >= enough})
    return tuple(answer for answer, _ in counts.most_common())


def _picture(image: Any, source: Source) -> EncodedPicture | FileReference:
    """Return a picture of a row, not yet read where it is a file or an address.

    Raises:
        Dropped: it is missing, out of bounds, or remote without leave.
    """
    found = locate(image, source)
    if isinstance(found, bytes):
        return EncodedPicture(found)
    if isinstance(found, Image.Image):
        return EncodedPicture.encode(found)
    if isinstance(found, str):
        return FileReference(found, None)
    return FileReference(_below_root(found, source.roots), found)


def _below_root(path: Path, roots: Sequence[Path]) -> str:
    """Return a picture's path below the folder that it was found in."""
    for root in roots:
        real = os.path.realpath(root)
        if path.is_relative_to(real):
            return str(path.relative_to(real))
    return path.name

"""What a mixture leaves out: low ratings, refusals, lengths out of bounds, and rows that were there before."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from siq_vl.data.conversations import Conversation, Dropped
from siq_vl.data.fields import as_list, as_number
from siq_vl.data.mixture_config import FilterConfig


def filtered(conversation: Conversation, config: FilterConfig) -> Conversation:
    """Return what a source's filters leave of a conversation, looking at this row alone.

    Turns with a low rating go one by one, as FineVision rates them; the other filters take the row or leave it.

    Raises:
        Dropped: nothing is left, or a filter refuses the row.
    """
    conversation = _well_rated(conversation, config.min_ratings)
    answers, questions = conversation.texts("assistant"), conversation.texts("user")
    if config.drop_refusals:
        for answer in answers:
            _refuse_refusal(answer, config.refusal_phrases)
    shortest = min(map(len, answers))
    if shortest < config.min_answer_characters:
        raise Dropped("answer too short", f"{shortest} characters, at least {config.min_answer_characters}")
    _bound("answer too long", max(map(len, answers)), config.max_answer_characters)
    _bound("question too long", max(map(len, questions)), config.max_question_characters)
    _bound("too many turns", len(answers), config.max_turns)
    return conversation


def _refuse_refusal(answer: str, phrases: Sequence[str]) -> None:
    # The first sentence alone: further on, "I cannot see" may well be about the picture.
    opening = re.split(r"[.!?\n]", answer.lower().replace("\u2019", "'"), maxsplit=1)[0]
    for phrase in phrases:
        if phrase in opening:
            raise Dropped("refusal", phrase)


def _bound(reason: str, value: int, most: int | None) -> None:
    if most is not None and value > most:
        raise Dropped(reason, f"{value}, at most {most}")


def _well_rated(conversation: Conversation, least: Mapping[str, int]) -> Conversation:
    """Return the conversation without the turns that are rated too low; their pictures pass to the next turn."""
    ratings, bounds = {}, {}
    for name, bound in least.items():
        listed = _ratings(name, conversation.ratings.get(name))
        if listed:  # a row without ratings passes
            ratings[name], bounds[name] = listed, bound
    if not ratings:
        return conversation
    kept: list[Mapping] = []
    orphans: list[Mapping] = []  # pictures whose turn went, and which no turn has shown since
    times_low: Counter[str] = Counter()
    n_turns = 0
    for start in range(0, len(conversation.messages), 2):
        question, *answer = conversation.messages[start : start + 2]
        low = _first_low(ratings, bounds, n_turns)
        n_turns += 1
        if low is not None:
            times_low[low] += 1
            orphans += [part for part in question["content"] if part["type"] == "image"]
            continue
        # Pictures of turns that went are shown by this turn, before its own.
        kept += [{**question, "content": [*orphans, *question["content"]]}, *answer]
        orphans = []
    if not kept:
        # Counted by the rating that was most often too low.
        (commonest, _), *_ = times_low.most_common(1)
        raise Dropped(f"low {commonest} rating", f"all {n_turns} turns are rated below {bounds}")
    if orphans:  # the last turns went, and pictures with them that no turn shows any more
        raise Dropped("picture without a turn", "the turns that show it are rated too low")
    return replace(conversation, messages=kept, ratings={})


def _first_low(ratings: Mapping[str, Sequence[float | None]], bounds: Mapping[str, int], turn: int) -> str | None:
    """Return the first rating of a turn, by name, that is below its bound; None where the turn is good enough."""
    for name, listed in ratings.items():
        # A turn that was not rated passes.
        if turn < len(listed) and listed[turn] is not None and listed[turn] < bounds[name]:
            return name
    return None


def _ratings(name: str, given: Any) -> list[float | None]:
    """Return the ratings of a row's turns, none where it has none; of a turn that was not rated None.

    Raises:
        Dropped: they are no list of numbers.
    """
    if given is None:
        return []
    ratings: list[float | None] = []
    for rating in as_list(given, f"{name}_ratings"):
        # A missing number is null in some files and NaN, which differs from itself, in others.
        if rating is None or rating != rating:
            ratings.append(None)
        else:
            ratings.append(as_number(rating, f"{name}_ratings"))
    return ratings


class Duplicates:
    """Remembers pictures and questions, for the whole mixture."""

    def __init__(self) -> None:
        self._images: set[bytes] = set()
        self._questions: set[bytes] = set()

    def check(self, conversation: Conversation, contents: Sequence[bytes], config: FilterConfig) -> None:
        """Remember a row, and refuse it where it was there before.

        Args:
            conversation: the row.
            contents: the encoded bytes of its pictures.
            config: the filters of its source.

        Raises:
            Dropped: its pictures, or the same questions about them, have been seen.
        """
        # Each picture is hashed on its own first: two pictures and their concatenation are not the same.
        images = hashlib.sha1()
        for content in contents:
            images.update(hashlib.sha1(content).digest())
        # Case and punctuation make no other question.
        asked = []
        for question in conversation.texts("user"):
            asked.append(" ".join(re.findall(r"\w+", question.lower())))
        of_images = images.digest()
        of_questions = hashlib.sha1(of_images + "\n".join(asked).encode()).digest()
        if config.drop_duplicate_images and contents and of_images in self._images:
            raise Dropped("duplicate image")
        if config.drop_duplicate_questions and of_questions in self._questions:
            raise Dropped("duplicate question")
        # Only now: a row that is left out is nobody's duplicate.
        self._images.add(of_images)
        self._questions.add(of_questions)

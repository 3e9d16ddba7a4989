"""Conversations of one shape, rendered once by the chat template.

Most rows of a data set have few shapes: who speaks when, and where pictures are. What a template writes around the texts
of a shape is the same for all of them, as long as it does not look into the texts; and it looks for marks, such as `<|`
or `<think>`, or strips spaces. So texts without any are put into their places in what it wrote for stand-ins.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from siq_vl.data.collation import Segment, supervised_segments
from siq_vl.data.conversations import Conversation
from siq_vl.processing_siq_vl import SiQVLProcessor

# A stand-in is a number between two characters of the private use area, which no template looks for.
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")


@dataclass
class _Shape:
    """What the template writes around texts.

    Args:
        segments: their texts in pieces, of which every second is the place of a text.
        uses: how often it has been used.
    """

    segments: list[tuple[list[str], bool]]
    uses: int = 0

    def filled(self, texts: Sequence[str]) -> list[Segment]:
        """Return the segments with texts in their places."""
        filled = []
        for pieces, supervised in self.segments:
            whole = list(pieces)
            for place in range(1, len(pieces), 2):
                whole[place] = texts[int(pieces[place])]
            filled.append(Segment("".join(whole), supervised))
        return filled


class Shapes:
    """Renders conversations as `supervised_segments` does, those of a shape that it has met without the template.

    That a template writes the same around all texts is checked for the first of each shape, the second, the fourth and so
    on; a shape for which it does not hold is rendered in full from there on.

    Args:
        processor: has the chat template.
    """

    def __init__(self, processor: SiQVLProcessor):
        self.processor = processor
        self._shapes: dict[tuple, _Shape | None] = {}  # None: to be rendered in full

    def segments(self, conversation: Conversation) -> list[Segment]:
        """Return a conversation as rendered by the chat template, in pieces; see `supervised_segments`.

        Raises:
            ValueError: what `supervised_segments` raises.
        """
        texts = _texts(conversation.messages)
        # Where a template might look into a text, it is asked.
        if not all(map(_is_plain, texts)):
            return self.in_full(conversation)
        shape_of = _shape_of(conversation)
        if shape_of not in self._shapes:
            self._shapes[shape_of] = self._new(conversation)
        shape = self._shapes[shape_of]
        if shape is None:
            return self.in_full(conversation)
        shape.uses += 1
        filled = shape.filled(texts)
        if shape.uses & (shape.uses - 1) == 0:  # 1, 2, 4, 8, ...
            segments = self.in_full(conversation)
            if segments != filled:
                self._shapes[shape_of] = None
            return segments
        return filled

    def in_full(self, conversation: Conversation) -> list[Segment]:
        """Return a conversation as rendered by the chat template alone; see `supervised_segments`."""
        return supervised_segments(self.processor, conversation.messages, conversation.template_options)

    def _new(self, conversation: Conversation) -> _Shape | None:
        """Return the shape of a conversation; None where stand-ins do not come out as they went in."""
        messages = []
        count = 0
        for turn in conversation.messages:
            content = []
            for part in turn["content"]:
                if part["type"] == "text":
                    part = {**part, "text": f"\ue000{count}\ue001"}
                    count += 1
                content.append(part)
            messages.append({**turn, "content": content})
        segments = []
        found = 0
        for segment in self.in_full(replace(conversation, messages=messages)):
            pieces = _STAND_IN.split(segment.text)
            found += len(pieces) // 2
            segments.append((pieces, segment.supervised))
        if found != count:
            return None
        return _Shape(segments)


def _texts(messages: Sequence[Mapping]) -> list[str]:
    """Return the texts of all parts."""
    texts = []
    for turn in messages:
        for part in turn["content"]:
            if part["type"] == "text":
                texts.append(part["text"])
    return texts


def _is_plain(text: str) -> bool:
    """Whether there is nothing in a text that a template looks for."""
    return bool(text) and "<" not in text and "\ue000" not in text and text == text.strip()


def _shape_of(conversation: Conversation) -> tuple:
    """Return all of a conversation but its texts."""
    turns = []
    for turn in conversation.messages:
        turns.append((turn["role"], *[part["type"] for part in turn["content"]]))
    return (*turns, *sorted(conversation.template_options.items()))

"""The one row format that every source is turned into, and what makes a row unfit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from siq_vl.data.fields import Dropped, as_list, as_object, bad_row, kind

IMAGE_MARKER = "<image>"
ROLES = ("system", "user", "assistant")
# What a row may tell the chat template. Not the template itself, which keeps special tokens out of texts.
TEMPLATE_OPTIONS = ("enable_thinking",)


@dataclass(frozen=True)
class Conversation:
    """Pictures and the messages about them.

    Args:
        images: pictures in the order of their placeholders, not yet read: names of files, encoded bytes, mappings with
            `bytes` and `path` (as `datasets` stores them), or PIL images.
        messages: turns in TRL's format, their content a list of parts `{"type": "image"}` and
            `{"type": "text", "text": ...}`.
        ratings: quality ratings by name, one for each assistant turn (or None where a turn has none).
        template_options: given to the chat template: `{"enable_thinking": False}`, or nothing.
    """

    images: Sequence[Any]
    messages: Sequence[Mapping]
    ratings: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def texts(self, role: str) -> list[str]:
        """Return the text of every turn of a role."""
        return [text_of(turn) for turn in self.messages if turn["role"] == role]

    def without_images(self) -> "Conversation":
        """Return the conversation with every picture withheld."""
        messages = []
        for turn in self.messages:
            content = [part for part in turn["content"] if part["type"] != "image"]
            messages.append({**turn, "content": content})
        return replace(self, images=[], messages=messages)


def text_of(turn: Mapping) -> str:
    """Return the text of a message."""
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _count_images(turn: Mapping) -> int:
    return sum(part["type"] == "image" for part in turn["content"])


def message(role: str, text: str, images: int = 0) -> dict:
    """Return one turn: placeholders of `images` pictures, then `text`."""
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def with_markers(turns: Sequence[tuple[str, str]], images: int) -> list[dict]:
    """Return messages from (role, text) turns whose user texts may say `<image>` where a picture belongs.

    Without a marker the pictures come before the first user text. The line break that sets a marker apart goes with it.

    Raises:
        Dropped: there are markers, and not as many as pictures.
    """
    markers = sum(text.count(IMAGE_MARKER) for role, text in turns if role == "user")
    # Without any marker the row says nothing of places; with some it must say all.
    if markers not in (0, images):
        raise Dropped("image markers do not fit", f"{markers} markers for {images} pictures", defect=True)
    unplaced = images
    if markers:
        unplaced = 0
    messages = []
    for role, text in turns:
        if role != "user":  # the assistant may write `<image>`, and means the word
            messages.append(message(role, text))
        elif IMAGE_MARKER in text:
            messages.append({"role": role, "content": _split_at_markers(text)})
        else:
            messages.append(message(role, text, unplaced))
            unplaced = 0
    return messages


def _split_at_markers(text: str) -> list[dict]:
    parts: list[dict] = []
    for index, piece in enumerate(text.split(IMAGE_MARKER)):
        if index:  # a marker lies before every piece but the first
            parts.append({"type": "image"})
        text_piece = piece.strip("\n")
        if text_piece:
            parts.append({"type": "text", "text": text_piece})
    return parts


def well_formed(conversation: Conversation) -> Conversation:
    """Return a conversation whose parts all have the type that they must have, whoever made it.

    Raises:
        Dropped: one has another, or a text is not Unicode, or the chat template is given what no row may give it.
    """
    as_list(conversation.images, "images")
    as_object(conversation.ratings, "ratings")
    for turn in as_list(conversation.messages, "messages"):
        turn = as_object(turn, "a message")
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str):
            raise bad_row(f"the role of a message is {kind(role)}, where one of {', '.join(ROLES)} is needed")
        for part in as_list(content, "the content of a message"):
            part = as_object(part, "a part of a message")
            if part.get("type") == "text":
                check_text(part.get("text"))
            elif part.get("type") != "image":
                raise bad_row("a part of a message is neither of type text nor of type image")
    # Jinja takes any name: a row could replace the template itself, or its tools.
    for name, value in as_object(conversation.template_options, "template_options").items():
        if name not in TEMPLATE_OPTIONS:
            allowed = ", ".join(TEMPLATE_OPTIONS)
            raise Dropped("template option", f"a row may set {allowed} alone, not {str(name)[:80]!r}", defect=True)
        if not isinstance(value, bool):
            raise Dropped("template option", f"{name} is {kind(value)}, where true or false is needed", defect=True)
    return conversation


def check_text(text: Any) -> None:
    """Refuse what is no text, or none that can be written as UTF-8.

    Raises:
        Dropped: it is such.
    """
    if not isinstance(text, str):
        raise bad_row(f"the text of a message is {kind(text)}, where a text is needed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Dropped(
            "text that is not Unicode",
            f"character {error.start} is U+{ord(text[error.start]):04X}, half of a surrogate pair",
            defect=True,
        ) from error


def check(conversation: Conversation) -> None:
    """Refuse a conversation that cannot be trained on as it is.

    Raises:
        Dropped: no assistant turn, an empty question or answer, an unknown role, placeholders that do not fit the
            pictures, or text that spells out a special token of the chat template.
    """
    # The processor brings torch and transformers, which the options of a source do not need.
    from siq_vl.processing_siq_vl import SPECIAL_TOKENS

    messages = conversation.messages
    if not messages or messages[-1]["role"] != "assistant":
        raise Dropped("no answer", "the last turn is not the assistant's", defect=True)
    for turn in messages:
        if turn["role"] not in ROLES:
            known = ", ".join(ROLES)
            raise Dropped("unknown role", f"role is {turn['role'][:80]!r}; known are {known}", defect=True)
        text = text_of(turn)
        if turn["role"] == "assistant" and not text.strip():
            raise Dropped("empty answer", defect=True)
        if turn["role"] == "user" and not text.strip() and not _count_images(turn):
            raise Dropped("empty question", defect=True)
        for token in SPECIAL_TOKENS:
            # Such a text could end its turn, or speak for somebody else.
            if token in text:
                raise Dropped("special token in the text", f"the text holds {token}", defect=True)
    # A chat template would render it, and supervise a text that answers nothing.
    if messages[0]["role"] == "assistant":
        raise Dropped("empty question", "the assistant speaks first", defect=True)
    if not any(turn["role"] == "user" for turn in messages):
        raise Dropped("empty question", "there is no turn of the user", defect=True)
    # The processor would refuse the whole batch.
    placeholders = sum(map(_count_images, messages))
    if placeholders != len(conversation.images):
        raise Dropped(
            "image markers do not fit",
            f"{placeholders} placeholders for {len(conversation.images)} pictures",
            defect=True,
        )

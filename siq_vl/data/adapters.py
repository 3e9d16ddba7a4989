"""One small adapter for each data set: its published row in, a `Conversation` out.

An adapter takes a row as a mapping, and the `Source` it comes from for what the row does not say itself: the split,
and where pictures lie. Instructions such as "Answer with one word." are part of a recipe (`instruction`), never of an
adapter.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, Protocol

from siq_vl.data.conversations import Conversation, Dropped, message, with_markers
from siq_vl.data.fields import as_items, as_list, as_object, as_text, as_whole, bad_row, field, texts_of

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


class SourceInfo(Protocol):
    """What an adapter may ask of the source."""

    split: str
    instruction: str | None

    def find(self, names: Sequence[str]) -> str:
        """Return the first name that is a file of the source, or the first of all."""


Adapter = Callable[[Mapping, SourceInfo], Conversation]


def finevision(row: Mapping, source: SourceInfo) -> Conversation:
    """FineVision, any subset, and The Cauldron: `images`, `texts` of `user` and `assistant`, ratings turn by turn."""
    images = as_items(field(row, "images"))
    turns = []
    for entry in as_list(field(row, "texts"), "texts"):
        entry = as_object(entry, "an entry of texts")
        turns += [("user", field(entry, "user")), ("assistant", field(entry, "assistant"))]
    ratings = {}
    for name in RATINGS:
        given = row.get(f"{name}_ratings")
        if given is not None:  # The Cauldron has none
            ratings[name] = given
    return Conversation(images, with_markers(_strings(turns), len(images)), ratings)


def llava(row: Mapping, source: SourceInfo) -> Conversation:
    """LLaVA-Instruct-150k and everything in its format: `image` (a name, several, or none), `conversations`."""
    images = as_items(_either(row, "image", "images"))
    turns = []
    for turn in as_list(field(row, "conversations"), "conversations"):
        turn = as_object(turn, "a turn of conversations")
        role = as_text(field(turn, "from"), "from")
        # A role that is not known stays as it is, and is named when the conversation is checked.
        turns.append((LLAVA_ROLES.get(role, role), field(turn, "value")))
    return Conversation(images, with_markers(_strings(turns), len(images)))


def trl(row: Mapping, source: SourceInfo) -> Conversation:
    """TRL's formats: `images` or `image`, with `messages` or with `prompt` and `completion`, conversational or plain."""
    images = as_items(_either(row, "images", "image"))
    if row.get("messages") is not None:
        listed = as_list(row["messages"], "messages")
    else:
        listed = [*_turns(row, "prompt", "user"), *_turns(row, "completion", "assistant")]
    messages = [as_object(turn, "a message") for turn in listed]
    turns = []
    for turn in messages:
        role = as_text(field(turn, "role"), "role")
        turns.append((role, _content(field(turn, "content"), "content")))
    options = {}
    for name, value in as_object(row.get("chat_template_kwargs") or {}, "chat_template_kwargs").items():
        if value is not None:  # tables fill up with null
            options[name] = value
    # Plain texts may say `<image>` where a picture belongs; lists of parts say it themselves.
    if all(isinstance(content, str) for _, content in turns):
        return Conversation(images, with_markers(_strings(turns), len(images)), template_options=options)
    inline, in_parts = [], []
    for role, content in turns:
        parts, found = _parts(content)
        in_parts.append({"role": role, "content": parts})
        inline += found
    return Conversation(inline or images, in_parts, template_options=options)


def scienceqa(row: Mapping, source: SourceInfo) -> Conversation:
    """ScienceQA, the authors' `problems.json` or the Hub's: question, hint and lettered choices; the letter answers."""
    image = row.get("image") or None  # many questions have no picture: null, or an empty name
    if isinstance(image, str) and "id" in row:  # the authors' files, a folder for each question
        split, number = as_text(row.get("split", source.split), "split"), as_text(row["id"], "id")
        image = source.find([f"{split}/{number}/{image}", f"{number}/{image}"])
    choices = texts_of(field(row, "choices"), "choices")
    lines = [as_text(field(row, "question"), "question"), as_text(row.get("hint"), "hint")]
    for letter, choice in zip(ascii_uppercase, choices, strict=False):
        lines.append(f"{letter}. {choice}")
    answer, place = field(row, "answer"), -1  # no choice
    if answer is not None:
        place = as_whole(answer, "answer")
    if not 0 <= place < min(len(choices), len(ascii_uppercase)):
        raise Dropped("empty answer", f"answer {answer!r} of {len(choices)} choices", defect=True)
    question = "\n".join(line for line in lines if line)
    return _answered(image, question, ascii_uppercase[place], source)


def textvqa(row: Mapping, source: SourceInfo) -> Conversation:
    """TextVQA, the authors' JSON (`image_id` names the file) or the Hub's: ten answers, of which the commonest trains."""
    image = row.get("image")
    if image is None:
        name = as_text(field(row, "image_id"), "image_id")
        image = source.find([f"{name}.jpg", f"train_images/{name}.jpg", f"test_images/{name}.jpg"])
    return _answered(image, field(row, "question"), commonest(as_list(field(row, "answers"), "answers")), source)


def chartqa(row: Mapping, source: SourceInfo) -> Conversation:
    """ChartQA, the authors' JSON (`imgname`) or the Hub's (`image`): `query` and `label`."""
    image = row.get("image")
    if image is None:
        name = as_text(field(row, "imgname"), "imgname")
        image = source.find([name, f"png/{name}"])
    return _answered(image, field(row, "query"), commonest(as_items(field(row, "label"))), source)


def cocoqa(row: Mapping, source: SourceInfo) -> Conversation:
    """COCO-QA: `question`, `answer`, and the number of a COCO picture, whose file bears one of two kinds of name."""
    image = row.get("image")
    if image is None:  # the authors name the picture by its COCO number alone
        number = as_whole(field(row, "img_id"), "img_id")
        year = "val2014"  # COCO-QA's test split asks about COCO's validation pictures
        if source.split == "train":
            year = "train2014"
        names = [f"COCO_{year}_{number:012}.jpg", f"{number:012}.jpg"]
        image = source.find([*names, f"{year}/{names[0]}"])
    return _answered(image, field(row, "question"), field(row, "answer"), source)


def ocrvqa(row: Mapping, source: SourceInfo) -> Conversation:
    """OCR-VQA, the authors' `dataset.json` or the Hub's: several `questions` and `answers` on one book cover."""
    image = row.get("image")
    if image is None:
        name, address = as_text(field(row, "id"), "id"), as_text(row.get("imageURL", ".jpg"), "imageURL")
        paths = []
        # The cover's address tells how its file ends, unless it was saved as something else.
        for ending in dict.fromkeys((address.rpartition(".")[2], "jpg", "png", "gif")):
            paths += [f"{name}.{ending}", f"images/{name}.{ending}"]
        image = source.find(paths)
    # One row has all questions on a cover: they become the turns of one conversation.
    questions = as_list(field(row, "questions"), "questions")
    answers = as_list(field(row, "answers"), "answers")
    if len(questions) != len(answers):
        raise bad_row(f"it has {len(questions)} questions and {len(answers)} answers, where each needs the other")
    turns: list[tuple[str, Any]] = []
    for question, answer in zip(questions, answers, strict=True):
        turns += [("user", question), ("assistant", answer)]
    return Conversation([image], with_markers(_instructed(turns, source), 1))


def vqa(row: Mapping, source: SourceInfo) -> Conversation:
    """DocVQA and the like: `image`, `question`, and `answers` or `answer`; the commonest answer, or the first, trains."""
    answers = as_items(field(row, "answers", "answer"))
    return _answered(row.get("image"), field(row, "question"), commonest(answers), source)


def captions(row: Mapping, source: SourceInfo) -> Conversation:
    """Pictures with a text: `image` (or `file_name`) and `text` (or `caption`); the recipe's `instruction` asks for it."""
    image, text = field(row, "image", "file_name"), as_text(field(row, "text", "caption"), "text")
    return Conversation([image], [message("user", source.instruction, 1), message("assistant", text)])


FORMATS: Mapping[str, Adapter] = {
    "finevision": finevision,
    "llava": llava,
    "trl": trl,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "chartqa": chartqa,
    "cocoqa": cocoqa,
    "ocrvqa": ocrvqa,
    "vqa": vqa,
    "captions": captions,
}
# The columns that tell a format, in the order in which they are looked for: the more telling ones first.
_MARKS: Sequence[tuple[str, frozenset[str]]] = (
    ("finevision", frozenset({"images", "texts"})),
    ("llava", frozenset({"conversations"})),
    ("trl", frozenset({"messages"})),
    ("trl", frozenset({"prompt", "completion"})),
    ("scienceqa", frozenset({"question", "choices", "answer"})),
    ("chartqa", frozenset({"query", "label"})),
    ("ocrvqa", frozenset({"questions", "answers"})),
    ("cocoqa", frozenset({"question", "answer", "img_id"})),
    ("textvqa", frozenset({"question", "answers", "image_id"})),
    ("vqa", frozenset({"question", "answers"})),
    ("vqa", frozenset({"question", "answer"})),
    ("captions", frozenset({"image", "text"})),
    ("captions", frozenset({"image", "caption"})),
    ("captions", frozenset({"file_name", "text"})),
    ("captions", frozenset({"file_name", "caption"})),
)


def recognise(columns: Sequence[str]) -> str:
    """Return the format that rows with these columns have.

    Raises:
        ValueError: none that is known.
    """
    for name, marks in _MARKS:
        if marks <= set(columns):
            return name
    raise ValueError(
        f"the columns {', '.join(columns)} fit no known format: {_nearest(columns)}set `format` of the source to one of "
        f"{', '.join(FORMATS)}, or convert the rows to `images` and `messages`"
    )


def _nearest(columns: Sequence[str]) -> str:
    """Say which format the columns come nearest to, and what they lack of it; nothing where they share no column."""
    name, marks = max(_MARKS, key=lambda entry: len(entry[1] & set(columns)) / len(entry[1]))
    if not marks & set(columns):
        return ""
    lacking = ", ".join(sorted(marks - set(columns)))
    return f"{name} comes nearest, which has {' and '.join(sorted(marks))}, and {lacking} is not there; "


def commonest(answers: Sequence[Any]) -> str:
    """Return the answer given most often, the first of them where several are."""
    counts: Counter[str] = Counter()
    for answer in answers:
        if answer is not None:
            counts[as_text(answer, "an answer")] += 1
    if not counts:
        return ""
    return counts.most_common(1)[0][0]


def _answered(image: Any, question: Any, answer: Any, source: SourceInfo) -> Conversation:
    images = [image]
    if image is None:
        images = []
    turns = _instructed([("user", question), ("assistant", answer)], source)
    return Conversation(images, with_markers(turns, len(images)))


def _instructed(turns: Sequence[tuple[str, Any]], source: SourceInfo) -> list[tuple[str, str]]:
    """Return turns as texts, the recipe's instruction behind each question."""
    instructed = []
    for role, text in _strings(turns):
        if role == "user" and source.instruction:
            text = f"{text}\n{source.instruction}"
        instructed.append((role, text))
    return instructed


def _strings(turns: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    names = {"user": "a question", "assistant": "an answer"}
    return [(role, as_text(text, names.get(role, "a turn"))) for role, text in turns]


def _either(row: Mapping, first: str, second: str) -> Any:
    """Return one of two fields, the first where both are there; null where none is."""
    if row.get(first) is not None:
        return row[first]
    return row.get(second)


def _turns(row: Mapping, name: str, role: str) -> Sequence[Any]:
    """Return the turns of a `prompt` or a `completion`, which may be plain text."""
    value = _content(field(row, name), name)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value


def _content(value: Any, name: str) -> str | list:
    """Return what may be a text or a list: of parts, or of turns."""
    if value is None:
        raise bad_row(f"{name} is null, where a text or a list is needed")
    if isinstance(value, (list, tuple)):
        return list(value)
    return as_text(value, name)


def _parts(content: str | list) -> tuple[list[dict], list]:
    """Return a message's parts, and the pictures that lie in them."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}], []
    parts, images = [], []
    for part in content:
        part = as_object(part, "a part of a message")
        given = as_text(field(part, "type"), "the type of a part")
        if given == "image":
            parts.append({"type": "image"})
            # The picture may lie in the part itself; otherwise it is one of the row's `images`.
            for key in ("image", "path", "url"):
                if part.get(key) is not None:
                    images.append(part[key])
                    break
        elif given == "text":
            parts.append({"type": "text", "text": as_text(field(part, "text"), "the text of a part")})
        else:
            raise Dropped("content of another type", f"type is {given[:80]!r}", defect=True)
    return parts, images

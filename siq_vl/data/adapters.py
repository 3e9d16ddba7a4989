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

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


class Origin(Protocol):
    """What an adapter may ask of the source."""

    split: str
    instruction: str | None

    def find(self, names: Sequence[str]) -> str:
        """Return the first name that is a file of the source, or the first of all."""


Adapter = Callable[[Mapping, Origin], Conversation]


def finevision(row: Mapping, origin: Origin) -> Conversation:
    """FineVision, any subset, and The Cauldron: `images`, `texts` of `user` and `assistant`, ratings turn by turn."""
    images = row["images"] or []
    turns = [pair for text in row["texts"] for pair in (("user", text["user"]), ("assistant", text["assistant"]))]
    ratings = {name: row[f"{name}_ratings"] for name in RATINGS if row.get(f"{name}_ratings")}
    return Conversation(images, with_markers(_strings(turns), len(images)), ratings)


def llava(row: Mapping, origin: Origin) -> Conversation:
    """LLaVA-Instruct-150k and everything in its format: `image` (a name, several, or none), `conversations`."""
    images = _list(row.get("image") if row.get("image") is not None else row.get("images"))
    turns = [(LLAVA_ROLES.get(turn["from"], turn["from"]), turn["value"]) for turn in row["conversations"]]
    return Conversation(images, with_markers(_strings(turns), len(images)))


def trl(row: Mapping, origin: Origin) -> Conversation:
    """TRL's formats: `images` or `image`, with `messages` or with `prompt` and `completion`, conversational or plain."""
    images = _list(row.get("images") if row.get("images") is not None else row.get("image"))
    if row.get("messages") is not None:
        messages = row["messages"]
    else:
        messages = [*_turns(row["prompt"], "user"), *_turns(row["completion"], "assistant")]
    options = {name: value for name, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
    if all(isinstance(turn["content"], str) for turn in messages):
        turns = [(turn["role"], turn["content"]) for turn in messages]
        return Conversation(images, with_markers(turns, len(images)), template_options=options)
    inline, plain = [], []
    for turn in messages:
        parts, found = _parts(turn["content"])
        plain.append({"role": turn["role"], "content": parts})
        inline += found
    return Conversation(inline or images, plain, template_options=options)


def scienceqa(row: Mapping, origin: Origin) -> Conversation:
    """ScienceQA, the authors' `problems.json` or the Hub's: question, hint and lettered choices; the letter answers."""
    image = row.get("image") or None
    if isinstance(image, str) and "id" in row:
        image = origin.find([f"{row.get('split', origin.split)}/{row['id']}/{image}", f"{row['id']}/{image}"])
    lines = [row["question"], row.get("hint") or ""]
    lines += [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, row["choices"], strict=False)]
    answer = row["answer"]
    if answer is None or not 0 <= answer < len(row["choices"]):
        raise Dropped("empty answer", f"answer {answer} of {len(row['choices'])} choices", defect=True)
    question = "\n".join(line for line in lines if line)
    return _answered(image, question, ascii_uppercase[answer], origin)


def textvqa(row: Mapping, origin: Origin) -> Conversation:
    """TextVQA, the authors' JSON (`image_id` names the file) or the Hub's: ten answers, of which the commonest trains."""
    image = row.get("image")
    if image is None:
        names = [f"{row['image_id']}.jpg", f"train_images/{row['image_id']}.jpg", f"test_images/{row['image_id']}.jpg"]
        image = origin.find(names)
    return _answered(image, row["question"], commonest(row["answers"]), origin)


def chartqa(row: Mapping, origin: Origin) -> Conversation:
    """ChartQA, the authors' JSON (`imgname`) or the Hub's (`image`): `query` and `label`."""
    image = row.get("image")
    if image is None:
        image = origin.find([row["imgname"], f"png/{row['imgname']}"])
    return _answered(image, row["query"], commonest(_list(row["label"])), origin)


def cocoqa(row: Mapping, origin: Origin) -> Conversation:
    """COCO-QA: `question`, `answer`, and the number of a COCO picture, whose file bears one of two kinds of name."""
    image = row.get("image")
    if image is None:
        number, year = int(row["img_id"]), "train2014" if origin.split == "train" else "val2014"
        names = [f"COCO_{year}_{number:012}.jpg", f"{number:012}.jpg"]
        image = origin.find([*names, f"{year}/{names[0]}"])
    return _answered(image, row["question"], row["answer"], origin)


def ocrvqa(row: Mapping, origin: Origin) -> Conversation:
    """OCR-VQA, the authors' `dataset.json` or the Hub's: several `questions` and `answers` on one book cover."""
    image = row.get("image")
    if image is None:
        endings = dict.fromkeys((str(row.get("imageURL", ".jpg")).rpartition(".")[2], "jpg", "png", "gif"))
        image = origin.find([name for end in endings for name in (f"{row['id']}.{end}", f"images/{row['id']}.{end}")])
    pairs = zip(row["questions"], row["answers"], strict=True)
    turns = [turn for pair in pairs for turn in zip(("user", "assistant"), pair, strict=True)]
    return Conversation([image], with_markers(_instructed(turns, origin), 1))


def vqa(row: Mapping, origin: Origin) -> Conversation:
    """DocVQA and the like: `image`, `question`, and `answers` or `answer`; the commonest answer, or the first, trains."""
    answers = _list(row["answers"] if row.get("answers") is not None else row.get("answer"))
    return _answered(row.get("image"), row["question"], commonest(answers), origin)


def captions(row: Mapping, origin: Origin) -> Conversation:
    """Pictures with a text: `image` (or `file_name`) and `text` (or `caption`); the recipe's `instruction` asks for it."""
    if origin.instruction is None:
        raise ValueError("a source of captions asks no question: set `instruction` of this source in the recipe")
    image = row["image"] if row.get("image") is not None else row["file_name"]
    text = row["text"] if row.get("text") is not None else row["caption"]
    return Conversation([image], [message("user", origin.instruction, 1), message("assistant", _string(text))])


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
# The columns that tell a format, in the order in which they are looked for.
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
        f"the columns {', '.join(columns)} fit no known format: set `format` of the source to one of "
        f"{', '.join(FORMATS)}, or convert the rows to `images` and `messages`"
    )


def commonest(answers: Sequence[Any]) -> str:
    """Return the answer given most often, the first of them where several are."""
    counts = Counter(_string(answer) for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else ""


def _answered(image: Any, question: str, answer: Any, origin: Origin) -> Conversation:
    images = [] if image is None else [image]
    turns = _instructed([("user", question), ("assistant", answer)], origin)
    return Conversation(images, with_markers(turns, len(images)))


def _instructed(turns: Sequence[tuple[str, Any]], origin: Origin) -> list[tuple[str, str]]:
    after = f"\n{origin.instruction}" if origin.instruction else ""
    return [(role, text + after if role == "user" else text) for role, text in _strings(turns)]


def _strings(turns: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(role, _string(text)) for role, text in turns]


def _string(text: Any) -> str:
    return "" if text is None else str(text)


def _list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _turns(value: str | Sequence[Mapping], role: str) -> Sequence[Mapping]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _parts(content: str | Sequence[Mapping]) -> tuple[list[dict], list]:
    """Return a message's parts, and the pictures that lie in them."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}], []
    parts, images = [], []
    for part in content:
        if part["type"] == "image":
            parts.append({"type": "image"})
            images += [part[key] for key in ("image", "path", "url") if part.get(key) is not None][:1]
        elif part["type"] == "text":
            parts.append({"type": "text", "text": _string(part["text"])})
        else:
            raise Dropped("content of another type", f"type is {part['type']!r}", defect=True)
    return parts, images

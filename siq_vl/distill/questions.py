"""Where questions come from: the drawn data set, or a JSONL or parquet file with id, image, question and answer.

Another source is another generator of `TraceQuestion`: ids that stay the same from run to run, pictures opened on demand.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
from PIL import Image

from siq_vl.data.figures.dataset import Sample, sample
from siq_vl.data.remote import MAX_BYTES, download_image
from siq_vl.evaluation.answers import KINDS

TASKS = ("general", "chart", "document", "scene")
_FIGURE_TASKS = {"charts": "chart", "documents": "document", "scenes": "scene"}
_MIME = {b"\x89PNG\r\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


@dataclass(frozen=True)
class Picture:
    """An encoded picture: its bytes as they are, and the path it was read from, if any, below the image root."""

    data: bytes
    path: str | None = None

    @classmethod
    def encode(cls, image: Image.Image) -> "Picture":
        """Encode a drawn picture as PNG."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return cls(buffer.getvalue())

    @cached_property
    def image(self) -> Image.Image:
        """The picture as RGB, fully decoded.

        Raises:
            ValueError: the bytes are no picture, a damaged one, or one too large to be safe.
        """
        from siq_vl.data.images import decode_image  # loads transformers, which a run without such pictures need not

        return decode_image(self.data, self.path or "an embedded picture")

    @property
    def mime(self) -> str | None:
        """The MIME type where web servers know the format, by its first bytes, else None."""
        if self.data[:4] == b"RIFF" and self.data[8:12] == b"WEBP":
            return "image/webp"
        return next((mime for start, mime in _MIME.items() if self.data.startswith(start)), None)


@dataclass(frozen=True)
class TraceQuestion:
    """One question about some pictures.

    Attributes:
        id: unique in its source and the same in every run.
        question: the question as put to the teacher.
        golds: the gold answers, possibly none; one right is right.
        kind: how answers are compared, one of `answers.KINDS`.
        task: which prompt is used, one of `TASKS`.
        choices: the texts of a multiple choice.
        drawn: the sample of the drawn data set, for the teacher that knows its truth.
    """

    id: str
    question: str
    golds: tuple[str, ...] = ()
    kind: str = "open"
    task: str = "general"
    choices: tuple[str, ...] = ()
    drawn: Sample | None = field(default=None, compare=False, repr=False)
    sources: tuple["Picture | FileReference", ...] = field(default=(), compare=False, repr=False)

    def pictures(self) -> list[Picture]:
        """Return the question's pictures, read or drawn now.

        Raises:
            ValueError: a picture is missing, refused or unreadable.
        """
        if self.drawn is not None:
            return [Picture.encode(self.drawn.image)]
        opened = [source if isinstance(source, Picture) else source.open() for source in self.sources]
        for picture in opened:
            _ = picture.image  # a damaged picture is found before a teacher is paid for it
        return opened


def figure_questions(count: int, *, split: str = "train", seed: int = 0, start: int = 0) -> Iterator[TraceQuestion]:
    """Yield questions about drawn figures; a question's id is its seed, so that it can be drawn again."""
    for index in range(start, start + count):
        drawn = sample(split, index, seed=seed)
        asked = drawn.question
        kind = "yes_no" if asked.answer in ("yes", "no") else "number" if asked.answer.isdigit() else "open"
        yield TraceQuestion(
            drawn.seed, asked.text, (asked.answer,), kind, _FIGURE_TASKS[drawn.figure.domain], drawn=drawn
        )


@dataclass(frozen=True)
class ImagePolicy:
    """Which pictures a file of questions may name: files below `root`, and remote ones only where allowed."""

    root: Path
    allow_remote: bool = False

    def reference(self, value: str) -> "FileReference":
        """Check a path or URL.

        Raises:
            ValueError: it leaves the root, is remote and that is not allowed, or has a scheme that is never read.
        """
        scheme = urlsplit(value).scheme.casefold() if "://" in value or value.startswith("data:") else ""
        if scheme in ("http", "https"):
            if not self.allow_remote:
                raise ValueError(
                    f"{value} is a remote picture: download it below the image root, or pass --allow_remote"
                )
            return FileReference(value, None)
        if scheme:
            raise ValueError(f"pictures are not read from {scheme}: addresses; give a path below {self.root}")
        root = self.root.resolve()
        path = (root / value).resolve()  # symbolic links are followed before the check
        if not path.is_relative_to(root):
            raise ValueError(
                f"{value} lies outside the image root {self.root}: pass --image_root with a folder above it"
            )
        return FileReference(str(path.relative_to(root)), path)


@dataclass(frozen=True)
class FileReference:
    """A picture that is read when it is needed: a file that was checked to lie below the root, or an allowed URL."""

    name: str
    path: Path | None

    def open(self) -> Picture:
        if self.path is None:
            return Picture(download_image(self.name), self.name)
        if not self.path.is_file():
            raise ValueError(f"{self.name} is not a file below the image root")
        if self.path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{self.name} is larger than {MAX_BYTES >> 20} MiB: make it smaller first")
        return Picture(self.path.read_bytes(), self.name)


def file_questions(
    path: Path, policy: ImagePolicy, *, task: str = "general", limit: int = 0
) -> Iterator[TraceQuestion]:
    """Yield the questions of a JSONL or parquet file, row by row.

    Columns: `question`; `image` or `images` (a path, several, or the bytes that `datasets` embeds); `answer` or
    `answers` where there is a gold answer; and, if wanted, `id`, `kind`, `task` and `choices`. Without `id` a row is
    named by its number.

    Raises:
        ValueError: unknown file type, damaged row, missing column, or a picture that `policy` refuses.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: pass a .jsonl or .parquet file of questions")
    readers = {".jsonl": _json_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise ValueError(f"{path.name} is neither .jsonl nor .parquet: convert it first")
    for number, row in enumerate(readers[path.suffix](path)):
        if limit and number >= limit:
            return
        try:
            yield _question(row, number, policy, task)
        except ValueError as error:
            raise ValueError(f"{path.name}, row {number + 1}: {error}") from error


def _json_rows(path: Path) -> Iterator[Mapping]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path.name}, line {number} is not JSON ({error}): write one object a line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path.name}, line {number} is not a JSON object: write one object a line")
            yield row


def _parquet_rows(path: Path) -> Iterator[Mapping]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _question(row: Mapping, number: int, policy: ImagePolicy, task: str) -> TraceQuestion:
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("it has no question: a column `question` with some text is needed")
    choices = tuple(map(str, row.get("choices") or ()))
    kind, task = row.get("kind") or ("choice" if choices else "open"), row.get("task") or task
    if kind not in KINDS:
        raise ValueError(f"its kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if task not in TASKS:
        raise ValueError(f"its task is {task!r}; it must be one of {', '.join(TASKS)}")
    golds = _listed(row.get("answers") if row.get("answers") is not None else row.get("answer"))
    pictures = _listed(row.get("images") if row.get("images") is not None else row.get("image"))
    return TraceQuestion(
        str(row["id"]) if row.get("id") is not None else f"row-{number}",
        question.strip(),
        tuple(str(gold) for gold in golds if str(gold).strip()),
        kind,
        task,
        choices,
        sources=tuple(_source(value, policy) for value in pictures),
    )


def _listed(value: object) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _source(value: object, policy: ImagePolicy) -> Picture | FileReference:
    if isinstance(value, Mapping) and value.get("bytes"):
        return Picture(value["bytes"])
    if isinstance(value, Mapping) and value.get("path"):
        return policy.reference(value["path"])
    if isinstance(value, bytes):
        return Picture(value)
    if isinstance(value, str) and value:
        return policy.reference(value)
    raise ValueError(f"its picture is {type(value).__name__}: give a path, or {{'bytes': ..., 'path': ...}}")

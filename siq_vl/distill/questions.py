"""Where questions come from: the drawn data set, or a JSONL or parquet file with id, image, question and answer.

`source_questions` has those of everything that recipes train on. Another source is another generator of `TraceQuestion`:
ids that stay the same from run to run, pictures opened on demand.
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from itertools import islice
from math import isfinite
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from siq_vl.data.adapters import recognise
from siq_vl.data.figures.dataset import FigureSample, sample
from siq_vl.data.remote import MAX_BYTES, download_image
from siq_vl.parsing.answers import KINDS

logger = logging.getLogger(__name__)

PROMPT_TASKS = ("general", "chart", "document", "scene")
_FIGURE_TASKS = {"charts": "chart", "documents": "document", "scenes": "scene"}
_COLUMNS = ("id", "question", "kind", "task", "choices", "answer", "answers", "image", "images")
MOST_LETTERS = 8  # choices that the prompts can letter
MOST_PICTURES = 64  # of one question
_MAX_LINE = 64 << 20  # bytes
_SCIENCEQA = frozenset({"hint", "lecture", "solution", "skill"})
_TELLING_ROWS = 100  # lines of a file that are looked at to tell its form
_NAMED = 5  # rows left out that are named in the log; the file names all
_MIME = {b"\x89PNG\r\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


@dataclass(frozen=True)
class EncodedPicture:
    """An encoded picture: its bytes as they are, and the path it was read from, if any, below the image root."""

    data: bytes
    path: str | None = None

    @classmethod
    def encode(cls, image: Image.Image) -> "EncodedPicture":
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
        task: which prompt is used, one of `PROMPT_TASKS`.
        choices: the texts of a multiple choice.
        drawn: the sample of the drawn data set, for the teacher that knows its truth.
        origin: where it was read, such as `mine.jsonl, row 3`.
    """

    id: str
    question: str
    golds: tuple[str, ...] = ()
    kind: str = "open"
    task: str = "general"
    choices: tuple[str, ...] = ()
    drawn: FigureSample | None = field(default=None, compare=False, repr=False)
    sources: tuple["EncodedPicture | FileReference", ...] = field(default=(), compare=False, repr=False)
    origin: str = field(default="", compare=False, repr=False)

    @property
    def remote(self) -> bool:
        """Whether opening its pictures waits for another machine."""
        return any(isinstance(source, FileReference) and source.path is None for source in self.sources)

    def pictures(self) -> list[EncodedPicture]:
        """Return the question's pictures, read or drawn now.

        Raises:
            ValueError: a picture is missing, refused or unreadable.
        """
        if self.drawn is not None:
            return [EncodedPicture.encode(self.drawn.image)]
        opened = [source if isinstance(source, EncodedPicture) else source.open() for source in self.sources]
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
        if "\0" in value:
            raise ValueError("its picture's path holds a NUL character: give the path of a file")
        scheme = urlsplit(value).scheme.casefold() if "://" in value or value.startswith("data:") else ""
        if scheme in ("http", "https"):
            if not self.allow_remote:
                raise ValueError(
                    f"{value} is a remote picture: download it below the image root, or pass --allow_remote"
                )
            if any(character.isspace() or not character.isprintable() for character in value):
                raise ValueError(f"{value!r} is no address, it holds white space: write a space as %20")
            return FileReference(value, None)
        if scheme:
            raise ValueError(f"pictures are not read from {scheme}: addresses; give a path below {self.root}")
        root = self.root.resolve()
        try:
            path = (root / value).resolve()  # symbolic links are followed before the check
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{value[:200]} cannot be followed to a file ({error}): mend the link") from error
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

    def open(self) -> EncodedPicture:
        """Read the picture.

        Raises:
            ValueError: it is missing, refused, too large or unreadable.
        """
        if self.path is None:
            return EncodedPicture(_download(self.name), self.name)
        try:
            if not self.path.is_file():
                raise ValueError(f"{self.name} is not a file below the image root")
            if self.path.stat().st_size > MAX_BYTES:
                raise ValueError(f"{self.name} is larger than {MAX_BYTES >> 20} MiB: make it smaller first")
            return EncodedPicture(self.path.read_bytes(), self.name)
        except OSError as error:
            raise ValueError(f"{self.name[:200]} cannot be read ({error.strerror}): see to its permissions") from error


def _download(url: str) -> bytes:
    """Return a remote picture; the one place where an address of a file of questions is opened.

    Raises:
        ValueError: the address is refused, or there is no picture in time.
    """
    try:
        return download_image(url)
    except HTTPException as error:
        raise ValueError(f"{url} cannot be downloaded ({type(error).__name__}): check the address") from error


class LeftOut:
    """The rows of files of questions that cannot be asked: counted, and named in a file with the reason.

    Args:
        path: gets a JSON line for each row left out; what an earlier run has written there is removed.
    """

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        self._known: set[tuple[str, int]] = set()
        path.unlink(missing_ok=True)

    def add(self, file: str, row: int, reason: str) -> None:
        """Take note of a row, the first time that it is left out."""
        if (file, row) in self._known:
            return
        self._known.add((file, row))
        self.count += 1
        if self.count <= _NAMED:
            logger.warning("%s, row %d is left out: %s", file, row, reason)
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(json.dumps({"source": file, "row": row, "reason": reason}) + "\n")


def file_questions(
    path: Path, policy: ImagePolicy, *, task: str = "general", limit: int = 0, left_out: LeftOut | None = None
) -> Iterator[TraceQuestion]:
    """Yield the questions of a JSONL or parquet file, row by row.

    Columns: `question`; `image` or `images` (a path, several, or the bytes that `datasets` embeds); `answer` or
    `answers` where there is a gold answer; and, if wanted, `id`, `kind`, `task` and `choices`. Without `id` a row is
    named by its number.

    Args:
        path: the file.
        policy: which pictures it may name.
        task: of the rows that name none.
        limit: rows to read at most, those left out too; 0: all.
        left_out: takes note of the rows that cannot be asked; without it, the first of them is an error.

    Raises:
        ValueError: unknown file type; damaged row, missing column, an id that another row has, or a picture that
            `policy` refuses, unless `left_out` takes note of it; no row at all that can be asked.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: pass a .jsonl or .parquet file of questions")
    if path.suffix not in _READERS:
        raise ValueError(f"{path.name} is neither .jsonl nor .parquet: convert it first")
    ids: set[str] = set()
    first_error = ""
    # A row that is left out keeps its number: mending it later names no other row anew.
    for number, row in enumerate(_READERS[path.suffix](path)):
        if limit and number >= limit:
            break
        try:
            question = _question(row, number, policy, task, path.name)
            if question.id in ids:
                raise ValueError(f"its id {question.id[:100]!r} is that of a row before it: ids must be unique")
        except ValueError as error:
            reason = " ".join(str(error).encode("utf-8", errors="replace").decode().split())
            where = str(error) if isinstance(row, _Unreadable) else f"{path.name}, row {number + 1}: {reason}"
            if left_out is None:
                raise ValueError(where) from error
            left_out.add(path.name, number + 1, reason)
            first_error = first_error or where
            continue
        ids.add(question.id)
        yield question
    if not ids:
        raise ValueError(f"{path.name} holds no question that can be asked: {first_error or 'it is empty'}")


def is_file_of_questions(path: Path) -> bool:
    """Return whether a path is a file that `file_questions` reads, rather than one of a published format.

    Its first row tells.
    """
    if path.suffix not in _READERS or not path.is_file():
        return False
    if path.suffix == ".parquet":
        with suppress(pa.ArrowException, OSError):
            return _is_ours(pq.read_schema(path).names)
        return True
    for row in islice(_json_rows(path), _TELLING_ROWS):
        if isinstance(row, Mapping):
            return _is_ours(list(row))
    # A list of rows over many lines, as annotation files are written.
    return path.suffix != ".json"


def _is_ours(columns: list[str]) -> bool:
    try:
        format = recognise(columns)
    except ValueError:
        return True  # what is missing is told row by row
    if format == "scienceqa":
        # A multiple choice of ours has the same three columns, and none of those that explain.
        return not _SCIENCEQA & set(columns)
    return format == "vqa"


@dataclass(frozen=True)
class _Unreadable:
    """A row that is none, and why."""

    reason: str


def _json_rows(path: Path) -> Iterator[object]:
    with open(path, "rb") as file:
        line_number = 0
        while line := file.readline(_MAX_LINE):
            line_number += 1
            where = f"{path.name}, line {line_number}"
            if not line.endswith(b"\n") and len(line) == _MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_MAX_LINE)
                yield _Unreadable(f"{where} is longer than {_MAX_LINE >> 20} MiB: give pictures as files")
                continue
            if line_number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                row = _Unreadable(f"{where} is not UTF-8 text ({error.reason}): save the file as UTF-8")
            except ValueError as error:
                row = _Unreadable(f"{where} is not JSON ({error}): write one object a line")
            except RecursionError:
                row = _Unreadable(f"{where} is nested too deeply: write one flat object a line")
            if not isinstance(row, dict | _Unreadable):
                row = _Unreadable(f"{where} is not a JSON object: write one object a line")
            yield row


def _parquet_rows(path: Path) -> Iterator[object]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} cannot be read as parquet ({error}): write it again") from error
    with file:
        columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
        for group in range(file.num_row_groups):
            read, rows = 0, file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=columns):
                    for place in range(batch.num_rows):
                        read += 1
                        yield _parquet_row(batch, place)
            except (pa.ArrowException, OSError) as error:
                for _ in range(read, rows):
                    yield _Unreadable(f"its part of {path.name} is damaged ({error}): write it again")


def _parquet_row(batch: pa.RecordBatch, place: int) -> object:
    try:
        return batch.slice(place, 1).to_pylist()[0]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        return _Unreadable(f"it cannot be read ({error}): write it again")


_READERS = {".jsonl": _json_rows, ".json": _json_rows, ".parquet": _parquet_rows}


def _question(row: object, number: int, policy: ImagePolicy, task: str, file: str) -> TraceQuestion:
    if not isinstance(row, Mapping):
        raise ValueError(row.reason if isinstance(row, _Unreadable) else "it is no object")
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("it has no question: a column `question` with some text is needed")
    listed = row.get("choices") or []
    if not isinstance(listed, list | tuple):
        raise ValueError(f"its choices are {_shown(listed)}: give a list of texts")
    choices = tuple(_text(choice, "choice") for choice in listed)
    if len(choices) > MOST_LETTERS:
        raise ValueError(f"it has {len(choices)} choices: at most {MOST_LETTERS} can be lettered")
    kind, task = row.get("kind") or ("choice" if choices else "open"), row.get("task") or task
    if kind not in KINDS:
        raise ValueError(f"its kind is {_shown(kind)}; it must be one of {', '.join(KINDS)}")
    if task not in PROMPT_TASKS:
        raise ValueError(f"its task is {_shown(task)}; it must be one of {', '.join(PROMPT_TASKS)}")
    golds = _listed(row.get("answers") if row.get("answers") is not None else row.get("answer"))
    pictures = _listed(row.get("images") if row.get("images") is not None else row.get("image"))
    if len(pictures) > MOST_PICTURES:
        raise ValueError(f"it has {len(pictures)} pictures: at most {MOST_PICTURES} are shown with one question")
    return TraceQuestion(
        _text(row["id"], "id") if row.get("id") is not None else f"row-{number}",
        _text(question, "question").strip(),
        _golds(golds, kind, choices),
        kind,
        task,
        choices,
        sources=tuple(_source(value, policy) for value in pictures),
        origin=f"{file}, row {number + 1}",
    )


def _golds(answers: list, kind: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Return the gold answers of a row as texts; null and blank ones are none.

    Raises:
        ValueError: one is no text, or the number of a choice rather than its letter or text.
    """
    golds = []
    for answer in answers:
        if answer is None:
            continue
        # No teacher's answer would ever agree with it.
        if kind == "choice" and isinstance(answer, int) and str(answer) not in choices and answer < len(choices):
            raise ValueError(
                f"its answer is {answer}, which is none of its choices: give the letter or the text of the right one, or "
                "pass --format scienceqa, whose answers count from 0"
            )
        text = _text(answer, "answer")
        if text.strip():
            golds.append(text)
    return tuple(golds)


def _listed(value: object) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _shown(value: object) -> str:
    return repr(value if isinstance(value, str | int | float) else type(value).__name__)[:100]


def _text(value: object, name: str) -> str:
    """Return a text or number of a column as text.

    Raises:
        ValueError: it is neither, or no text that can be stored.
    """
    if value is None or isinstance(value, Mapping | list | tuple | bytes):
        raise ValueError(f"its {name} is {type(value).__name__}: give a text or a number")
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"its {name} is {value}: give a text or a number")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"its {name} holds half a character (a lone surrogate): write it again as UTF-8") from error
    return text


def _source(value: object, policy: ImagePolicy) -> EncodedPicture | FileReference:
    if isinstance(value, Mapping) and isinstance(value.get("bytes") or b"", bytes):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return EncodedPicture(value)
    if isinstance(value, str) and value:
        return policy.reference(_text(value, "picture"))
    raise ValueError(f"its picture is {type(value).__name__}: give a path, or {{'bytes': ..., 'path': ...}}")

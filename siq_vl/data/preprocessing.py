"""From stored rows to training rows: check, filter, open pictures; count and name whatever is left out."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError
from PIL import Image

from siq_vl.data.collation import Segment
from siq_vl.data.conversations import Conversation, Dropped, check
from siq_vl.data.feature_cache.pictures import Pictures
from siq_vl.data.fields import Unreadable, kind
from siq_vl.data.filters import Duplicates, filtered
from siq_vl.data.images import decode_image, find_under, read_encoded
from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.remote import download_image, is_remote
from siq_vl.data.scoring import BATCH_SIZE, scored_text
from siq_vl.data.shapes import Shapes
from siq_vl.data.sources import Source
from siq_vl.processing_siq_vl import SiQVLProcessor, to_rgb

logger = logging.getLogger(__name__)

# Defects are judged against at least so many rows, so that one bad row among the first few does not end a run.
LEAST_ROWS = 100
# Why rows are left out for what lies beside them, and may come and go.
PICTURE_REASONS = ("missing image", "image outside the folder")
_OPENED = Pictures()  # pictures are opened, where nothing else is asked for
Scorer = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float]]


class DropLog:
    """Counts the rows left out of each source by reason, names each in a file, and stops when too many are broken.

    Args:
        max_bad_share: greatest share of broken rows among those read from a source.
        path: a JSON line is appended here for each row left out, by whatever process reads it.
    """

    def __init__(self, max_bad_share: float, path: Path | None = None):
        self.max_bad_share, self.path = max_bad_share, path
        self.read: Counter[str] = Counter()
        self.defects: Counter[str] = Counter()
        self.reasons: dict[str, Counter[str]] = {}
        self._examples: dict[tuple[str, str], str] = {}  # the first detail of each reason
        self._known: set[tuple[str, int]] = set()

    def add(self, source: str, row: int, dropped: Dropped) -> None:
        """Take note of a row that was left out, the first time that it is.

        Raises:
            ValueError: more than `max_bad_share` of the source's rows are broken.
        """
        # A row may be met in every epoch; it is counted once.
        if (source, row) in self._known:
            return
        self._known.add((source, row))
        reasons = self.reasons.setdefault(source, Counter())
        reasons[dropped.reason] += 1
        self._examples.setdefault((source, dropped.reason), dropped.detail)
        if self.path is not None:
            # Opened for each line: loader processes append to the same file.
            entry = {"source": source, "row": row, "reason": dropped.reason, "detail": dropped.detail}
            with open(self.path, "a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
        self.defects[source] += dropped.defect
        allowed = self.max_bad_share * max(self.read[source], LEAST_ROWS)
        if dropped.defect and self.defects[source] > allowed:
            raise ValueError(self._too_many(source, dropped))

    def _too_many(self, source: str, last: Dropped) -> str:
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.reasons[source].most_common())
        where = ""
        if self.path:
            where = f" (each row is named in {self.path.name} in the output folder)"
        return (
            f"{self.defects[source]} of {self.read[source]} rows read from {source} are broken, more than "
            f"max_bad_share={self.max_bad_share} allows ({counts}; the last: {last}). Mend the source{where}, "
            "or raise max_bad_share"
        )

    def summary(self, source: str) -> str:
        """Return how many rows of a source were left out for which reason, and what was wrong with the first of each.

        Nothing was left out: the empty text.
        """
        if not self.reasons.get(source):
            return ""
        counts = dict(self.reasons[source].most_common())
        examples = []
        for reason in counts:
            detail = self._examples[source, reason]
            if detail:
                examples.append(f"{reason}: {detail}")
        if not examples:
            return f"{counts}"
        return f"{counts} (for instance, {'; '.join(examples)})"

    def merged(self) -> dict[str, dict[str, int]]:
        """Return rows left out, by source and reason, of all processes that share the file, each row once."""
        reasons = self.reasons
        if self.path is not None and self.path.exists():
            reasons = self._reasons_in(self.path)
        return {source: dict(counts) for source, counts in reasons.items()}

    def _reasons_in(self, path: Path) -> dict[str, Counter[str]]:
        # Several loader processes may have met the same row, and written a line each.
        reason_of: dict[tuple[str, int], str] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "source" in entry:  # the first line describes the run
                reason_of[entry["source"], entry["row"]] = entry["reason"]
        reasons: dict[str, Counter[str]] = {}
        for (source, _), reason in reason_of.items():
            reasons.setdefault(source, Counter())[reason] += 1
        return reasons

    def begin(self, run: Mapping) -> None:
        """Start the file anew, unless it belongs to the very run that now goes on."""
        if self.path is None or int(os.environ.get("RANK", "0")):  # one process begins for all
            return
        header = json.dumps({"run": run}, default=str, sort_keys=True)
        # A run that goes on from a checkpoint keeps what it has noted.
        if self.path.exists() and self.path.read_text(encoding="utf-8").startswith(header + "\n"):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(header + "\n", encoding="utf-8")


class ConversationSource(Protocol):
    """What rows are read from: a `Source`, or anything else that makes conversations of its rows."""

    roots: list[Path]
    config: SourceConfig

    @property
    def name(self) -> str:
        """What its rows are called by."""

    def conversation(self, row: Mapping | Unreadable) -> Conversation:
        """Return a stored row as a conversation."""


class Preprocessor:
    """Makes training rows of what sources store.

    Args:
        drops: takes note of the rows that are left out.
        processor: counts tokens; None leaves lengths unchecked.
        max_length: longest row, in tokens, image tokens included; longer rows are left out, never cut.
        max_image_side: pictures with a longer side are scaled down while they are read.
        scorer: similarity of pictures and texts, for sources that filter by it.
        blind: withhold every picture.
    """

    def __init__(
        self,
        drops: DropLog,
        processor: SiQVLProcessor | None = None,
        max_length: int | None = None,
        max_image_side: int | None = None,
        scorer: Scorer | None = None,
        blind: bool = False,
    ):
        self.drops, self.processor, self.max_length = drops, processor, max_length
        self.max_image_side, self.scorer, self.blind = max_image_side, scorer, blind
        self._shapes = Shapes(processor) if processor is not None else None

    def conversation(self, source: ConversationSource, row: Mapping | Unreadable) -> Conversation:
        """Return what checks and filters leave of a row, its pictures not yet opened.

        Raises:
            Dropped: the row is broken, unwanted or too long.
        """
        conversation = self._unmeasured(source, row)
        self._check_length(conversation, None)
        return conversation

    def _unmeasured(self, source: ConversationSource, row: Mapping | Unreadable) -> Conversation:
        """Return what `conversation` does, its length not yet looked at."""
        conversation = source.conversation(row)
        check(conversation)
        conversation = filtered(conversation, source.config.filters)
        if self.blind:
            conversation = conversation.without_images()
        # Whether pictures are there is known without opening them; whether they can be decoded is not.
        for image in conversation.images:
            locate(image, source)
        return conversation

    def judged(self, source: ConversationSource, rows: Sequence[Mapping | Unreadable]) -> list[Dropped | None]:
        """Return what leaves each row out, as `conversation` does of one; None for those that pass.

        Rows are measured together, and those that are short by any measure not at all.
        """
        verdicts: list[Dropped | None] = [None] * len(rows)
        measured: dict[int, tuple[list[Segment], int]] = {}  # rendered, and how many pictures are in it
        for index, row in enumerate(rows):
            try:
                conversation = self._unmeasured(source, row)
                if self._shapes is not None:
                    segments = self._rendered(conversation, self._shapes.segments)
                    measured[index] = segments, len(conversation.images)
            except Dropped as dropped:
                verdicts[index] = dropped
        if self.max_length is not None and self.processor is not None:
            begin, image_tokens = len(self.processor.beginning_ids), self.processor.image_seq_length
            for index, count in self._counted(measured, begin, image_tokens).items():
                if count > self.max_length:
                    verdicts[index] = self._too_long(count)
        return verdicts

    def _counted(
        self, measured: Mapping[int, tuple[list[Segment], int]], begin: int, image_tokens: int
    ) -> dict[int, int]:
        """Return the tokens of rendered rows that may be too long, by index, a picture counted as one tile."""
        counts: dict[int, int] = {}
        texts: list[str] = []
        for index, (segments, n_images) in measured.items():
            others = begin + n_images * image_tokens
            # A token holds at least a byte; a tokenizer may put a space before each text.
            most = others + sum(len(segment.text.encode()) + 1 for segment in segments)
            if most > self.max_length:
                counts[index] = others - n_images  # each picture is one token of the text so far
                texts += [segment.text for segment in segments]
        if not texts:
            return counts
        lengths = map(len, self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"])
        for index in counts:
            for _ in measured[index][0]:
                counts[index] += next(lengths)
        return counts

    def decides(self) -> dict[str, Any]:
        """Return all of this that decides which rows pass, as JSON has it; the scorer aside."""
        decides: dict[str, Any] = {
            "blind": self.blind,
            "max_length": self.max_length,
            "max_bad_share": self.drops.max_bad_share,
        }
        if self.processor is None:
            return decides
        decides["chat_template"] = self.processor.chat_template
        if self.max_length is not None:
            tokenizer = json.loads(self.processor.tokenizer.backend_tokenizer.to_str())
            # What the last call asked for; it says nothing of texts.
            for name in ("padding", "truncation"):
                tokenizer.pop(name, None)
            digest = hashlib.blake2b(json.dumps(tokenizer, sort_keys=True).encode(), digest_size=16)
            decides["tokenizer"] = digest.hexdigest()
            decides["image_tokens"] = self.processor.image_seq_length
        return decides

    def _rendered(self, conversation: Conversation, render: Callable[[Conversation], list[Segment]]) -> list[Segment]:
        """Return a conversation as the chat template renders it.

        Raises:
            Dropped: the chat template does not take it.
        """
        try:
            return render(conversation)
        except (ValueError, TemplateError) as error:
            raise Dropped("refused by the chat template", str(error), defect=True) from error

    def _too_long(self, count: int) -> Dropped:
        return Dropped("longer than max_length", f"{count} tokens, max_length={self.max_length}")

    def training_row(
        self, source: ConversationSource, conversation: Conversation, pictures: Pictures = _OPENED
    ) -> dict:
        """Return a row for `ConversationCollator`: `images`, `messages`, `source`, `chat_template_kwargs`.

        Raises:
            Dropped: a picture cannot be read, or the row is too long.
        """
        images = [self.image(image, source, pictures) for image in conversation.images]
        self._check_length(conversation, [image.size[::-1] for image in images])
        return {
            "images": images,
            "messages": list(conversation.messages),
            "source": source.name,
            "chat_template_kwargs": dict(conversation.template_options),
        }

    def image(self, image: Any, source: ConversationSource, pictures: Pictures = _OPENED) -> Any:
        """Return a picture of a row, a `RowPicture` come by through `pictures`; by default a PIL image.

        Raises:
            Dropped: it is missing, damaged, too large to be safe, out of bounds, or remote without leave.
        """
        found = locate(image, source)
        name = f"a picture of {source.name}"
        if isinstance(found, Path):
            name = found.name
        try:
            if isinstance(found, Image.Image):
                return pictures.from_pixels(to_rgb(found))
            content = download_image(found) if isinstance(found, str) else found
            # Decoded only if `pictures` wants it: a picture whose features are stored is not.
            decode = partial(decode_image, content, name, self.max_image_side)
            return pictures.from_encoded(content, self.max_image_side, decode)
        except (ValueError, HTTPException) as error:
            reason = "image that cannot be read"
            if "too many pixels" in str(error):
                reason = "image too large"
            raise Dropped(reason, str(error), defect=True) from error

    def accepted(
        self, source: Source, rows: Iterator[tuple[int, Mapping | Unreadable]], duplicates: Duplicates
    ) -> Iterator[tuple[int, Conversation]]:
        """Yield (number, conversation) of the rows that pass every check and filter, pictures not opened."""
        filters = source.config.filters
        waiting: list[tuple[int, Conversation]] = []
        for number, row in rows:
            self.drops.read[source.name] += 1
            try:
                conversation = self.conversation(source, row)
                if filters.drop_duplicate_images or filters.drop_duplicate_questions:
                    contents = [_content(image, source) for image in conversation.images]
                    duplicates.check(conversation, contents, filters)
            except Dropped as dropped:
                self.drops.add(source.name, number, dropped)
                continue
            # Scores come last: they alone need the pictures decoded, and a model.
            if filters.min_image_text_score is None or not conversation.images:
                yield number, conversation
                continue
            # Pictures and texts are scored in batches; the rows wait for theirs.
            waiting.append((number, conversation))
            if len(waiting) == BATCH_SIZE:
                yield from self._well_scored(source, waiting)
                waiting = []
        yield from self._well_scored(source, waiting)

    def _well_scored(self, source: Source, rows: list[tuple[int, Conversation]]) -> Iterator[tuple[int, Conversation]]:
        """Yield those of some rows whose first picture fits their text."""
        readable, images = [], []
        for number, conversation in rows:
            try:
                # The first picture stands for all: the text tower reads one text.
                images.append(self.image(conversation.images[0], source))
                readable.append((number, conversation))
            except Dropped as dropped:
                self.drops.add(source.name, number, dropped)
        if not readable:
            return
        least = source.config.filters.min_image_text_score
        texts = [scored_text(conversation) for _, conversation in readable]
        scores = self.scorer(images, texts)
        for (number, conversation), score in zip(readable, scores, strict=True):
            if score < least:
                self.drops.add(source.name, number, Dropped("image and text do not match", f"similarity {score:.3f}"))
            else:
                yield number, conversation

    def _check_length(self, conversation: Conversation, sizes: list[tuple[int, int]] | None) -> None:
        """Refuse a row that the chat template does not take, or of more than `max_length` tokens.

        `sizes` (height, width) of its pictures are given where they are known.
        """
        if self.processor is None or self._shapes is None:
            return
        # With the sizes the row is seen for the second time: the chat template has taken it the first time.
        if self.max_length is None and sizes is not None:
            return
        segments = self._rendered(conversation, self._shapes.segments if sizes is None else self._shapes.in_full)
        if self.max_length is None:
            return
        # The collator tokenizes segment by segment, and so does this count.
        texts = [segment.text for segment in segments]
        ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        begin = len(self.processor.beginning_ids)
        count = begin + sum(map(len, ids)) - len(conversation.images)  # each picture is one token of the text so far
        # Cut into tiles, a picture's tokens depend on its size; until somebody opens it, it counts as one tile.
        if sizes:
            count += sum(self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])
        else:
            count += len(conversation.images) * self.processor.image_seq_length
        if count > self.max_length:
            raise self._too_long(count)


def locate(image: Any, source: ConversationSource) -> Path | bytes | str | Image.Image:
    """Return where a picture is to be read from: a file, its bytes, an address, or itself.

    Raises:
        Dropped: it is missing, out of bounds, or remote without leave.
    """
    if isinstance(image, Mapping):  # as `datasets` stores pictures
        stored = image.get("bytes")
        is_empty = isinstance(stored, bytes) and not stored
        if stored is None or is_empty:
            stored = image.get("path")
        image = stored
    if isinstance(image, (bytes, Image.Image)):
        return image
    if not isinstance(image, str):
        raise Dropped("missing image", f"{kind(image)} in place of a picture", defect=True)
    if not image:
        raise Dropped("missing image", "an empty name in place of a picture", defect=True)
    # Such a text would be taken for the name of a file, and fill the log.
    if image.startswith("data:"):
        raise Dropped("inline image", "a data: address: give the picture as a file or as bytes", defect=True)
    if is_remote(image):
        # A row must not make this machine send requests that its user did not allow.
        if not source.config.allow_remote_images:
            raise Dropped("remote image", f"{image[:200]}: set allow_remote_images to fetch it", defect=True)
        return image
    try:
        return find_under(image, source.roots)
    except FileNotFoundError as error:
        raise Dropped("missing image", str(error), defect=True) from error
    except PermissionError as error:
        raise Dropped("image outside the folder", str(error), defect=True) from error


def _content(image: Any, source: Source) -> bytes:
    """Return what tells a picture from others: its bytes, stored, or its address.

    Raises:
        Dropped: it is not there, or cannot be read.
    """
    found = locate(image, source)
    try:
        if isinstance(found, Path):
            return read_encoded(found)
        if isinstance(found, Image.Image):
            return to_rgb(found).tobytes()
        if isinstance(found, str):  # nothing is downloaded to tell duplicates
            return found.encode()
        return found
    except ValueError as error:
        raise Dropped("image that cannot be read", str(error), defect=True) from error

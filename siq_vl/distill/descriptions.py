"""What a student without eyes is told of a picture: captions, and the text in it.

A teacher writes them (`generate_traces.py --describe`) into a store of their own inside the store of traces, the folder
`descriptions`. There a picture is described once, however many questions are about it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from siq_vl.data.conversations import Dropped
from siq_vl.data.fields import Unreadable, as_text, kind, parse_row
from siq_vl.data.figures.dataset import sample
from siq_vl.data.preprocessing import DropLog
from siq_vl.distill.questions import EncodedPicture, FileReference, ImagePolicy, TraceQuestion
from siq_vl.files import write_text

DESCRIPTIONS = "descriptions"
# What the store of descriptions holds as their questions; prompts have words of their own.
_ASKED = {"caption": "What does the picture show?", "ocr": "What text is in the picture?"}
_SAME_PICTURES = "same_pictures.json"  # by a question's id, that of the one whose pictures, the same, were described
_NO_TEXT = "no text"
CAPTIONS_FILE = "captions.jsonl"
_DRAWN = re.compile(r"(train|validation|test|combinations)/(\d{1,18})/(scenes|charts|documents)/(\d{1,18})")


class Descriptions:
    """The caption of a picture, and the text in it.

    A teacher has written them into the store `descriptions` in the folder; or they are columns `caption` and `ocr` of the
    store, or of `captions.jsonl` beside its data (one object a line, with the `sample_id`), which goes before all others.
    Drawn figures have their own. A line that is no such object is left out.

    Args:
        folder: the store.
        drops: takes note of the lines that are left out, by their number.
    """

    def __init__(self, folder: Path, drops: DropLog):
        self._path = folder / CAPTIONS_FILE
        self._drops = drops
        self._described, self._same_pictures = _read_descriptions(folder / DESCRIPTIONS)
        self._listed: dict[str, Mapping] = {}
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8", errors="replace")
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    self._list(line, number)

    def _list(self, line: str, number: int) -> None:
        self._drops.read[CAPTIONS_FILE] += 1
        entry = parse_row(line)
        if isinstance(entry, Mapping) and isinstance(entry.get("sample_id"), str | int):
            self._listed[str(entry["sample_id"])] = entry
            return
        fault = "its sample_id is missing or no text"
        if isinstance(entry, Unreadable):
            fault = f"it is {kind(entry)}"
        detail = f"{CAPTIONS_FILE}, line {number} is not an object with a sample_id: {fault}"
        self._drops.add(CAPTIONS_FILE, number, Dropped("caption that cannot be read", detail, defect=True))

    def of(self, row: Mapping) -> str:
        """Return the description of a trace's pictures.

        Raises:
            Dropped: there is none, or it is no text.
        """
        # The file beside the store goes before what the store has itself: it can be mended.
        sample_id = row["sample_id"]
        described = self._described.get(self._same_pictures.get(sample_id, sample_id), {})
        entry = {**row, **described, **self._listed.get(sample_id, {})}
        lines = []
        if caption := as_text(entry.get("caption"), "caption"):
            lines.append(caption)
        if text := as_text(entry.get("ocr"), "ocr"):
            lines.append(f"Text in the picture: {text}")
        if lines:
            return "\n".join(lines)
        if caption := _drawn_caption(row):
            return caption
        fault = (
            f"student is 'text', and sample {row['sample_id']!r:.80} has neither caption nor OCR text: give them as "
            f"columns `caption` and `ocr` of the store, or in {self._path}, one line a sample: "
            '{"sample_id": "...", "caption": "...", "ocr": "..."}; or have them written by a teacher, with '
            f"generate_traces.py --describe caption ocr --output {self._path.parent}"
        )
        raise Dropped("neither caption nor OCR text", fault, defect=True)


def pictures_to_describe(
    folder: Path, tasks: Sequence[str], *, image_root: Path | None = None, limit: int = 0
) -> Iterator[TraceQuestion]:
    """Yield a question for each of the tasks and each picture, or row of pictures, of a store's kept traces.

    Args:
        folder: the store.
        tasks: of `schema.DESCRIPTION_TASKS`.
        image_root: for a store that keeps pictures by reference, the folder that their paths start from.
        limit: pictures at most; 0: all.

    Raises:
        ValueError: there is no store, or no kept trace with a picture that has to be described.
    """
    first_with: dict[str, str] = {}
    same_pictures: dict[str, str] = {}
    for sample_id, pictures in _pictures(folder, image_root):
        key = _key(pictures)
        same_pictures[sample_id] = first_with.setdefault(key, sample_id)
    if not first_with:
        raise ValueError(
            f"{folder} holds no kept trace whose picture has to be described: drawn figures have captions of their own, so "
            "run generate_traces.py with --questions first"
        )
    (folder / DESCRIPTIONS).mkdir(exist_ok=True)
    write_text(folder / DESCRIPTIONS / _SAME_PICTURES, json.dumps(same_pictures, indent=0) + "\n")
    wanted = set(list(first_with.values())[: limit or None])
    for sample_id, pictures in _pictures(folder, image_root):
        if sample_id not in wanted:
            continue
        for task in tasks:
            yield TraceQuestion(sample_id, _ASKED[task], task=task, sources=pictures, origin=f"sample {sample_id}")


def _pictures(
    folder: Path, image_root: Path | None
) -> Iterator[tuple[str, tuple[EncodedPicture | FileReference, ...]]]:
    """Yield each sample of the kept traces once, with its pictures, where it has some and they are not drawn."""
    seen: set[str] = set()
    columns = ["sample_id", "question", "verdict", "images", "image_paths"]
    for path in sorted((folder / "data").glob("traces-*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(64, columns=columns):
            for row in batch.to_pylist():
                if row["verdict"] != "kept" or row["sample_id"] in seen or _drawn_caption(row):
                    continue
                seen.add(row["sample_id"])
                pictures: list[EncodedPicture | FileReference] = []
                for image in row["images"]:
                    pictures.append(EncodedPicture(image["bytes"]))
                if not pictures and row["image_paths"]:
                    if image_root is None:
                        raise ValueError(
                            f"{folder} keeps pictures by reference: pass --image_root with the folder that they lie in"
                        )
                    policy = ImagePolicy(image_root)
                    pictures = [policy.reference(name) for name in row["image_paths"]]
                if pictures:
                    yield row["sample_id"], tuple(pictures)


def _key(pictures: Sequence[EncodedPicture | FileReference]) -> str:
    """Return what is the same for the same pictures, in the same order."""
    digest = hashlib.sha256()
    for picture in pictures:
        content = picture.data if isinstance(picture, EncodedPicture) else picture.name.encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _read_descriptions(folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return what teachers have said of pictures, by sample and task, and the samples with the pictures of others."""
    described: dict[str, dict[str, str]] = {}
    for path in sorted((folder / "data").glob("traces-*.parquet")):
        for row in pq.read_table(path, columns=["sample_id", "task", "answer", "verdict"]).to_pylist():
            of_sample = described.setdefault(row["sample_id"], {})
            says_none = row["answer"].strip(" .").casefold() == _NO_TEXT
            if row["verdict"] == "kept" and not says_none:
                of_sample.setdefault(row["task"], row["answer"])
    same_pictures: dict[str, str] = {}
    if (folder / _SAME_PICTURES).exists():
        same_pictures = json.loads((folder / _SAME_PICTURES).read_text(encoding="utf-8"))
    return described, same_pictures


def _drawn_caption(row: Mapping) -> str:
    """Return the caption of a drawn figure, which its id draws again; nothing for other pictures."""
    found = _DRAWN.fullmatch(row["sample_id"])
    if not found:
        return ""
    split, seed, domain, index = found.groups()
    drawn = sample(split, int(index), seed=int(seed), domain=domain)
    # Anybody's question may have an id that looks like a drawn one's.
    if drawn.question.text != row["question"]:
        return ""
    return drawn.figure.caption

"""What a student without eyes is told of a picture."""

import re
from collections.abc import Mapping
from pathlib import Path

from siq_vl.data.conversations import Dropped
from siq_vl.data.fields import Unreadable, as_text, kind, parse_row
from siq_vl.data.figures.dataset import sample
from siq_vl.data.preprocessing import DropLog

CAPTIONS_FILE = "captions.jsonl"
_DRAWN = re.compile(r"(train|validation|test|combinations)/(\d{1,18})/(scenes|charts|documents)/(\d{1,18})")


class Descriptions:
    """The caption of a picture, and the text in it.

    They are columns `caption` and `ocr` of the store, or of `captions.jsonl` beside its data (one object a line, with
    the `sample_id`); drawn figures have their own. A line that is no such object is left out.

    Args:
        folder: the store.
        drops: takes note of the lines that are left out, by their number.
    """

    def __init__(self, folder: Path, drops: DropLog):
        self._path = folder / CAPTIONS_FILE
        self._drops = drops
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
        # The file beside the store goes before the store's own columns: it can be mended.
        entry = {**row, **self._listed.get(row["sample_id"], {})}
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
            '{"sample_id": "...", "caption": "...", "ocr": "..."}'
        )
        raise Dropped("neither caption nor OCR text", fault, defect=True)


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

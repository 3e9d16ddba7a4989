"""Looking a whole source through before training: in batches, in several processes, and once for all starts.

Each row is judged as `Preprocessor.conversation` judges it, but a batch at a time: rows are read without the bytes of
their pictures, conversations of one shape share a rendering of the chat template, and only rows that might be too long
are tokenized, all of a batch at once. What came of it is kept, by all that decides it, so that the other processes of a
run and the next start read it.
"""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from filelock import FileLock
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from siq_vl.data.conversations import Dropped
from siq_vl.data.preprocessing import PICTURE_REASONS, Preprocessor
from siq_vl.data.sources import Source

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 512
_CODE = sorted(Path(__file__).parent.glob("*.py"))  # what judges rows; another version may judge otherwise


@dataclass
class Looked:
    """What came of looking a source through.

    Args:
        read: rows that were looked at.
        numbers: of those that may be trained on, in the order in which they were drawn.
        dropped: (number, reason, detail, whether it is a defect) of those that were left out.
    """

    read: int = 0
    numbers: list[int] = field(default_factory=list)
    dropped: list[tuple[int, str, str, bool]] = field(default_factory=list)


class _Batches(TorchDataset):
    """Rows by their numbers, a batch at a time, each row as what leaves it out or None."""

    def __init__(self, source: Source, preprocessor: Preprocessor, order: Sequence[int]):
        self.source, self.preprocessor, self.order = source, preprocessor, order

    def __len__(self) -> int:
        return -(-len(self.order) // _ROWS_AT_ONCE)

    def __getitem__(self, index: int) -> list[tuple[int, Dropped | None]]:
        if index >= len(self):
            raise IndexError(index)
        numbers = self.order[index * _ROWS_AT_ONCE : (index + 1) * _ROWS_AT_ONCE]
        judged = self.preprocessor.judged(self.source, self.source.without_pictures(numbers))
        return list(zip(numbers, judged, strict=True))


def judged_rows(
    source: Source, preprocessor: Preprocessor, order: Sequence[int], processes: int
) -> Iterator[tuple[int, Dropped | None]]:
    """Yield (number, what leaves the row out or None) of rows in the order given.

    Args:
        source: the rows.
        preprocessor: judges them.
        order: their numbers.
        processes: that judge; with 1 the process itself does.
    """
    batches: Any = _Batches(source, preprocessor, order)
    if processes > 1:
        # A generator of its own: training draws the same numbers however many processes there are.
        batches = DataLoader(
            batches, batch_size=None, num_workers=processes, generator=torch.Generator().manual_seed(0)
        )
    for batch in batches:
        yield from batch


def looked_through(
    source: Source, preprocessor: Preprocessor, order: Sequence[int], wanted: int, processes: int, about: Any
) -> Looked:
    """Look through rows until so many may be trained on, or read what came of it another time.

    What is left out is noted in `preprocessor.drops`, as if it was looked at now.

    Args:
        source: the rows.
        preprocessor: judges them.
        order: the rows' numbers, in the order in which they are looked at.
        wanted: how many are enough.
        processes: that look; see `judged_rows`.
        about: whatever else decides what comes of it, such as the seed of the order, as JSON has it.

    Raises:
        ValueError: too many rows are broken.
    """

    def look() -> Looked:
        looked = Looked()
        rows = judged_rows(source, preprocessor, order, processes)
        progress = tqdm(rows, desc=f"looking through {source.name}", total=len(order), disable=None)
        for number, dropped in progress:
            looked.read += 1
            preprocessor.drops.read[source.name] += 1
            if dropped is None:
                looked.numbers.append(number)
                if len(looked.numbers) == wanted:
                    break
                continue
            looked.dropped.append((number, dropped.reason, dropped.detail, dropped.defect))
            preprocessor.drops.add(source.name, number, dropped)
        return looked

    path = _path(source, preprocessor, wanted, about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("what comes of looking through %s is not kept: %s", source.name, error)
        return look()
    # The first process of a machine looks; the others wait here, and read.
    with FileLock(path.with_suffix(".lock")):
        kept = _read(path)
        if kept is None or _picture_came(source, preprocessor, kept):
            looked = look()
            _write(path, looked)
            return looked
    logger.info(
        "%s was looked through before: %d of %d rows may be trained on", source.name, len(kept.numbers), kept.read
    )
    preprocessor.drops.read[source.name] += kept.read
    for number, reason, detail, defect in kept.dropped:
        preprocessor.drops.add(source.name, number, Dropped(reason, detail, defect=defect))
    return kept


def _picture_came(source: Source, preprocessor: Preprocessor, kept: Looked) -> bool:
    """Whether a row that was left out for a missing picture would pass now; nothing else changes unseen."""
    numbers = [number for number, reason, *_ in kept.dropped if reason in PICTURE_REASONS]
    for start in range(0, len(numbers), _ROWS_AT_ONCE):
        rows = source.without_pictures(numbers[start : start + _ROWS_AT_ONCE])
        if None in preprocessor.judged(source, rows):
            return True
    return False


def _path(source: Source, preprocessor: Preprocessor, wanted: int, about: Any) -> Path:
    """Return the file that is named by all that decides what comes of looking."""
    digest = hashlib.blake2b(digest_size=16)
    for file in _CODE:
        digest.update(file.read_bytes())
    config = asdict(source.config)
    decides = {
        "rows": source.fingerprint,
        "config": {name: value for name, value in config.items() if name not in ("weight", "max_samples")},
        "roots": list(map(str, source.roots)),
        "adapter": source.adapter.__name__,
        "wanted": wanted,
        "about": about,
        "preprocessor": preprocessor.decides(),
    }
    digest.update(json.dumps(decides, sort_keys=True, default=str).encode())
    return Path(datasets.config.HF_DATASETS_CACHE) / "siq_vl" / f"{digest.hexdigest()}.json"


def _read(path: Path) -> Looked | None:
    """Return what a file holds; None where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Looked(content["read"], content["numbers"], [tuple(entry) for entry in content["dropped"]])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("%s cannot be read, and is made again: %s", path, error)
        return None


def _write(path: Path, looked: Looked) -> None:
    # Written aside and moved: a process that is ended leaves no half of a file.
    scratch = path.with_name(f".{secrets.token_hex(4)}.json")
    scratch.write_text(json.dumps(asdict(looked)), encoding="utf-8")
    os.replace(scratch, path)

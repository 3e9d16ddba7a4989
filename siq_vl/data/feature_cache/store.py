"""Vision features on disk: memory-mapped shards that several writers fill, and that survive the end of any of them.

A store is a folder for one vision tower and one way of preparing pictures. Each writer has a shard of its own, two
files: `<shard>.features`, records of equal size, one a tile, and `<shard>.index`, one entry a picture. An entry is
written after the features it points to are on disk, so that whatever the index of a shard names is there in full;
what lies behind it was left by a writer that was ended, and is never read.
"""

import fcntl
import json
import mmap
import os
import secrets
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from siq_vl.data.mixture_config import FEATURE_DTYPES

ENTRY = np.dtype(
    [
        ("high", "<u8"),  # the two halves of the picture's key
        ("low", "<u8"),
        ("shard", "<u4"),
        ("first", "<u4"),  # first record of the picture in its shard
        ("tiles", "<u4"),  # its number of records
        ("height", "<u4"),  # of the picture as it was decoded
        ("width", "<u4"),
    ]
)
SHARD_BYTES = 2**30
_FLUSH_BYTES = 2**26
_FLUSH_SECONDS = 5.0
_ABOUT, _MERGED = "about.json", "merged.npy"


@dataclass(frozen=True)
class FeatureLayout:
    """How the features of one tile are stored.

    Args:
        rows: height of the grid of patches.
        columns: width of the grid.
        width: channels of the vision tower.
        dtype: `"bfloat16"`, `"float32"`, or `"int8"` with one float32 scale a patch.
    """

    rows: int
    columns: int
    width: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in FEATURE_DTYPES:
            raise ValueError(
                f"the type of stored features is {self.dtype!r}; it must be one of {', '.join(FEATURE_DTYPES)}"
            )

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile."""
        a_patch = {"bfloat16": 2 * self.width, "float32": 4 * self.width, "int8": self.width + 4}[self.dtype]
        return self.rows * self.columns * a_patch

    def pack(self, features: torch.Tensor) -> np.ndarray:
        """Return features of shape `(n_tiles, n_patches, width)` as bytes of shape `(n_tiles, tile_bytes)`."""
        features = features.detach().float().cpu().contiguous()
        n_tiles = features.shape[0]
        if self.dtype == "float32":
            return features.numpy().view(np.uint8).reshape(n_tiles, -1)
        if self.dtype == "bfloat16":
            return features.bfloat16().view(torch.uint8).numpy().reshape(n_tiles, -1)
        # The largest channel of a patch becomes 127; the scale stands behind the values.
        scales = features.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        values = (features / scales).round().to(torch.int8).numpy().view(np.uint8).reshape(n_tiles, -1)
        return np.concatenate([values, scales.numpy().view(np.uint8).reshape(n_tiles, -1)], axis=1)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Return bytes of shape `(n_tiles, tile_bytes)` as features of shape `(n_tiles, rows, columns, width)`."""
        shape = (packed.shape[0], self.rows, self.columns, self.width)
        if self.dtype != "int8":
            return packed.view(getattr(torch, self.dtype)).reshape(shape)
        patches = self.rows * self.columns
        values = packed[:, : patches * self.width].view(torch.int8).reshape(shape)
        scales = packed[:, patches * self.width :].contiguous().view(torch.float32)
        # Made float first: PyTorch multiplies numbers of two types ten times as slowly.
        return values.float().mul_(scales.reshape(packed.shape[0], self.rows, self.columns, 1))


class FeatureWriter:
    """Appends features to shards of its own.

    Args:
        folder: the store's.
        layout: how features are stored.
        flush_seconds: entries are put on disk at least so often; what is younger is lost with the process.
    """

    def __init__(self, folder: Path, layout: FeatureLayout, flush_seconds: float = _FLUSH_SECONDS):
        self.folder, self.layout, self.flush_seconds = folder, layout, flush_seconds
        self.written = 0  # bytes
        self._begin()

    def _begin(self) -> None:
        while True:
            self._shard = secrets.randbits(32)
            try:
                self._index = open(self.folder / f"{self._shard:08x}.index", "xb", buffering=0)  # noqa: SIM115
            except FileExistsError:
                continue
            break
        fcntl.flock(self._index, fcntl.LOCK_EX)  # for as long as this process lives
        self._features = open(self.folder / f"{self._shard:08x}.features", "xb")  # noqa: SIM115
        self._waiting: list[tuple] = []
        self._records, self._flushed, self._since = 0, 0, time.monotonic()

    def add(self, key: bytes, size: tuple[int, int], packed: np.ndarray) -> None:
        """Append a picture.

        Args:
            key: 16 bytes.
            size: height and width of the picture as it was decoded.
            packed: what `FeatureLayout.pack` made of its tiles.
        """
        self._features.write(packed.tobytes())
        halves = np.frombuffer(key, "<u8")
        self._waiting.append((halves[0], halves[1], self._shard, self._records, len(packed), *size))
        self._records += len(packed)
        self.written += packed.nbytes
        # Flushed by size and by time: what is lost with a killed process is bounded by both.
        bytes_waiting = (self._records - self._flushed) * self.layout.tile_bytes
        if bytes_waiting >= _FLUSH_BYTES or time.monotonic() - self._since >= self.flush_seconds:
            self.flush()
        # A shard is closed at a bounded size, since a reader maps it whole.
        if self._records * self.layout.tile_bytes >= SHARD_BYTES:
            self.close()
            self._begin()

    def flush(self) -> None:
        """Put what was added on disk: the features first, then the entries that name them."""
        if self._waiting:
            self._features.flush()
            os.fsync(self._features.fileno())
            self._index.write(np.array(self._waiting, ENTRY).tobytes())
            os.fsync(self._index.fileno())
        self._waiting, self._flushed, self._since = [], self._records, time.monotonic()

    def close(self) -> None:
        """Flush and close the shard; one without any entry is removed."""
        self.flush()
        if not self._records:
            os.unlink(self._features.name)
            os.unlink(self._index.name)
        self._features.close()
        self._index.close()

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class FeatureStore:
    """Reads a store. It may be handed to other processes, forked or spawned: each maps the files itself.

    Args:
        folder: made where it is not there yet.
        layout: how features are stored.
        about: what they depend on; written down for people to read.

    Raises:
        ValueError: the folder holds something else.
    """

    def __init__(self, folder: Path, layout: FeatureLayout, about: Mapping[str, Any] | None = None):
        self.folder, self.layout = Path(folder), layout
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {**(about or {}), "layout": asdict(layout)}
        path = self.folder / _ABOUT
        # Several processes may be here at once: each writes the same.
        if not path.exists():
            _replace(path, json.dumps(content, indent=1).encode())
        if json.loads(path.read_text())["layout"] != content["layout"]:
            raise ValueError(f"{path} states another layout than {layout}: remove the folder, or choose another")
        self._maps: dict[int, mmap.mmap] = {}
        self.refresh()

    def __getstate__(self) -> dict:
        # Maps of memory cannot be sent; the entries are mapped anew from their file.
        return {**vars(self), "_maps": {}, "_entries": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._entries = np.load(self.folder / _MERGED, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._entries)

    def discard_unfinished(self) -> int:
        """Cut off what writers that were ended left half-written; return the bytes that this frees."""
        freed = 0
        for path in self.folder.glob("*.index"):
            with open(path, "rb") as index:
                try:
                    fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # its writer is alive
                    continue
                features = path.with_suffix(".features")
                # What no entry names was written and never flushed.
                records = 0
                for entry in _entries(path):
                    records = max(records, int(entry["first"] + entry["tiles"]))
                end = records * self.layout.tile_bytes
                if features.exists() and features.stat().st_size > end:
                    freed += features.stat().st_size - end
                    os.truncate(features, end)
        return freed

    def refresh(self) -> None:
        """Read the entries of all shards anew."""
        self._maps.clear()
        found = [np.empty(0, ENTRY)]
        for path in sorted(self.folder.glob("*.index")):
            features = path.with_suffix(".features")
            records = features.stat().st_size // self.layout.tile_bytes if features.exists() else 0
            entries = _entries(path)
            # An entry whose records are not there is left out: its picture is computed again.
            found.append(entries[entries["first"].astype(np.int64) + entries["tiles"] <= records])
        merged = np.concatenate(found)
        # Sorted by key, so that `find` can halve; of a picture that two writers stored, the first remains.
        merged = merged[np.lexsort((merged["low"], merged["high"]))]
        again = (merged["high"][1:] == merged["high"][:-1]) & (merged["low"][1:] == merged["low"][:-1])
        merged = merged[np.concatenate([[True], ~again])[: len(merged)]]
        # Written aside and moved, since other processes may be reading the same file.
        scratch = self.folder / f".{secrets.token_hex(4)}.npy"
        np.save(scratch, merged)
        self._entries = np.load(scratch, mmap_mode="r")  # on disk: nothing here grows with the number of pictures
        os.replace(scratch, self.folder / _MERGED)

    def find(self, key: bytes) -> np.void | None:
        """Return the entry of a picture by its key of 16 bytes; None where its features are not stored."""
        high, low = np.frombuffer(key, "<u8")
        place = bisect_left(self._entries["high"], high)  # NumPy's own search would copy the column first
        while place < len(self._entries) and self._entries["high"][place] == high:
            if self._entries["low"][place] == low:
                return self._entries[place].copy()
            place += 1
        return None

    def read(self, entries: Sequence[np.void]) -> torch.Tensor:
        """Return the features of pictures, tile after tile, of shape `(n_tiles, rows, columns, width)`."""
        tile = self.layout.tile_bytes
        packed = np.empty((sum(int(entry["tiles"]) for entry in entries), tile), np.uint8)
        done = 0
        for entry in entries:
            count, start = int(entry["tiles"]), int(entry["first"]) * tile
            mapped = self._mapped(int(entry["shard"]))
            packed[done : done + count] = np.frombuffer(mapped, np.uint8, count * tile, start).reshape(count, tile)
            # The pages stay in the system's cache, but count no longer as memory of this process.
            page = start - start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, page, start + count * tile - page)
            done += count
        return self.layout.unpack(torch.from_numpy(packed))

    def _mapped(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            with open(self.folder / f"{shard:08x}.features", "rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]


def _entries(path: Path) -> np.ndarray:
    """Return the whole entries of an index; the last may be cut off."""
    content = path.read_bytes()
    return np.frombuffer(content, ENTRY, len(content) // ENTRY.itemsize)


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    scratch.write_bytes(content)
    os.replace(scratch, path)

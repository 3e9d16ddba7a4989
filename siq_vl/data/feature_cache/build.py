"""Computing the features of a data set's pictures once, before training.

The rows are gone through twice: first every picture is named, with none decoded, which gives the size of what is to be
stored; then those that the store lacks are opened, prepared and sent through the vision tower. With several processes
each takes its share of both and writes shards of its own.
"""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from siq_vl.data.feature_cache.pictures import CachedPicture, CachedPictures, with_cached_pictures
from siq_vl.data.feature_cache.store import FeatureLayout, FeatureStore, FeatureWriter
from siq_vl.data.mixture_config import FeatureArguments
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor

logger = logging.getLogger(__name__)

_VERSION = 1
_SCAN_ROWS, _TILES_AT_ONCE, _SAMPLED_ROWS = 64, 16, 64
_TIMES_MEASURED = 3
_FREE_BYTES = 2**30  # left on the disk
_TOWER_FIELDS = (
    ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    + ("image_size", "patch_size", "hidden_act", "layer_norm_eps")
)  # fmt: skip
_IMAGE_FIELDS = ("do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


class FeaturesTooLarge(ValueError):
    """Features would take more than the budget, or than the disk has."""


def what_features_depend_on(
    model: SiQVLForConditionalGeneration, processor: SiQVLProcessor, bf16: bool
) -> dict[str, Any]:
    """Return all that decides the features of given pictures: the tower's weights and settings, and the preprocessing.

    It is the same on both majors of transformers.

    Args:
        model: holds the tower.
        processor: prepares pictures.
        bf16: the tower computes in bfloat16 under autocast.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.model.vision_tower.state_dict().items()):
        # Name, type and shape beside the bytes: equal bytes may be other weights.
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    vision = model.config.vision_config
    # Under autocast the weights keep their type, and the tower computes in another.
    computed_in = str(next(model.model.vision_tower.parameters()).dtype)
    if bf16:
        computed_in = "bfloat16"
    tower, images = {}, {}
    for name in _TOWER_FIELDS:
        tower[name] = getattr(vision, name)
    for name in _IMAGE_FIELDS:
        images[name] = _plain(getattr(processor.image_processor, name))
    return {
        "version": _VERSION,
        "weights": digest.hexdigest(),
        "tower": tower,
        "computed in": computed_in,
        "images": images,
        "size": list(processor._tile_size({})),
        "max_tiles": processor.max_tiles,
        "a gradient": _hash_of_a_prepared_gradient(processor),
    }


def _hash_of_a_prepared_gradient(processor: SiQVLProcessor) -> str:
    """Return the hash of a picture as it is prepared, which shows what no setting does: another backend, for one."""
    gradient = np.indices((97, 61)).sum(0)[..., None] * np.array([1, 2, 3]) % 256
    prepared = processor(images=[gradient.astype(np.uint8)], return_tensors="np")["pixel_values"]
    return hashlib.blake2b(np.ascontiguousarray(prepared, np.float32).tobytes(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """Return a setting in the one type that both majors of transformers agree on."""
    if isinstance(value, (list, tuple)):
        return list(map(float, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # an enumeration on one major, a number on the other
    return value


def store_of(
    model: SiQVLForConditionalGeneration,
    processor: SiQVLProcessor,
    settings: FeatureArguments,
    bf16: bool,
    create: bool = True,
) -> FeatureStore | None:
    """Return the store of this tower and preprocessing, below `feature_cache_dir`; another tower has another one.

    Without `create`, None where there is none yet.
    """
    if not create and not Path(settings.feature_cache_dir).is_dir():
        return None  # known before the weights are hashed, which takes a while
    vision = model.config.vision_config
    height, width = processor._tile_size({})
    layout = FeatureLayout(
        height // vision.patch_size, width // vision.patch_size, vision.hidden_size, settings.feature_cache_dtype
    )
    about = what_features_depend_on(model, processor, bf16)
    name = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = Path(settings.feature_cache_dir) / f"{name}-{layout.dtype}"
    if not create and not folder.is_dir():
        return None
    return FeatureStore(folder, layout, about)


@dataclass(frozen=True)
class TileCosts:
    """Seconds that a tile's features cost, as measured here.

    Args:
        tower: to compute them.
        read: to read them from a store, and put them where the model is.
    """

    tower: float
    read: float

    def pay(self, times: float) -> bool:
        """Whether computing features once and reading them so many times is less than computing them each time."""
        return self.tower + times * self.read < times * self.tower


def tile_costs(
    model: SiQVLForConditionalGeneration,
    processor: SiQVLProcessor,
    dtype: str,
    bf16: bool,
    device: torch.device | str = "cpu",
) -> TileCosts:
    """Measure what the features of a tile cost, the best of a few times.

    A store that is larger than the machine's memory is read from its disk, which takes longer than this says.

    Args:
        model: has the tower.
        processor: knows the size of tiles.
        dtype: in which features would be stored.
        bf16: the tower computes in bfloat16 under autocast.
        device: where the tower computes.
    """
    vision = model.config.vision_config
    height, width = processor._tile_size({})
    layout = FeatureLayout(height // vision.patch_size, width // vision.patch_size, vision.hidden_size, dtype)
    n_tiles = _TILES_AT_ONCE
    if torch.device(device).type == "cpu":
        n_tiles = 1  # a large tower takes seconds
    tiles = torch.zeros(n_tiles, 3, height, width)
    computed, read = [], []
    with _tower_at_work(model, device), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for time_measured in range(_TIMES_MEASURED):
            began = time.perf_counter()
            features = _features(model, tiles, bf16).cpu()  # waits for the device
            computed.append(time.perf_counter() - began)
            if time_measured == 0:
                with FeatureWriter(Path(folder), layout) as writer:
                    writer.add(bytes(16), (height, width), layout.pack(features))
                store = FeatureStore(Path(folder), layout, {})
                entries = [store.find(bytes(16))]
            began = time.perf_counter()
            store.read(entries).to(device).cpu()
            read.append(time.perf_counter() - began)
    return TileCosts(min(computed) / n_tiles, min(read) / n_tiles)


def share_stored(rows: Dataset, store: FeatureStore) -> float:
    """Return the share of the pictures of some of the rows whose features are stored."""
    # Nothing is decoded for it: this runs before it is known whether features are stored at all.
    named = with_cached_pictures(rows, CachedPictures(store, open_missing=False))
    stored, total = 0, 0
    # Rows from all over the data set: sources may be stored in part.
    for number in range(0, len(rows), max(1, len(rows) // _SAMPLED_ROWS)):
        for picture in named[number]["images"]:
            stored += picture.entry is not None
            total += 1
    return stored / max(1, total)


def cached_rows(
    rows: Dataset,
    model: SiQVLForConditionalGeneration,
    processor: SiQVLProcessor,
    settings: FeatureArguments,
    *,
    bf16: bool = False,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Dataset:
    """Return the same rows with their pictures' features, computing those that are not stored.

    Args:
        rows: rows for `ConversationCollator`.
        model: its vision tower computes the features; it must not train.
        processor: prepares the pictures.
        settings: where features are stored, and how many.
        bf16: training runs under bfloat16 autocast.
        device: where the tower computes.
        workers: loader processes that open pictures.

    Raises:
        FeaturesTooLarge: the features would take more than `feature_cache_gb`, or than the disk has.
    """
    store = store_of(model, processor, settings, bf16)
    state = PartialState()
    if state.is_main_process and (freed := store.discard_unfinished()):
        logger.info("%s of features that an ended run left half-written are discarded", _gb(freed))
    state.wait_for_everyone()
    missing, total = _missing(rows, store, workers)
    logger.info("features of %d of %d pictures are stored in %s", total - len(missing), total, store.folder)
    if missing:
        needed = _estimate(rows, missing, store, processor)
        # The first process decides for all, so that all go on or none does.
        reasons = gather_object([_refusal(needed, settings)])
        if reasons[0]:
            raise FeaturesTooLarge(reasons[0])
        # Dealt out by picture, not by row: many rows may share one picture, which is computed once.
        my_keys = sorted(missing)[state.process_index :: state.num_processes]
        my_rows = sorted({missing[key] for key in my_keys})
        with _tower_at_work(model, device):
            _build(rows, my_rows, store, model, processor, bf16, workers)
        state.wait_for_everyone()
        store.refresh()
    return with_cached_pictures(rows, CachedPictures(store))


@dataclass(frozen=True)
class _NamedPicture:
    """A picture of a row, not opened."""

    key: bytes
    is_stored: bool
    row: int


class _NamedPictures(TorchDataset):
    """The pictures of rows, by the rows' numbers, none of them opened."""

    def __init__(self, named: Dataset, numbers: Sequence[int]):
        self.named, self.numbers = named, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> list[_NamedPicture]:
        number = self.numbers[index]
        named = []
        for picture in self.named[number]["images"]:
            named.append(_NamedPicture(picture.key, picture.entry is not None, number))
        return named


@dataclass
class _TileBatch:
    """Pictures that are prepared for the tower.

    Args:
        keys: of the pictures.
        sizes: (height, width) of each, decoded.
        tile_counts: how many tiles each has.
        tiles: of all pictures, of shape `(n_tiles, 3, height, width)`; None where there are none.
    """

    keys: list[bytes]
    sizes: list[tuple[int, int]]
    tile_counts: list[int]
    tiles: torch.Tensor | None


class _NewPictures(TorchDataset):
    """The pictures that are not stored, by the numbers of the rows that have them, opened."""

    def __init__(self, opened: Dataset, numbers: Sequence[int], processor: SiQVLProcessor):
        self.opened, self.numbers, self.processor = opened, numbers, processor

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> list[tuple[CachedPicture, torch.Tensor]]:
        """Return each new picture of a row with its tiles, `(n_tiles, 3, height, width)`."""
        prepared = []
        for picture in self.opened[self.numbers[index]]["images"]:
            if picture.image is not None:
                tiles = self.processor(images=[picture.image], return_tensors="pt")["pixel_values"]
                prepared.append((picture, tiles))
        return prepared


def _flat(items: list[list]) -> list:
    return list(chain.from_iterable(items))


def _tile_batch(rows: list[list[tuple[CachedPicture, torch.Tensor]]]) -> _TileBatch:
    """Return several rows' new pictures as one batch; what comes from a loader's process is as small as can be."""
    batch = _TileBatch([], [], [], None)
    tiles = []
    for picture, own_tiles in _flat(rows):
        batch.keys.append(picture.key)
        batch.sizes.append(picture.size[::-1])
        batch.tile_counts.append(len(own_tiles))
        tiles.append(own_tiles)
    if tiles:
        batch.tiles = torch.cat(tiles)
    return batch


def _loader(data: TorchDataset, batch_size: int, workers: int, collate: Callable[[list], Any]) -> DataLoader:
    # A generator of its own: training draws the same numbers whether or not features are stored.
    return DataLoader(
        data, batch_size, num_workers=workers, collate_fn=collate, generator=torch.Generator().manual_seed(0)
    )


def _progress(iterable: Iterable | None = None, **options) -> tqdm:
    """Return a bar that only the first process shows, and that only on a terminal."""
    hidden = None if PartialState().is_main_process else True
    return tqdm(iterable, disable=hidden, **options)


def _missing(rows: Dataset, store: FeatureStore, workers: int) -> tuple[dict[bytes, int], int]:
    """Return the pictures that are not stored, by key, with a row that has each; and how many there are in all."""
    state = PartialState()
    named = with_cached_pictures(rows, CachedPictures(store, open_missing=False))
    my_rows = range(state.process_index, len(rows), state.num_processes)
    missing: dict[bytes, int] = {}
    stored: set[bytes] = set()
    for batch in _progress(_loader(_NamedPictures(named, my_rows), _SCAN_ROWS, workers, _flat), desc="naming pictures"):
        for picture in batch:
            if picture.is_stored:
                stored.add(picture.key)
            else:
                missing.setdefault(picture.key, picture.row)
    # Several processes may have met a picture: they must agree on the row that has it.
    merged: dict[bytes, int] = {}
    for part in gather_object([missing]):
        merged = {**part, **merged}
    known = set().union(*gather_object([stored]))
    return merged, len(merged) + len(known)


def _estimate(rows: Dataset, missing: Mapping[bytes, int], store: FeatureStore, processor: SiQVLProcessor) -> int:
    """Return the bytes that the features of pictures will take, and log how they come about."""
    layout, tiles = store.layout, 1.0
    if processor.max_tiles > 1:
        tiles = _mean_tiles(rows, sorted(set(missing.values())), store, processor)
    needed = round(len(missing) * tiles * layout.tile_bytes)
    logger.info(
        "computing the features of %d pictures x %.2f tiles x %d patches x %d channels in %s: %s",
        len(missing),
        tiles,
        layout.rows * layout.columns,
        layout.width,
        layout.dtype,
        _gb(needed),
    )
    return needed


def _mean_tiles(rows: Dataset, numbers: Sequence[int], store: FeatureStore, processor: SiQVLProcessor) -> float:
    """Return how many tiles a new picture has on average, judged by some of the rows of these numbers."""
    opened = with_cached_pictures(rows, CachedPictures(store))
    sizes = []
    for number in numbers[:: max(1, len(numbers) // _SAMPLED_ROWS)]:
        for picture in opened[number]["images"]:
            if picture.image is not None:
                sizes.append(picture.size[::-1])
    if not sizes:
        return 1.0
    return float(np.mean(processor._get_num_multimodal_tokens(sizes)["num_image_patches"]))


def _refusal(needed: int, settings: FeatureArguments) -> str | None:
    """Return why so many bytes may not be written; None where they may."""
    folder = Path(settings.feature_cache_dir)
    # The budget is for the folder: stores of other towers count, too.
    used = sum(path.stat().st_size for path in folder.rglob("*.features"))
    budget = settings.feature_cache_gb * 1e9
    if used + needed > budget:
        return (
            f"the features take {_gb(needed)}, beside {_gb(used)} in {folder}, more than feature_cache_gb="
            f"{settings.feature_cache_gb:g}: raise it, remove stores that are no longer needed, choose "
            "feature_cache_dtype int8, or set feature_cache off"
        )
    free = shutil.disk_usage(folder).free
    if needed + _FREE_BYTES > free:
        return (
            f"the features take {_gb(needed)}, but the disk of {folder} has {_gb(free)} free, of which {_gb(_FREE_BYTES)} are "
            "left alone: free some space, choose another feature_cache_dir, or set feature_cache off"
        )
    return None


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


@contextmanager
def _tower_at_work(model: SiQVLForConditionalGeneration, device: torch.device | str) -> Iterator[None]:
    """Put the vision side on a device and in evaluation mode, and back."""
    parts = (model.model.vision_tower, model.model.projector)
    before = []
    for part in parts:
        before.append((part, part.training, next(part.parameters()).device))
        # No dropout: stored features are those of evaluation.
        part.eval().to(device)
    try:
        yield
    finally:
        for part, training, place in before:
            part.train(training).to(place)


@torch.no_grad()
def _build(
    rows: Dataset,
    numbers: Sequence[int],
    store: FeatureStore,
    model: SiQVLForConditionalGeneration,
    processor: SiQVLProcessor,
    bf16: bool,
    workers: int,
) -> None:
    """Compute and store the features of the pictures of some rows, as far as they are not stored."""
    opened = with_cached_pictures(rows, CachedPictures(store))
    batches = _loader(_NewPictures(opened, numbers, processor), _TILES_AT_ONCE, workers, _tile_batch)
    errors, written = _Errors(), set()
    progress = _progress(total=len(numbers), desc="computing features")
    with progress, FeatureWriter(store.folder, store.layout) as writer:
        for batch in batches:
            if batch.tiles is not None:
                features = _features(model, batch.tiles, bf16)
                packed = store.layout.pack(features)
                # What is stored is compared with what was computed, so that the log can say what it costs.
                errors.add(features, store.layout.unpack(torch.from_numpy(packed)))
                parts = np.split(packed, np.cumsum(batch.tile_counts)[:-1])
                for key, size, part in zip(batch.keys, batch.sizes, parts, strict=True):
                    # The same picture may be in several rows.
                    if key not in written:
                        writer.add(key, size, part)
                        written.add(key)
            # The loader gives so many rows at once, the last time fewer.
            progress.update(min(_TILES_AT_ONCE, len(numbers) - progress.n))
    logger.info("%d pictures, %s; %s", len(written), _gb(writer.written), errors.text(store.layout.dtype))


def _features(model: SiQVLForConditionalGeneration, tiles: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Return what the tower makes of tiles `(n_tiles, 3, height, width)`: `(n_tiles, n_patches, width)`."""
    device = next(model.model.vision_tower.parameters()).device
    parts = []
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        # A row may have any number of pictures, and a picture many tiles: the device takes so many at once.
        for part in tiles.split(_TILES_AT_ONCE):
            output: Any = model.get_image_features(part.to(device), return_dict=True)
            parts.append(output.last_hidden_state)
    return torch.cat(parts)


class _Errors:
    """The error that storing features in fewer bits makes, relative to the length of a patch's features."""

    def __init__(self):
        self.largest, self.sum, self.count = 0.0, 0.0, 0

    def add(self, features: torch.Tensor, stored: torch.Tensor) -> None:
        """Compare features of shape `(n_tiles, n_patches, width)` with what is read back of them."""
        features = features.float().cpu().flatten(0, 1)
        error = (stored.float().reshape(features.shape) - features).norm(dim=-1)
        # A patch of zeros has no length to compare with.
        relative = error / features.norm(dim=-1).clamp(min=1e-12)
        self.largest = max(self.largest, relative.max().item())
        self.sum += relative.sum().item()
        self.count += relative.numel()

    def text(self, dtype: str) -> str:
        """Return the errors in words."""
        mean = self.sum / max(1, self.count)
        return (
            f"stored in {dtype} they differ by {mean:.2e} on average, {self.largest:.2e} at most, of a patch's length"
        )

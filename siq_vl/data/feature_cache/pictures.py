"""The pictures of a row: opened, or, where a frozen vision tower's features of them are stored, named in their place.

A row's `images` are `RowPicture`s: PIL images, or `CachedPicture`s in a data set that `with_cached_pictures` returned,
there all of them. Whatever makes rows comes by their pictures through a `Pictures`, which opens each, or through its
subclass `CachedPictures`, which opens those alone whose features are not stored. `encode` is where the two kinds part:
it turns them into what the model is given.

A picture is known by the hash of its content: of the encoded bytes where it lies in a file or a data set, so that a
picture whose features are stored is never decoded, resized or normalised again; of its pixels where it exists only as
such, for instance because it is drawn.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from siq_vl.data.feature_cache.store import FeatureStore
from siq_vl.data.images import read_encoded
from siq_vl.processing_siq_vl import IMAGE_TOKEN, SiQVLProcessor, load_rgb

KEY_BYTES = 16
_UNKNOWN_SIZE = (1, 1)  # of a picture that nobody has opened


@dataclass(frozen=True)
class CachedPicture:
    """A picture of a row, in place of its pixels.

    Args:
        key: hash of its content.
        size: width and height, decoded; of a picture that is neither stored nor opened, 1 x 1.
        entry: where its features are stored.
        store: the store.
        image: the picture itself, where it had to be opened.
    """

    key: bytes
    size: tuple[int, int] = _UNKNOWN_SIZE
    entry: np.void | None = None
    store: FeatureStore | None = field(default=None, repr=False)
    image: Any = field(default=None, repr=False)


RowPicture = Image.Image | CachedPicture


class Pictures:
    """How rows come by their pictures: each is opened."""

    def from_encoded(
        self, content: bytes | Path, max_side: int | None, decode: Callable[[], Image.Image]
    ) -> RowPicture:
        """Return a picture by its file or encoded bytes.

        Args:
            content: the file, or its content.
            max_side: larger pictures are scaled down to it while they are decoded.
            decode: decodes it.

        Raises:
            ValueError: what `decode` raises; the file cannot be read.
        """
        return decode()

    def from_pixels(self, image: Any) -> RowPicture:
        """Return a picture that is open, of any kind that the processor takes."""
        return image


class CachedPictures(Pictures):
    """How rows come by their pictures where features are stored: those that the store knows are not opened.

    Args:
        store: stored features.
        open_missing: False: pictures that are not stored are named, not opened.
    """

    def __init__(self, store: FeatureStore, open_missing: bool = True):
        self.store, self.open_missing = store, open_missing

    def from_encoded(
        self, content: bytes | Path, max_side: int | None, decode: Callable[[], Image.Image]
    ) -> CachedPicture:
        """Return a picture by its file or encoded bytes; see `Pictures`."""
        encoded = read_encoded(content) if isinstance(content, Path) else content
        # The bound is part of the key: the same file, scaled down further, has other features.
        key = _hashed(f"encoded, at most {max_side}", encoded)
        stored = self._stored(key)
        if stored is not None:
            return stored
        if not self.open_missing:
            return CachedPicture(key)
        image = decode()
        return CachedPicture(key, image.size, image=image)

    def from_pixels(self, image: Any) -> CachedPicture:
        """Return a picture that is open, known by its pixels."""
        pixels = np.asarray(load_rgb(image))  # palettes, transparency and orientation are part of the content
        key = _hashed(f"{pixels.dtype} {pixels.shape}", pixels.tobytes())
        stored = self._stored(key)
        if stored is not None:
            return stored
        size = pixels.shape[1::-1]
        if not self.open_missing:
            return CachedPicture(key, size)
        return CachedPicture(key, size, image=image)

    def _stored(self, key: bytes) -> CachedPicture | None:
        entry = self.store.find(key)
        if entry is None:
            return None
        return CachedPicture(key, (int(entry["width"]), int(entry["height"])), entry, self.store)


def _hashed(kind: str, content: bytes) -> bytes:
    digest = hashlib.blake2b(kind.encode() + b"\0", digest_size=KEY_BYTES)
    digest.update(content)
    return digest.digest()


class RowTransform(ABC):
    """Makes the rows of a data set when they are read; what `Dataset.with_transform` is given.

    A data set whose transform is one can be read with features in place of pictures, none of which is then opened.
    """

    @abstractmethod
    def read(self, batch: Mapping[str, list], pictures: Pictures) -> dict[str, list]:
        """Return the columns of rows, their `images` come by through `pictures`.

        Args:
            batch: the columns that are stored.
            pictures: opens pictures, or names them.
        """

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        """Return the columns of rows, their pictures opened."""
        return self.read(batch, Pictures())


class _OpenedRows(RowTransform):
    """Rows of any other data set: their pictures are open when they get here, and known by their pixels."""

    def __init__(self, transform: Callable[[Mapping], Mapping[str, list]] | None):
        self.transform = transform

    def read(self, batch: Mapping[str, list], pictures: Pictures) -> dict[str, list]:
        if self.transform is not None:
            batch = self.transform(batch)
        columns = dict(batch)
        if "images" in columns:
            columns["images"] = [list(map(pictures.from_pixels, images)) for images in columns["images"]]
        return columns


@dataclass(frozen=True)
class _ReadWith:
    """A transform that is given another way to come by its pictures."""

    transform: RowTransform
    pictures: Pictures

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        return self.transform.read(batch, self.pictures)


def with_cached_pictures(rows: Dataset, pictures: CachedPictures) -> Dataset:
    """Return the same rows with `CachedPicture`s as their `images`."""
    transform = rows.format["format_kwargs"].get("transform")
    if not isinstance(transform, RowTransform):
        transform = _OpenedRows(transform)
    return rows.with_transform(_ReadWith(transform, pictures))


def as_columns(rows: Sequence[Mapping]) -> dict[str, list]:
    """Return rows of equal keys, one or more, as a transform has to return them: a list for each key."""
    columns: dict[str, list] = {}
    for name in rows[0]:
        columns[name] = [row[name] for row in rows]
    return columns


def encode(
    processor: SiQVLProcessor, images: Sequence[RowPicture], texts: Sequence[str]
) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """Return token ids of texts whose placeholders are expanded, and what the model is given of the images.

    Args:
        processor: expands, tokenizes, prepares pictures.
        images: of all texts, in order; either all open, or all `CachedPicture`s whose features are stored.
        texts: may have any number of placeholders, in all as many as there are images.

    Returns:
        Ids of each text; `pixel_values` of shape `(n_tiles, 3, height, width)`, or `vision_features` of shape
        `(n_tiles, rows, columns, vision_hidden_size)`, or nothing where there are no images.

    Raises:
        ValueError: the images do not fit the placeholders, or features are not stored.
    """
    if not images:
        encoded = processor(images=None, text=list(texts), add_special_tokens=False)
        return encoded["input_ids"], {}
    cached = [image for image in images if isinstance(image, CachedPicture)]
    if not cached:
        encoded = processor(images=list(images), text=list(texts), add_special_tokens=False)
        return encoded["input_ids"], {"pixel_values": torch.as_tensor(encoded["pixel_values"])}
    entries = [picture.entry for picture in cached if picture.entry is not None]
    if len(entries) < len(images):
        raise ValueError(
            f"{len(images) - len(entries)} of {len(images)} pictures of a batch have no stored features: they have "
            "changed since the features were computed; run again, or set feature_cache to off"
        )
    return _expanded_ids(processor, cached, texts), {"vision_features": cached[0].store.read(entries)}


def _expanded_ids(
    processor: SiQVLProcessor, pictures: Sequence[CachedPicture], texts: Sequence[str]
) -> list[list[int]]:
    """Return token ids of texts, their placeholders expanded to what pictures of these sizes take."""
    sizes = [picture.size[::-1] for picture in pictures]  # (height, width)
    expanded = []
    done = 0
    for text in texts:
        count = text.count(IMAGE_TOKEN)
        if count:
            text = processor.expand_image_tokens(text, sizes[done : done + count])
            done += count
        expanded.append(text)
    if done < len(sizes):
        raise ValueError(f"{len(sizes) - done} of {len(sizes)} images have no placeholder: each needs one in the text")
    return processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]

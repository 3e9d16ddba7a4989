"""Pictures by their content, and the stored features of a frozen vision tower in place of their pixels.

A picture is known by the hash of its content: of the encoded bytes where it lies in a file or a data set, so that a
picture whose features are stored is never decoded, resized or normalised again; of its pixels where it exists only as
such, for instance because it is drawn.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
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


@dataclass(frozen=True)
class Picture:
    """A picture of a row, in place of its pixels.

    Args:
        key: hash of its content.
        size: width and height, decoded; of a picture that is neither stored nor opened, 1 x 1.
        entry: where its features are stored.
        store: the store.
        image: the picture itself, where it had to be opened.
    """

    key: bytes
    size: tuple[int, int] = (1, 1)
    entry: np.void | None = None
    store: FeatureStore | None = field(default=None, repr=False)
    image: Any = field(default=None, repr=False)


class Pictures:
    """Stands between rows and their pictures: hands out those that a store knows, and opens others.

    Args:
        store: stored features.
        open_missing: False: pictures that are not stored are named, not opened.
    """

    def __init__(self, store: FeatureStore, open_missing: bool = True):
        self.store, self.open_missing = store, open_missing

    def encoded(self, content: bytes | Path, max_side: int | None, decode: Callable[[], Image.Image]) -> Picture:
        """Return a picture by its file or encoded bytes.

        Args:
            content: the file, or its content.
            max_side: larger pictures are scaled down to it while they are decoded.
            decode: decodes it.

        Raises:
            ValueError: what `decode` raises; the file cannot be read.
        """
        encoded = read_encoded(content) if isinstance(content, Path) else content
        return self._picture(_hashed(f"encoded, at most {max_side}", encoded), decode)

    def opened(self, image: Any) -> Picture:
        """Return a picture of any kind that the processor takes, by its pixels."""
        if isinstance(image, Picture):
            return image
        pixels = np.asarray(load_rgb(image))  # palettes, transparency and orientation are part of the content
        key = _hashed(f"{pixels.dtype} {pixels.shape}", pixels.tobytes())
        return self._picture(key, lambda: image, pixels.shape[1::-1])

    def _picture(self, key: bytes, decode: Callable[[], Any], size: tuple[int, int] | None = None) -> Picture:
        entry = self.store.find(key)
        if entry is not None:
            return Picture(key, (int(entry["width"]), int(entry["height"])), entry, self.store)
        if not self.open_missing:
            return Picture(key)
        image = decode()
        return Picture(key, size or image.size, image=image)


def _hashed(kind: str, content: bytes) -> bytes:
    digest = hashlib.blake2b(kind.encode() + b"\0", digest_size=KEY_BYTES)
    digest.update(content)
    return digest.digest()


@dataclass(frozen=True)
class _KeyedRows:
    """A data set's transform whose rows hold `Picture`s."""

    transform: Callable[..., Mapping[str, list]] | None
    pictures: Pictures

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        made = dict(batch if self.transform is None else self.transform(batch))
        if "images" in made:
            made["images"] = [[self.pictures.opened(image) for image in images] for images in made["images"]]
        return made


def with_pictures(rows: Dataset, pictures: Pictures) -> Dataset:
    """Return the same rows with `Picture`s as their `images`.

    A transform of the rows that takes `pictures` opens none that are stored; the pictures of others are opened as
    ever, and known by their pixels.
    """
    transform = rows.format["format_kwargs"].get("transform")
    if transform is not None and "pictures" in inspect.signature(transform).parameters:
        transform = partial(transform, pictures=pictures)
    return rows.with_transform(_KeyedRows(transform, pictures))


def encode(
    processor: SiQVLProcessor, images: Sequence[Any], texts: Sequence[str]
) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """Return token ids of texts whose placeholders are expanded, and what the model is given of the images.

    Args:
        processor: expands, tokenizes, prepares pictures.
        images: of all texts, in order; pictures, or `Picture`s whose features are stored.
        texts: may have any number of placeholders, in all as many as there are images.

    Returns:
        Ids of each text; `pixel_values` of shape `(n_tiles, 3, height, width)`, or `vision_features` of shape
        `(n_tiles, rows, columns, vision_hidden_size)`, or nothing where there are no images.

    Raises:
        ValueError: the images do not fit the placeholders, or features are not stored.
    """
    if not images or not isinstance(images[0], Picture):
        encoded = processor(images=list(images) or None, text=list(texts), add_special_tokens=False)
        tensors = {"pixel_values": torch.as_tensor(encoded["pixel_values"])} if images else {}
        return encoded["input_ids"], tensors
    missing = [image for image in images if not isinstance(image, Picture) or image.entry is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(images)} pictures of a batch have no stored features: they have changed since the "
            "features were computed; run again, or set feature_cache to off"
        )
    sizes = iter([image.size[::-1] for image in images])
    expanded = []
    for text in texts:
        count = text.count(IMAGE_TOKEN)
        expanded.append(processor.expand_image_tokens(text, list(islice(sizes, count))) if count else text)
    if left := len(list(sizes)):
        raise ValueError(f"{left} of {len(images)} images have no placeholder: each needs one in the text")
    ids = processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]
    return ids, {"vision_features": images[0].store.read([image.entry for image in images])}

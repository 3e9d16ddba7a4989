"""Images of SiQ-VL: opens pictures of every kind, brings them to upright RGB and cuts large ones into tiles."""

import base64
import os
import struct
import urllib.request
import zlib
from http.client import HTTPException
from io import BytesIO
from typing import Any, Optional, Union

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from transformers.image_transforms import resize
from transformers.image_utils import ChannelDimension

from .configuration_siq_vl import tile_grid

DOWNLOAD_TIMEOUT = 30  # seconds

# What Pillow's readers raise for damaged files, from the common to the rare.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    struct.error,
    zlib.error,
)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def load_rgb(image: Any, input_data_format: Optional[str] = None) -> Union[Image.Image, np.ndarray]:
    """
    Brings one image of any kind to RGB.

    Args:
        image: One of
            - a PIL image of any mode: see [`to_rgb`];
            - a NumPy array or tensor of shape `(height, width)`, `(height, width, channels)` or `(channels, height,
              width)`, with 1, 3 or 4 channels: integers from 0 to 255, 16-bit integers, booleans or floats from 0 to 1;
            - a path, an `http(s)` URL, a `data:` URL, or base64 text: the first frame of a picture file.
        input_data_format (`str`, *optional*):
            `"channels_first"` or `"channels_last"` for arrays. Where not given, the axis of 3 channels is looked for,
            then one of 4 or 1; where both could be, arrays have their channels last and tensors first.

    Returns:
        An upright RGB image, or an array of shape `(height, width, 3)`.

    Raises:
        ValueError: if the image is of another kind, empty, damaged, not finite, or a file of more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(image, (str, os.PathLike)):
        return _open(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, torch.Tensor):
        return _array_to_rgb(_tensor_to_array(image), input_data_format, True)
    if isinstance(image, np.ndarray):
        return _array_to_rgb(image, input_data_format, False)
    raise ValueError(
        f"Got an image of type {type(image).__name__}, but it must be a PIL image, an array, a tensor, a path, a URL or "
        "base64 text: convert it to one of these."
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Converts a PIL image of any mode to RGB, turned as its EXIF orientation says.

    Transparent pixels are composited on white. 16-bit greyscale is scaled to 8 bits, which PIL's own conversion would
    clip. An image opened from a file shows the frame that it stands at, the first unless moved.

    Args:
        image (`PIL.Image.Image`): An image. What is already upright RGB is returned as it is.

    Returns:
        `PIL.Image.Image`: an image of mode RGB.

    Raises:
        ValueError: if the image is empty, damaged, of a mode that has no colours, or comes from a file and has more
            pixels than `PIL.Image.MAX_IMAGE_PIXELS`, which is found out before they are decoded.
    """
    if 0 in image.size:
        raise ValueError(f"Got an image of {image.width} x {image.height} pixels, but no side may be 0: leave it out.")
    if isinstance(image, ImageFile.ImageFile):
        _check_pixels(image)
    try:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except _TOO_LARGE as error:
        raise ValueError(
            f"{_name(image)} has too many pixels to be decoded safely: make it smaller ({error})"
        ) from error
    except _DAMAGED as error:
        raise ValueError(
            f"{_name(image)} cannot be decoded and converted to RGB: save it again as PNG or JPEG ({error})"
        ) from error


def resize_to_tiles(
    image: Union[Image.Image, np.ndarray], tile_height: int, tile_width: int, max_tiles: int, resample: int
) -> list[np.ndarray]:
    """
    Resizes an image to the tiles of its [`tile_grid`], row by row, with a thumbnail of the whole at the end.

    Args:
        image (`PIL.Image.Image` or `np.ndarray` of shape `(height, width, 3)`): What [`load_rgb`] returns.
        tile_height (`int`): Height of a tile in pixels.
        tile_width (`int`): Width of a tile in pixels.
        max_tiles (`int`): Largest number of tiles beside the thumbnail.
        resample (`int`): PIL's number of the filter.

    Returns:
        `list[np.ndarray]`: arrays of shape `(tile_height, tile_width, 3)`. The last is the image resized whole, and
        the only one where one tile is enough.
    """
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    rows, columns = tile_grid(height, width, tile_height, tile_width, max_tiles)

    def resized(rows: int, columns: int) -> np.ndarray:
        size = (rows * tile_height, columns * tile_width)
        return resize(image, size, resample=resample, input_data_format=ChannelDimension.LAST)

    thumbnail = resized(1, 1)
    if rows * columns == 1:
        return [thumbnail]
    canvas = resized(rows, columns).reshape(rows, tile_height, columns, tile_width, 3)
    return [canvas[row, :, column] for row in range(rows) for column in range(columns)] + [thumbnail]


def _open(source: Union[str, os.PathLike]) -> Image.Image:
    """Opens a path, URL or base64 text as RGB."""
    name = str(source) if len(str(source)) <= 80 else f"{str(source)[:77]}..."
    try:
        image = Image.open(_file_of(source))
    except _TOO_LARGE as error:
        raise ValueError(
            f"{name!r} has too many pixels to be decoded safely: make it smaller first ({error})"
        ) from error
    except (*_DAMAGED, HTTPException) as error:
        raise ValueError(
            f"{name!r} cannot be read as an image: pass the path, URL or base64 text of an undamaged PNG, JPEG, WebP or "
            f"the like ({error})"
        ) from error
    with image:
        return to_rgb(image)


def _file_of(source: Union[str, os.PathLike]) -> Union[str, os.PathLike, BytesIO]:
    """The file that a path, URL or base64 text stands for."""
    if isinstance(source, os.PathLike):
        return source
    if source.startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "siq-vl"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            return BytesIO(response.read())
    if os.path.isfile(source):
        return source
    text = source.partition(",")[2] if source.startswith("data:") else source
    try:
        return BytesIO(base64.b64decode("".join(text.split()), validate=True))
    except ValueError as error:
        raise ValueError("it is no URL, no file and no base64 text") from error


def _name(image: Image.Image) -> str:
    """How an error names an image."""
    file = f" {image.filename!r}" if isinstance(image, ImageFile.ImageFile) and image.filename else ""
    return f"The image{file} of {image.width} x {image.height} pixels in mode {image.mode}"


def _check_pixels(image: ImageFile.ImageFile) -> None:
    """Refuses a file that would become too many pixels; its header says how many, before any is decoded."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{_name(image)} has {image.width * image.height} of them, but a file may have at most {limit}, or it could be "
            "a decompression bomb: make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("it holds values that are not finite")
    if image.mode.startswith("I"):
        image = Image.fromarray(_to_eight_bits(np.asarray(image), always=image.mode != "I"))
    elif image.mode in ("La", "RGBa"):  # premultiplied alpha, which PIL converts only to its plain kind
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray, always: bool) -> np.ndarray:
    """Scales integers of 16 bits to `uint8`; without `always`, only where one of them does not fit into 8 bits."""
    if always or values.max() > 255:
        values = values / 257
    return np.clip(values, 0, 255).round().astype(np.uint8)


def _tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor; floats of any precision as `float32`, which NumPy knows."""
    try:
        values = tensor.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    except (TypeError, RuntimeError) as error:  # meta, sparse and quantised tensors
        raise ValueError(
            f"Got an image tensor of type {tensor.dtype} and layout {tensor.layout} on the device {tensor.device}, but it "
            f"must hold numbers that can be read: pass a dense tensor on the CPU or an accelerator ({error})."
        ) from error


def _array_to_rgb(array: np.ndarray, input_data_format: Optional[str], is_tensor: bool) -> np.ndarray:
    """Brings an array to the shape `(height, width, 3)`, and checks its values."""
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"Got an image array of shape {array.shape} and type {array.dtype}, but it must hold numbers in the shape "
            "(height, width), (height, width, channels) or (channels, height, width), with no side of 0: convert it."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("Got an image array with values that are not finite: replace NaN and infinity first.")
    if array.ndim == 2:
        array = array[..., None]
    elif _channels_first(array.shape, input_data_format, is_tensor):
        array = np.moveaxis(array, 0, -1)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = _to_eight_bits(array, always=False)
    if array.shape[-1] == 4:
        if array.dtype != np.uint8:
            raise ValueError(f"Got an image array with transparency of type {array.dtype}: convert it to uint8.")
        return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(array))))
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def _channels_first(shape: tuple[int, ...], input_data_format: Optional[str], is_tensor: bool) -> bool:
    """Whether the first of three axes holds the channels; see [`load_rgb`]."""
    ends = (shape[0], shape[2])
    if input_data_format is not None:
        if not isinstance(input_data_format, str) or input_data_format not in ("channels_first", "channels_last"):
            raise ValueError(
                f'input_data_format is {input_data_format!r:.80}, but must be "channels_first" or "channels_last": correct '
                "it, or leave it out."
            )
        first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
        if ends[0 if first else 1] in (1, 3, 4):
            return first
    else:
        for wanted in (3, 4, 1):
            if wanted in ends:
                return is_tensor if ends[0] == ends[1] else ends[0] == wanted
    raise ValueError(
        f"Got an image array of shape {shape}, but its first or last axis must hold 1, 3 or 4 channels: convert it to "
        "RGB first, or correct input_data_format."
    )


__all__ = ["load_rgb", "resize_to_tiles", "to_rgb"]

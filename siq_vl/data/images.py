"""Reading pictures: from disk or memory, from under one folder, within bounds of size."""

import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from siq_vl.processing_siq_vl import to_rgb

# Formats that Pillow decodes itself; others (EPS, for one) start programs of the machine.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")
# What Pillow's readers raise for damaged files, from the common to the rare.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)
MAX_FILE_BYTES = 1 << 30  # more than any picture of `PIL.Image.MAX_IMAGE_PIXELS` needs


def open_image(path: Path, max_side: int | None = None) -> Image.Image:
    """Return a picture as RGB, upright, fully decoded.

    Args:
        path: the file.
        max_side: a picture with a longer side is scaled down to it while it is read.

    Raises:
        ValueError: there is no such file, it is no picture, it is damaged, or it is too large to be safe.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file: pass the path of a picture")
    return decode_image(path, str(path), max_side)


def decode_image(source: Path | bytes, name: str, max_side: int | None = None) -> Image.Image:
    """Return a picture from a file or from encoded bytes as RGB, upright, fully decoded.

    The number of pixels is known from the header, so that nothing is decoded of a picture with more of them than
    `PIL.Image.MAX_IMAGE_PIXELS`.

    Args:
        source: the file, or its content.
        name: what errors call it.
        max_side: a picture with a longer side is scaled down to it while it is read.

    Raises:
        ValueError: it is no picture, it is damaged, or it is too large to be safe.
    """
    file = BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            # Pillow only warns of what is up to twice too large.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return _decoded(image, max_side)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that can be read: pass a PNG, JPEG, WebP or the like") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels to be opened safely: make it smaller first ({error})") from error
    except DAMAGE as error:
        raise ValueError(f"{name} is damaged and cannot be decoded: save or download it again ({error})") from error


def _decoded(image: Image.Image, max_side: int | None) -> Image.Image:
    if max_side is not None and max(image.size) > max_side:
        image.draft("RGB", (max_side, max_side))  # JPEG alone: decode at a half, a quarter or an eighth
        image.load()
        image.thumbnail((max_side, max_side), reducing_gap=2.0)
    image.load()
    return to_rgb(image)


def read_encoded(path: Path) -> bytes:
    """Return a picture file as it is.

    Raises:
        ValueError: it cannot be read, or is larger than `MAX_FILE_BYTES`.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            # It would be read into memory whole.
            raise ValueError(f"{path.name} is larger than {MAX_FILE_BYTES >> 20} MiB: make it smaller first")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror}): check the file") from error


def find_under(name: str, roots: Sequence[Path]) -> Path:
    """Return the file of that name under one of the folders.

    Args:
        name: a path relative to a folder, or an absolute one inside it.
        roots: the folders, in the order in which they are searched.

    Raises:
        PermissionError: the name leads out of every folder, by `..`, as an absolute path or through a link.
        FileNotFoundError: there is no such file, or there could be none: the name is too long, is no Unicode or holds a
            NUL character, or its links lead nowhere.
    """
    shown = name[:200]  # a name comes from a row, and may be of any length
    try:
        inside = []
        for root in roots:
            # Compared after links are followed: one inside the folder may lead out of it.
            path = _real(root / name)
            if path.is_relative_to(_real(root)):
                inside.append(path)
    except ValueError as error:
        why = "it holds a NUL character"
        if isinstance(error, UnicodeError):  # half of a surrogate pair
            why = "it is not Unicode"
        raise FileNotFoundError(f"no file can be named {shown!r}: {why}") from error
    if not inside:
        raise PermissionError(f"{shown} is not inside {', '.join(map(str, roots)) or 'any known folder'}")
    for path in inside:
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(f"there is no file {shown} in {', '.join(map(str, roots))}")


def _real(path: Path) -> Path:
    """Return a path with its links followed as far as they lead, where `Path.resolve` fails on a loop."""
    return Path(os.path.realpath(path))

"""Reading pictures from disk."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from siq_vl.processing_siq_vl import to_rgb


def open_image(path: Path) -> Image.Image:
    """Return a picture as RGB, fully decoded.

    Raises:
        ValueError: there is no such file, it is no picture, it is damaged, or it is too large to be safe.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: pass the path of a picture")
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that can be read: pass a PNG, JPEG, WebP or the like") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels to be opened safely: make it smaller first ({error})") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged and cannot be decoded: save or download it again ({error})") from error

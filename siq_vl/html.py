"""HTML pages from the templates in `templates/`. Whatever a value holds is escaped by the template engine."""

import base64
import io
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values) -> str:
    """Return a template of `templates/` filled with values; what is no `Markup` is escaped.

    Raises:
        jinja2.UndefinedError: the template asks for a value that is not given.
    """
    return _environment().get_template(template).render(**values)


def image_data_url(image: Image.Image, format: str = "PNG", **options) -> str:
    """Return a picture as a `data:` address, so that a page needs no file beside it.

    Args:
        image: the picture, in the size in which it is stored in the page.
        format: a format that browsers show, "PNG" or "JPEG".
        options: options of that format's encoder, such as `quality`.
    """
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Style sheets and scripts are ours and stand in the page as they are.
    environment.globals["file"] = lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))
    return environment

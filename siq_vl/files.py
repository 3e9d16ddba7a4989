"""Files that are written whole, or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which becomes `path` when the block has written it.

    Whoever reads `path`, or ends this process, finds the old file or the new one, never half of it. Nothing is left of the
    temporary file but by `kill -9`.
    """
    # A name of its own: other processes may be writing the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, all or nothing: see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

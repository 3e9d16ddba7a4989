"""What goes wrong with an id of the Hub, in one line: what was expected, what is there, and what to do."""

import re

import pyarrow
from datasets.exceptions import CastError, DatasetsError
from huggingface_hub.errors import HfHubHTTPError

# What the libraries raise: requests' errors are OSErrors, httpx's have this class in common with answers of an error.
HUB_FAILURES: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    RuntimeError,
    DatasetsError,
    CastError,
    pyarrow.ArrowException,
    HfHubHTTPError,
    HfHubHTTPError.__bases__[0],
)
_SHOWN = 600  # characters of a library's own words
_GATED = ("gated", "restricted", "awaiting a review", "401 client error", "403 client error", "authenticated")
_CUT_OFF = (
    ("incomplete", "connection", "timed out", "couldn't reach", "max retries", "offline", "cannot send a request")
    + ("peer closed", "disconnected", "can't load")
)  # fmt: skip


def unreadable_data_set(id: str, subset: str | None, split: str, error: Exception) -> ValueError:
    """Return the error for a data set of the Hub that cannot be read.

    Args:
        id: of the data set.
        subset: its configuration.
        split: of it.
        error: what the library raised.
    """
    wanted = f"{id}, {f'configuration {subset!r}, ' if subset else ''}split {split!r}"
    said = _words(error)
    # `datasets` tells what is there: the configurations, the splits, or the columns of file and card.
    if "BuilderConfig" in said or "Config name is missing" in said:
        fix = "set `subset` to one of these"
    elif re.search("Unknown split|Bad split", said):
        fix = "set `split` to one of these"
    elif isinstance(error, CastError) or "column" in said or "cast" in said.casefold():
        fix = "its files are laid out otherwise than its card says; read an earlier revision, or a copy with these columns"
    else:
        fix = _advice(said, id, "datasets/")
    return ValueError(f"{wanted} cannot be read from the Hub ({said}): {fix}")


def unreadable_model(id: str, error: Exception) -> ValueError:
    """Return the error for a model of the Hub, or of a folder, that cannot be loaded."""
    said = _words(error)
    return ValueError(f"{id} cannot be loaded ({said}): {_advice(said, id, '')}")


def _words(error: BaseException) -> str:
    """Return an error's own words and those of what caused it, on one line."""
    texts: list[str] = []
    found: BaseException | None = error
    while found is not None and len(texts) < 3:
        text = " ".join(str(found).split()) or type(found).__name__
        if not any(text in known for known in texts):
            texts.append(text)
        found = found.__cause__
    return "; ".join(texts)[:_SHOWN]


def _advice(said: str, id: str, page: str) -> str:
    lower = said.casefold()
    if any(mark in lower for mark in _GATED):
        return f"ask for access on the page {page}{id} of the Hub, then log in with `hf auth login`, or set HF_TOKEN"
    if any(mark in lower for mark in _CUT_OFF):
        return "check the network and HF_ENDPOINT, and run the same command again: what has come already is kept"
    return "check the id and its revision; a private one needs `hf auth login`, or HF_TOKEN"

"""The fields of a row, each in the type that it must have.

Rows come from anywhere. What is asked of one goes through here, so that a field that is missing or of another type
leaves out its row, for a reason in words, and stops nothing else.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import pyarrow

BAD_ROW = "row that cannot be read"
_MOST_DETAIL = 500  # characters of a detail, which may quote the row
_MOST_DIGITS = 18  # of a number that is written as text
_MOST_BITS = 10_000  # of a number that becomes text; Python writes no longer ones
_KINDS = {
    type(None): "null",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    bytes: "bytes",
}
# What pyarrow raises for values that Python has no counterpart of: text that is not UTF-8, dates beyond the year 9999.
_NOT_PYTHON = (ValueError, OverflowError, NotImplementedError)


class Dropped(Exception):
    """A row is left out.

    Args:
        reason: a few words, never those of the row; rows are counted by it.
        detail: what exactly is wrong with this row, for the log; cut where it is long.
        defect: the row is broken, rather than unwanted. Too many defects stop a run.
    """

    def __init__(self, reason: str, detail: str = "", *, defect: bool = False):
        if len(detail) > _MOST_DETAIL:
            detail = f"{detail[:_MOST_DETAIL]}..."
        # A row may hold what no log can be written with: half of a surrogate pair.
        detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")
        said = reason
        if detail:
            said = f"{reason}: {detail}"
        super().__init__(said)
        self.reason, self.detail, self.defect = reason, detail, defect


@dataclass(frozen=True)
class Unreadable:
    """Stands for a row, or for one value of it, that is not to be had.

    Args:
        why: in words that follow "it is".
    """

    why: str


def bad_row(detail: str) -> Dropped:
    """Return what leaves out a row that does not have the form of its format."""
    return Dropped(BAD_ROW, detail, defect=True)


def kind(value: Any) -> str:
    """Return what a value is, in words; it is never written out, since it may be of any size and depth."""
    if isinstance(value, Unreadable):
        return value.why
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def field(row: Mapping, *names: str) -> Any:
    """Return the first of these fields that is not null, or None where those that are there are null.

    Raises:
        Dropped: the row has none of them.
    """
    there = [name for name in names if name in row]
    if not there:
        raise bad_row(f"it has no field {' or '.join(names)}")
    for name in there:
        if row[name] is not None:
            return row[name]
    return None


def as_text(value: Any, name: str) -> str:
    """Return a text, or a finite number as text; of null the empty text.

    Raises:
        Dropped: it is anything else.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, (Real, Decimal)):
        raise bad_row(f"{name} is {kind(value)}, where a text is needed")
    # Published answers are often numbers: 3, or 2.5.
    is_whole = isinstance(value, Integral)
    too_long = isinstance(value, Integral) and int(value).bit_length() > _MOST_BITS
    if too_long or not (is_whole or math.isfinite(value)):
        raise bad_row(f"{name} is a number that is not finite or too long, where a text is needed")
    return str(value)


def as_list(value: Any, name: str) -> list:
    """Return a list.

    Raises:
        Dropped: it is anything else.
    """
    if not isinstance(value, (list, tuple)):
        raise bad_row(f"{name} is {kind(value)}, where a list is needed")
    return list(value)


def as_items(value: Any) -> list:
    """Return a list as it is, a single value as a list of one, and null as a list of none."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value]


def as_object(value: Any, name: str) -> Mapping:
    """Return a mapping.

    Raises:
        Dropped: it is anything else.
    """
    if not isinstance(value, Mapping):
        raise bad_row(f"{name} is {kind(value)}, where an object is needed")
    return value


def as_number(value: Any, name: str) -> Any:
    """Return a number, of whatever type it is.

    Raises:
        Dropped: it is anything else.
    """
    if not isinstance(value, Real) or isinstance(value, bool):  # to Python, true is a number
        raise bad_row(f"{name} is {kind(value)}, where a number is needed")
    return value


def as_whole(value: Any, name: str) -> int:
    """Return a whole number, also one that is written as text or with a decimal point.

    Raises:
        Dropped: it is anything else, or too long.
    """
    if isinstance(value, str) and value.strip().isascii() and len(value.strip()) <= _MOST_DIGITS:
        digits = value.strip()
        if digits.removeprefix("-").isdecimal():
            return int(digits)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and abs(value) < 10**_MOST_DIGITS and value == int(value):
        return int(value)
    raise bad_row(f"{name} is {kind(value)}, where a whole number of at most {_MOST_DIGITS} digits is needed")


def parse_row(line: str) -> Mapping | Unreadable:
    """Return the row that a line of JSON holds."""
    if not line.strip():
        return Unreadable("an empty line")
    try:
        row = json.loads(line.removeprefix("\ufeff"))  # the byte order mark that some editors write
    except RecursionError:
        return Unreadable("JSON that is nested too deeply")
    except ValueError as error:  # also numbers of too many digits
        return Unreadable(f"not JSON ({error})")
    if not isinstance(row, dict):
        return Unreadable(f"{kind(row)}, where a JSON object is needed")
    return row


def plain_rows(table: pyarrow.Table) -> list[dict[str, Any]]:
    """Return the rows of a table; a value that Python has no counterpart of is `Unreadable`, and the others remain."""
    try:
        return table.to_pylist()
    except _NOT_PYTHON:
        # One value stops the whole table: each is turned on its own.
        rows: list[dict[str, Any]] = [{} for _ in range(table.num_rows)]
        for name in table.column_names:
            for row, value in zip(rows, table.column(name), strict=True):
                row[name] = _plain(value)
        return rows


def _plain(value: pyarrow.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Unreadable("text that is not UTF-8")
    except _NOT_PYTHON:
        return Unreadable(f"a value of type {value.type} that is out of bounds")


def texts_of(values: Sequence[Any], name: str) -> list[str]:
    """Return a list of texts; see `as_text`."""
    return [as_text(value, name) for value in as_list(values, name)]

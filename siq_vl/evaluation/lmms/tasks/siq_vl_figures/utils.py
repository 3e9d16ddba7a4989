"""What the task's YAML calls."""

from collections.abc import Mapping, Sequence

from PIL import Image

from siq_vl.parsing.answers import matches, parse


def visual(row: Mapping) -> list[Image.Image]:
    """Return the pictures of a row."""
    return [row["image"].convert("RGB")]


def score(row: Mapping, outputs: Sequence[str]) -> dict[str, float]:
    """Return the metrics of a row, from the harness's list of one output."""
    return {"exact_match": float(matches(parse(outputs[0]).answer, row["answer"]))}

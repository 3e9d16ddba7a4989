"""What a tower is taught about every patch and every cell of a picture, exact because the picture was drawn."""

import numpy as np

from siq_vl.data.world.canvas import Drawn
from siq_vl.data.world.fonts import CHARACTERS

NOTHING = 0  # no character's centre lies here
_INDEX = {character: index for index, character in enumerate(CHARACTERS, 1)}


def character_labels(drawn: Drawn, patch: int) -> np.ndarray:
    """Return the characters whose centres lie in the left and the right half of each patch.

    Args:
        drawn: a picture whose sides are multiples of `patch`.
        patch: side of a patch, in pixels.

    Returns:
        int64 (patches, 2), row by row: `NOTHING`, or 1 and up for the characters of `CHARACTERS`. Where two centres
        fall into one half, the later one counts.
    """
    across, down = drawn.image.width // patch, drawn.image.height // patch
    labels = np.zeros((down, across, 2), dtype=np.int64)
    for letter in drawn.letters:
        half = int(letter.x // (patch / 2))
        row = int(letter.y // patch)
        if letter.character in _INDEX and 0 <= half < 2 * across and 0 <= row < down:
            labels[row, half // 2, half % 2] = _INDEX[letter.character]
    return labels.reshape(-1, 2)


def cell_words(drawn: Drawn, cell: int, ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return which words each cell shows, and which words the facts hold that it belongs to.

    Args:
        drawn: a picture whose sides are multiples of `cell`.
        cell: side of a cell in pixels: what one image token covers.
        ids: word to class; other words are left out.

    Returns:
        Two bool arrays (cells, classes), row by row: seen, and facts.
    """
    across, down = drawn.image.width // cell, drawn.image.height // cell
    seen = np.zeros((down, across, len(ids)), dtype=bool)
    facts = np.zeros_like(seen)
    for region in drawn.regions:
        rows, columns = _cells(region.box, cell, across, down)
        for words, target in ((region.seen, seen), (region.facts, facts)):
            for word in words:
                if word in ids:
                    target[rows, columns, ids[word]] = True
    return seen.reshape(across * down, -1), facts.reshape(across * down, -1)


def _cells(box: tuple[float, float, float, float], cell: int, across: int, down: int) -> tuple[slice, slice]:
    """Return the rows and columns of the cells that a box covers by more than a sliver; at least its centre's."""
    left, top, right, bottom = box
    spans = []
    for low, high, count in ((top, bottom, down), (left, right, across)):
        sliver = min(0.25 * cell, (high - low) / 2)
        first, last = int((low + sliver) // cell), int((high - sliver) // cell)
        spans.append(slice(max(0, first), min(count, last + 1)))
    return spans[0], spans[1]

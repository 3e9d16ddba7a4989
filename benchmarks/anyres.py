"""
What tiles keep of a large picture, and the plain resize loses, for a checkpoint as it is.

    python benchmarks/anyres.py --count 300

Held-out figures of 96 x 96 pixels are pasted into a picture twice as wide and high: into one of its quarters, which is one
tile, or anywhere, mostly across the borders of tiles. The model is asked as a user would ask it: with a processor of
`max_tiles=4`, so with all tiles and the thumbnail, and with the plain resize. The tile of the figure alone is an upper
bound that nobody gets, since nobody knows which tile it is: it is the figure's own picture, pixel for pixel.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from PIL import Image
from transformers import PreTrainedModel

REPO_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO_ROOT))

from siq_vl.evaluation.held_out import held_out_items  # noqa: E402
from siq_vl.evaluation.items import Item  # noqa: E402
from siq_vl.evaluation.predictions import predict  # noqa: E402
from siq_vl.evaluation.shifts import anywhere, in_a_quarter  # noqa: E402
from siq_vl.evaluation.tables import accuracy_cell, markdown  # noqa: E402
from siq_vl.loading import load_checkpoint  # noqa: E402
from siq_vl.processing_siq_vl import SiQVLProcessor  # noqa: E402
from siq_vl.results import checksum_of_weights, write_results  # noqa: E402

MAX_TILES = 4
TILED, RESIZED, ALONE = "all tiles and the thumbnail", "plain resize", "upper bound: the right tile alone"


def in_quarters(items: Sequence[Item]) -> list[Item]:
    """Return the questions with their figures in a quarter of a larger picture, the quarters taken in turn."""
    return [_shown(item, in_a_quarter(item.image, place % 4)) for place, item in enumerate(items)]


def at_any_place(items: Sequence[Item]) -> list[Item]:
    """Return the questions with their figures at a random place of a larger picture."""
    return [_shown(item, anywhere(item.image, Random(item.id))) for item in items]


def _shown(item: Item, picture: Image.Image) -> Item:
    return replace(item, images=(picture,))


PLACES: dict[str, Callable[[Sequence[Item]], list[Item]]] = {
    "in one tile": in_quarters,
    "anywhere": at_any_place,
}


def answered(model: PreTrainedModel, processor: SiQVLProcessor, items: Sequence[Item], max_tiles: int) -> list:
    """Return the judged answers, the processor set to so many tiles."""
    processor.max_tiles = max_tiles
    return predict(model, processor, items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPO_ROOT), help="a checkpoint's folder")
    parser.add_argument("--count", type=int, default=300, help="held-out figures")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="keep the table in this file, too")
    options = parser.parse_args()
    items = [item for item in held_out_items(options.count) if item.group == "held out"]
    model, processor = load_checkpoint(options.model)
    lines = [["figure", "shown as", "right", "of", "accuracy"]]
    for place, placed in PLACES.items():
        large = placed(items)
        shown = {TILED: (large, MAX_TILES), RESIZED: (large, 1)}
        if place == "in one tile":
            shown[ALONE] = (items, 1)
        for way, (asked, max_tiles) in shown.items():
            made = answered(model, processor, asked, max_tiles)
            right = sum(prediction.correct for prediction in made)
            lines.append([place, way, str(right), str(len(made)), accuracy_cell(made)])
    table = markdown(lines)
    print(table)
    if options.results is not None:
        write_results(options.results, {"anyres": table}, {"weights": {"model": checksum_of_weights(options.model)}})


if __name__ == "__main__":
    main()

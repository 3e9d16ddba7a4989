"""
What tiles keep of a large picture, and the plain resize loses, for a checkpoint as it is.

    python benchmarks/anyres.py --count 300

Held-out figures of 96 x 96 pixels are pasted into a picture twice as wide and high: into one of its quarters, which is one
tile, or anywhere, mostly across the borders of tiles. The model is asked as a user would ask it: with a processor of
`max_tiles=4`, so with all tiles and the thumbnail, and with the plain resize. The tile of the figure alone is an upper
bound that nobody gets, since nobody knows which tile it is: it is the figure's own picture, pixel for pixel.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import common
from transformers import PreTrainedModel

from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.items import Item
from siq_vl.evaluation.predictions import predict
from siq_vl.evaluation.shifts import anywhere, in_a_quarter
from siq_vl.evaluation.tables import accuracy_cell, markdown
from siq_vl.loading import load_checkpoint
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.results import checksum_of_weights, write_results

MAX_TILES = 4
TILED, RESIZED, ALONE = "all tiles and the thumbnail", "plain resize", "upper bound: the right tile alone"


def in_quarters(items: Sequence[Item]) -> list[Item]:
    """Return the questions with their figures in a quarter of a larger picture, the quarters taken in turn."""
    moved = []
    for place, item in enumerate(items):
        moved.append(replace(item, images=(in_a_quarter(item.image, place % 4),)))
    return moved


def at_any_place(items: Sequence[Item]) -> list[Item]:
    """Return the questions with their figures at a random place of a larger picture."""
    moved = []
    for item in items:
        # By the question's own name, so that every run shows it at the same place.
        moved.append(replace(item, images=(anywhere(item.image, Random(item.id)),)))
    return moved


PLACES: dict[str, Callable[[Sequence[Item]], list[Item]]] = {
    "in one tile": in_quarters,
    "anywhere": at_any_place,
}


def answered(model: PreTrainedModel, processor: SiQVLProcessor, items: Sequence[Item], max_tiles: int) -> list:
    """Return the judged answers, the processor set to so many tiles."""
    processor.max_tiles = max_tiles
    return predict(model, processor, items)


def main() -> None:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--model", default=str(common.REPO_ROOT), help="a checkpoint's folder")
    parser.add_argument("--count", type=int, default=300, help="held-out figures")
    options = parser.parse_args()
    items = [item for item in held_out_items(options.count) if item.group == "held out"]
    model, processor = load_checkpoint(options.model)
    lines = [["figure", "shown as", "right", "of", "accuracy"]]
    for place, placed in PLACES.items():
        large = placed(items)
        shown = {TILED: (large, MAX_TILES), RESIZED: (large, 1)}
        # A figure that lies across the borders of tiles has no tile of its own.
        if place == "in one tile":
            shown[ALONE] = (items, 1)
        for way, (asked, max_tiles) in shown.items():
            predictions = answered(model, processor, asked, max_tiles)
            right = sum(prediction.correct for prediction in predictions)
            lines.append([place, way, str(right), str(len(predictions)), accuracy_cell(predictions)])
    table = markdown(lines)
    print(table)
    if options.results is not None:
        write_results(options.results, {"anyres": table}, {"weights": {"model": checksum_of_weights(options.model)}})


if __name__ == "__main__":
    main()

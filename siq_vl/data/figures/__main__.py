"""Draw a sheet of samples: `python -m siq_vl.data.figures gallery.png`."""

import argparse
from pathlib import Path

from PIL import Image

from siq_vl import cli
from siq_vl.data.figures.dataset import SPLITS, sample
from siq_vl.data.figures.drawing import SIZE

_ACROSS, _DOWN, _SCALE, _GAP = 6, 3, 2, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the PNG to write")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    side = SIZE * _SCALE + _GAP
    sheet = Image.new("RGB", (_ACROSS * side + _GAP, _DOWN * side + _GAP), (120, 126, 134))
    for index in range(_ACROSS * _DOWN):
        drawn = sample(options.split, index, seed=options.seed)
        picture = drawn.image.resize((SIZE * _SCALE, SIZE * _SCALE), Image.Resampling.NEAREST)
        sheet.paste(picture, (_GAP + index % _ACROSS * side, _GAP + index // _ACROSS * side))
        print(f"{index:2d}  {drawn.figure.caption} | {drawn.question.text} | {drawn.question.answer}")
    sheet.save(options.path)


if __name__ == "__main__":
    cli.run(main)

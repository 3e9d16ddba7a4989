"""Draw a sheet of samples: `python -m siq_vl.data.world gallery.png --look styles`."""

import argparse
from pathlib import Path

from PIL import Image

from siq_vl import cli
from siq_vl.data.world.dataset import DOMAINS, LOOKS, SPLITS, sample

_ACROSS, _DOWN, _SIDE, _GAP = 6, 4, 192, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the PNG to write")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--domain", choices=(*DOMAINS, "nothing"))
    parser.add_argument("--look", choices=tuple(LOOKS), default="trained")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    side = _SIDE + _GAP
    sheet = Image.new("RGB", (_ACROSS * side + _GAP, _DOWN * side + _GAP), (120, 126, 134))
    for index in range(_ACROSS * _DOWN):
        made = sample(options.split, index, seed=options.seed, domain=options.domain, look=options.look)
        picture = made.image
        scale = _SIDE / max(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        sheet.paste(picture, (_GAP + index % _ACROSS * side, _GAP + index // _ACROSS * side))
        print(f"{index:2d}  {made.figure.caption} | {made.question.text} | {made.question.answer}")
    sheet.save(options.path)


if __name__ == "__main__":
    cli.run(main)

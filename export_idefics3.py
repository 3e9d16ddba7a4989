"""
Write a checkpoint as a native Idefics3 checkpoint, for engines that know Idefics3 and run no remote code.

    python export_idefics3.py outputs/tiny/stage3 outputs/tiny/idefics3 --widen_tower

The result computes the same and loads without `trust_remote_code`. A projector bias is folded into the tower; where that
has no exact solution the export is refused, unless `--widen_tower` allows a tower of twice the width to hold it.
"""

import argparse
from pathlib import Path

from siq_vl import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder or Hub id")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--widen_tower", action="store_true", help="hold any projector bias, in a wider tower")
    options = parser.parse_args()
    if options.output.is_dir() and any(options.output.iterdir()):
        raise ValueError(f"{options.output} is not empty: pass a new folder")
    # Imported once the options are known: torch and transformers take seconds, and `--help` needs none of them.
    from siq_vl.export.idefics3 import export_idefics3
    from siq_vl.loading import load_checkpoint

    model, processor = load_checkpoint(options.model)
    export_idefics3(model, processor, options.output, widen_tower=options.widen_tower)
    print(f"{options.output} is an Idefics3ForConditionalGeneration checkpoint")


if __name__ == "__main__":
    cli.run(main)

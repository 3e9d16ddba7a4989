"""
Make the miniatures that the rehearsal's Hub holds.

    python -m rehearsal.contents FOLDER

They are made from seeds in seconds, some megabytes in all, and are nowhere kept.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rehearsal.data import write_data
from rehearsal.models import write_models


def write_contents(folder: Path, ids: Sequence[str] | None = None) -> None:
    """Write the miniatures below a folder, of the ids given or of all."""
    write_data(folder, None if ids is None else tuple(ids))
    write_models(folder, ids)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gets `models/` and `datasets/`")
    parser.add_argument("ids", nargs="*", help="which; all by default")
    options = parser.parse_args()
    write_contents(options.folder, options.ids or None)


if __name__ == "__main__":
    main()

"""
One figure and one table of how reasoning emerged in one run or several, from what training wrote at intervals.

    python -m siq_vl.evaluation.emergence_figure outputs/tiny/stage3 --output emergence.svg
    python -m siq_vl.evaluation.emergence_figure structured=outputs/structured terse=outputs/terse --output emergence.svg

A run is the output folder of `train_distill.py --emergence_steps 50`. Its name is the folder's unless one is given.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from siq_vl import cli
from siq_vl.evaluation.tables import markdown
from siq_vl.plots import emergence_plot

EMERGENCE_FILE, EMERGENCE_FIGURE = "emergence.jsonl", "emergence.svg"


def read_emergence(folder: Path) -> list[dict]:
    """Return the entries of a run: a `step` and its measures each, in order.

    Raises:
        ValueError: the run wrote none.
    """
    path = folder / EMERGENCE_FILE
    if not path.exists():
        raise ValueError(f"{path} does not exist: train with --emergence_steps, or name another folder")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def emergence_table(runs: Mapping[str, Sequence[Mapping]]) -> str:
    """Return the measures of every run at every step as a Markdown table."""
    header = ["run", "step", "well formed, %", "tokens (teacher)", "steps found, %", "in order, %", "arithmetic, %"]
    lines = [[*header, "structure, %", "accuracy, %"]]
    for name, entries in runs.items():
        for entry in entries:
            shares = ("steps_found", "steps_in_order", "arithmetic", "structure", "accuracy")
            length = f"{entry['length']:.1f} ({entry['teacher_length']:.1f})"
            cells = [f"{100 * entry[share]:.1f}" for share in shares]
            lines.append([name, str(entry["step"]), f"{100 * entry['well_formed']:.1f}", length, *cells])
    return markdown(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER", help="output folders of stage 3")
    parser.add_argument("--output", type=Path, default=Path(EMERGENCE_FIGURE), help="the figure, an SVG")
    options = parser.parse_args()
    runs = {}
    for given in options.runs:
        name, _, folder = given.rpartition("=")
        if not name:
            name = Path(folder).resolve().name
        if name in runs:
            raise ValueError(f"{name!r} is the name of two runs: tell them apart as NAME=FOLDER")
        runs[name] = read_emergence(Path(folder))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(emergence_plot(runs), encoding="utf-8")
    cli.say(f"{emergence_table(runs)}\n\nfigure: {options.output}")


if __name__ == "__main__":
    cli.run(main)

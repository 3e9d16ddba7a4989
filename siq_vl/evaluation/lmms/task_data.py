"""
Write drawn questions as a Parquet file, the data of the task `siq_vl_figures`.

    python -m siq_vl.evaluation.lmms.task_data outputs/lmms/figures.parquet --count 100
"""

import argparse
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from siq_vl import cli
from siq_vl.evaluation.held_out import held_out_items


def main() -> None:
    """Write the held-out figures as a file that the task reads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the file")
    parser.add_argument(
        "--count", type=int, default=100, help="ordinary questions; a fifth as many of each other group"
    )
    options = parser.parse_args()
    texts = ("id", "group", "domain", "type", "question", "answer")
    features = Features(dict.fromkeys(texts, Value("string")) | {"image": Image()})
    rows = []
    for item in held_out_items(options.count):
        rows.append({name: getattr(item, name) for name in features})
    options.path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(options.path)


if __name__ == "__main__":
    cli.run(main)

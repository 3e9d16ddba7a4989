"""
Right answers of a checkpoint in full precision, with its language model in NF4, and in int8.

    python benchmarks/quantized.py --count 100
"""

import argparse
from pathlib import Path

import torch
from common import REPO_ROOT

from siq_vl.evaluation.generation import generate_texts
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.predictions import judge
from siq_vl.loading import load_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPO_ROOT, help="a checkpoint's folder")
    parser.add_argument("--count", type=int, default=100, help="held-out questions")
    options = parser.parse_args()
    items = [item for item in held_out_items(options.count) if item.group == "held out"]
    print("| weights | right answers | same text | MiB of weights |\n|---|---:|---:|---:|")
    full: list[str] = []
    for name, bits in (("float32", None), ("int8", 8), ("NF4", 4)):
        torch.manual_seed(0)
        model, processor = load_checkpoint(str(options.model), bits)
        images = [list(item.images) for item in items]
        texts = generate_texts(model, processor, [item.messages for item in items], images)
        full = full or texts  # the first is float32, which the others are held against
        correct = same = 0
        for item, text, in_full in zip(items, texts, full, strict=True):
            correct += judge(item, text).correct
            same += text == in_full
        size = model.get_memory_footprint() / 2**20
        print(f"| {name} | {correct} of {len(items)} | {same} | {size:.1f} |")


if __name__ == "__main__":
    main()

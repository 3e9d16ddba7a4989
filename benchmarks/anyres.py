"""
What tiles keep of a large picture, and the plain resize loses.

    python benchmarks/anyres.py --count 300

Held-out figures of 96 x 96 pixels are pasted into a quarter of a picture twice as wide and high. The model, which was
not trained on tiles, is asked about the tile that holds the figure, and about the whole picture resized.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

REPO_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO_ROOT))

from siq_vl.data.figures.drawing import SIZE  # noqa: E402
from siq_vl.data.figures.rows import user_turn  # noqa: E402
from siq_vl.evaluation.figures import Item, held_out_items  # noqa: E402
from siq_vl.evaluation.predictions import judge  # noqa: E402
from siq_vl.loading import load_checkpoint  # noqa: E402

BATCH = 100


def in_a_quarter(item: Item, quarter: int) -> Image.Image:
    """Return a picture of 2 * SIZE pixels square with the item's figure in one of its quarters."""
    large = Image.new("RGB", (2 * SIZE, 2 * SIZE), item.image.getpixel((0, 0)))
    large.paste(item.image, (SIZE * (quarter % 2), SIZE * (quarter // 2)))
    return large


@torch.inference_mode()
def count_correct(model, processor, items: list[Item]) -> tuple[int, int]:
    """Return how many questions are answered right from the figure's tile, and from the whole picture resized."""
    correct = [0, 0]
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        quarters = torch.arange(len(batch)) % 4
        large = [in_a_quarter(item, int(quarter)) for item, quarter in zip(batch, quarters, strict=True)]
        prompts = [processor.apply_chat_template(user_turn(i.question), add_generation_prompt=True) for i in batch]
        inputs = processor(images=large, text=prompts, padding=True, padding_side="left", return_tensors="pt")
        tiles = processor(images=large, max_tiles=4, return_tensors="pt")["pixel_values"].unflatten(0, (len(batch), 5))
        for which, pixels in enumerate((tiles[torch.arange(len(batch)), quarters], inputs["pixel_values"])):
            output = model.generate(**{**inputs, "pixel_values": pixels}, max_new_tokens=128, do_sample=False)
            texts = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
            correct[which] += sum(judge(item, text).correct for item, text in zip(batch, texts, strict=True))
    return correct[0], correct[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPO_ROOT), help="a checkpoint's folder")
    parser.add_argument("--count", type=int, default=300, help="held-out figures")
    options = parser.parse_args()
    items = [item for item in held_out_items(options.count) if item.group == "held out"]
    tile, resized = count_correct(*load_checkpoint(options.model), items)
    print(f"right answers of {len(items)}: {tile} from the figure's tile, {resized} from the plain resize")


if __name__ == "__main__":
    main()

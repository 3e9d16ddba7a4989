"""
What packing gains over padding, with TRL's trainer on this machine.

    python benchmarks/packing.py
    python benchmarks/packing.py --budgets 512 1024 2048 --mix equal

Every way of batching takes forward and backward passes over the same samples, a step at a time and in turn, through the
trainer's own `training_step`; the median of their ratios to plain padding is printed. `--mix` is `mixed` (short answers
and long captions), `short`, or `equal` (no padding to save: what packing costs). Weights are random, and dimensions such
that matrix products dominate.
"""

import argparse
import random
import statistics
import tempfile

import numpy as np
import torch
from common import CLOCKS, REPO_ROOT, as_options
from datasets import Dataset
from PIL import Image

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.data.collation import IGNORED
from siq_vl.data.conversations import message
from siq_vl.data.packing import SDPA_BY_SAMPLE, PackedRows, PackingCollator, padding_share
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.run import make_trainer

SIZE, PATCH = 224, 16
WORDS = [
    "a", "red", "square", "left", "of", "two", "large", "green", "circles", "under", "the", "small", "blue", "triangle",
]  # fmt: skip
# Fewest and most words of an answer; rows take the pairs of their mix in turn.
ANSWERS = {"mixed": ((1, 4), (1, 4), (1, 4), (80, 160)), "short": ((1, 4),), "equal": ((40, 40),)}


def build_model(text_width: int, text_depth: int) -> SiQVLForConditionalGeneration:
    """Return a model with random weights: a tower of 8 layers, 384 wide, and the given language model."""
    tiny = SiQVLConfig.from_pretrained(REPO_ROOT)
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_depth}
    text |= {"num_attention_heads": text_width // 64, "num_key_value_heads": 2, "layer_types": None}
    vision = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6}
    config = SiQVLConfig(
        vision_config={**vision, "image_size": SIZE, "patch_size": PATCH},
        text_config={**tiny.text_config.to_dict(), **text},
        image_token_id=tiny.image_token_id,
        vision_start_token_id=tiny.vision_start_token_id,
        vision_end_token_id=tiny.vision_end_token_id,
    )
    torch.manual_seed(0)
    return SiQVLForConditionalGeneration(config)


def build_processor() -> SiQVLProcessor:
    """Return the repo's processor, for pictures of the benchmark's size."""
    processor = SiQVLProcessor.from_pretrained(REPO_ROOT)
    processor.image_processor.size = {"height": SIZE, "width": SIZE}
    return SiQVLProcessor(
        processor.image_processor,
        processor.tokenizer,
        chat_template=processor.chat_template,
        patch_size=PATCH,
        pixel_shuffle_factor=2,
    )


def draw_samples(count: int, mix: str, seed: int) -> list[dict]:
    """Return conversations about one picture each, with answers of the mix's lengths."""
    rng = random.Random(seed)
    pixels = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        fewest, most = ANSWERS[mix][index % len(ANSWERS[mix])]
        answer = " ".join(rng.choices(WORDS, k=rng.randint(fewest, most)))
        picture = Image.fromarray(pixels.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        turns = [message("user", "What is shown?", 1), message("assistant", answer)]
        samples.append({"images": [picture], "messages": turns})
    rng.shuffle(samples)
    return samples


def with_features(batch: dict, model: SiQVLForConditionalGeneration) -> dict:
    """Return a batch with what the tower makes of its pictures in their place, as a cache gives it."""
    with torch.no_grad():
        features = model.vision_tower(pixel_values=batch.pop("pixel_values")).last_hidden_state
    return {**batch, "vision_features": features}


def prepare(ways: dict, steps: list[list[dict]], model, collate, pixels: bool, image_token_id: int) -> dict:
    """Return, for each way of batching, the batches of each step."""

    def encode(samples):
        batch = collate(samples)
        if pixels:
            return batch
        return with_features(batch, model)

    prepared = {}
    for name, (at_once, budget) in ways.items():
        make = encode
        if budget:
            make = PackingCollator(encode, budget, image_token_id, SDPA_BY_SAMPLE)
        prepared[name] = []
        for samples in steps:
            batches = [make(samples[first : first + at_once]) for first in range(0, len(samples), at_once)]
            prepared[name].append(batches)
    return prepared


def passes_of_step(batches: list) -> int:
    """Return how many passes a step takes: one for each batch, or for each row of a packed one."""
    passes = 0
    for batch in batches:
        passes += len(batch) if isinstance(batch, PackedRows) else 1
    return passes


def seconds_of_step(trainer, batches, clock) -> float:
    """Take the forward and backward passes of one optimizer step; return how long they took."""
    items = sum((batch["labels"] != IGNORED).sum() for batch in batches)
    trainer.model.zero_grad()
    started = clock()
    for batch in batches:
        trainer.training_step(trainer.model, batch, items)
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", choices=ANSWERS, default="mixed")
    parser.add_argument("--stage", choices=("1", "2"), default="2")
    parser.add_argument("--step_samples", type=int, default=32, help="samples an optimizer step")
    parser.add_argument("--batch_size", type=int, default=8, help="samples a padded pass")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024, 2048], help="tokens a packed row")
    parser.add_argument("--rounds", type=int, default=5, help="steps that each way takes")
    parser.add_argument("--pixels", action="store_true", help="run the tower, too, in place of cached features")
    parser.add_argument("--text_width", type=int, default=512)
    parser.add_argument("--text_depth", type=int, default=6)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: seconds of CPU, on a machine with others")
    options = parser.parse_args()
    settings = {"stage": options.stage, "bf16": False, "report_to": "none", "max_length": 4096, "batching": "packed"}
    model, processor = build_model(options.text_width, options.text_depth), build_processor()
    with tempfile.TemporaryDirectory() as folder:
        recipe = parse_recipe((options.stage,), as_options({**settings, "output_dir": folder}))
        trainer = make_trainer(recipe, model, processor, Dataset.from_list([{"images": []}]))
    collate = trainer.data_collator.collate
    # By name: samples that are collated at once, and the budget of a row in tokens; 0 pads. Packing takes a whole step's
    # samples at once, and makes a pass of every row that they fill.
    ways = {"padded": (options.batch_size, 0)}
    for budget in options.budgets:
        ways[f"packed to {budget}"] = (options.step_samples, budget)
    steps = [draw_samples(options.step_samples, options.mix, seed) for seed in range(options.rounds)]
    prepared = prepare(ways, steps, model, collate, options.pixels, model.config.image_token_id)
    lengths: list[int] = []
    for batches in prepared["padded"]:
        for batch in batches:
            lengths += batch["attention_mask"].sum(dim=1).tolist()
    print(
        f"{options.mix} rows of {min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.0f}; padded "
        f"batches of {options.batch_size} are {padding_share(lengths, options.batch_size):.1%} padding"
    )
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(-1, options.rounds):  # the first time warms up
        for name in random.Random(index).sample(list(ways), len(ways)):
            seconds = seconds_of_step(trainer, prepared[name][max(index, 0)], CLOCKS[options.clock])
            if index >= 0:
                taken[name].append(seconds)
    for name, times in taken.items():
        ratios = [base / own for base, own in zip(taken["padded"], times, strict=True)]
        ratio = statistics.median(ratios)
        passes = statistics.mean(passes_of_step(batches) for batches in prepared[name])
        rate = options.step_samples / statistics.median(times)
        print(f"{name:16} {rate:7.2f} samples/s, {ratio:.2f} x padded, {passes:.1f} passes a step")


if __name__ == "__main__":
    main()

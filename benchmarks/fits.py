"""
What fits where: batch, accumulation and peak memory of every stage on cards of 6 to 24 GB.

    python benchmarks/fits.py                   # no GPU: the prediction of `siq_vl.planning.sizes`, marked as such
    python benchmarks/fits.py --device cuda     # measured, each card by `torch.cuda.set_per_process_memory_fraction`

Random weights in full size, pictures of 512 pixels (256 tokens), bfloat16, frozen weights in bfloat16, gradient
checkpointing, AdamW. A row has `--length` tokens, a quarter of them supervised. A card keeps `--reserve` GB for the
driver, the display and fragmentation.
"""

import argparse
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import common
import memory
import torch
from transformers import PretrainedConfig
from trl.trainer.utils import get_peak_flops

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.planning.sizes import Sizes, TrainingSetup, count, training_memory
from siq_vl.training.arguments import ModelArguments

CARDS = (6, 8, 12, 16, 24)  # GB, as sold: 2**30 bytes each
RUNS = (
    ("1", "projector", False),
    ("2", "LoRA", False),
    ("2", "QLoRA", True),
    ("3", "LoRA", False),
    ("3", "QLoRA", True),
)
EFFECTIVE_BATCH = 128
GIB = 2**30


@dataclass(frozen=True)
class Run:
    """One stage of one model; sequences of stage 3 are longer by their rationales."""

    model: str
    stage: str
    method: str
    nf4: bool
    length: int


def forward_flops(config: PretrainedConfig, tokens: int, length: int) -> int:
    """Return the floating-point operations of a decoder's or encoder's layers, two for each multiply-add.

    Attention counts every pair of tokens, as its usual kernels for training without a causal short cut do.

    Args:
        config: of the language model or the vision tower.
        tokens: tokens or patches in all.
        length: tokens of a row, or patches of an image.
    """
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    gated = hasattr(config, "num_key_value_heads")
    keys = width * config.num_key_value_heads // heads if gated else width
    weights = 2 * hidden * (width + keys) + (3 if gated else 2) * hidden * inner
    return config.num_hidden_layers * tokens * 2 * (weights + 2 * length * width)


def step_flops(
    config: SiQVLConfig, batch_size: int, length: int, supervised: int, lora: int, *, stored_features: bool = False
) -> int:
    """Return the model's floating-point operations of a step with a frozen tower, recomputation not counted.

    Tower: forward. Projector: forward, and the gradient of its weights. Language model: forward, and the gradient of its
    inputs. LoRA: forward, and both gradients. Output layer: forward and the gradient of its input, at supervised positions.

    Args:
        config: of the model.
        batch_size: samples, of one picture each.
        length: tokens of a sample.
        supervised: tokens of the batch that have a label.
        lora: parameters of the adapter.
        stored_features: the tower does not run.
    """
    text, vision = config.text_config, config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = batch_size * length
    embedding = 2 * batch_size * patches * 3 * vision.patch_size**2 * vision.hidden_size
    tower = 0 if stored_features else forward_flops(vision, batch_size * patches, patches) + embedding
    width = vision.hidden_size * config.pixel_shuffle_factor**2
    projector = 2 * 2 * batch_size * config.image_seq_length * width * text.hidden_size
    language = 2 * forward_flops(text, tokens, length) + 3 * 2 * tokens * lora
    # Attention multiplies two activations, so its backward pass has a gradient more than that of frozen weights.
    language += text.num_hidden_layers * tokens * 2 * 2 * length * text.hidden_size
    return tower + projector + language + 2 * 2 * supervised * text.vocab_size * text.hidden_size


def predicted(run: Run, config: SiQVLConfig, sizes: Sizes, batch_size: int) -> int:
    """Return the predicted peak of a run in bytes."""
    setup = TrainingSetup(bf16_weights=True, nf4=run.nf4)
    return training_memory(config, sizes, batch_size, run.length, setup, batch_size * run.length // 4).total


def largest_batch(run: Run, config: SiQVLConfig, sizes: Sizes, limit: int) -> int:
    """Return the largest power of two that the prediction allows in `limit` bytes, at most `EFFECTIVE_BATCH`; 0: none."""
    fitting = [2**power for power in range(8) if predicted(run, config, sizes, 2**power) <= limit]
    return max(fitting, default=0)


def measured(run: Run, options: argparse.Namespace, batch_size: int) -> tuple[float, float, float | None]:
    """Return peak GiB, tokens a second, and the share of the GPU's peak that the model's operations take."""
    settings = settings_of(options, run)
    setting = memory.Setting({"projector": "stage 1"}.get(run.method, run.method), True, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = memory.trainer_of(settings, setting, folder)
        trainer.args.max_steps = 4
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = common.stopwatch(settings)
        trainer.train()
        taken = seconds() / (4 * trainer.args.gradient_accumulation_steps)
    config, sizes = sizes_of(run.model, run.stage, options.lora_r)
    flops = step_flops(config, batch_size, run.length, batch_size * run.length // 4, sizes.lora)
    most = get_peak_flops(torch.cuda.get_device_name(), "bfloat16")
    share = None if most is None else flops / taken / most
    return torch.cuda.max_memory_allocated() / GIB, batch_size * run.length / taken, share


def settings_of(options: argparse.Namespace, run: Run) -> argparse.Namespace:
    """Return the options of `benchmarks/memory.py` for a run."""
    settings = argparse.Namespace(**vars(options))
    settings.shape, settings.length, settings.supervised = run.model, run.length, run.length // 4
    return settings


@cache
def sizes_of(model: str, stage: str, lora_r: int) -> tuple[SiQVLConfig, Sizes]:
    """Return configuration and parameters of a model in a stage."""
    config, _ = common.random_config(model)
    return config, count(config, stage, ModelArguments(lora_r=lora_r))


def row(run: Run, card: int, options: argparse.Namespace) -> list[str]:
    """Return a line of the table, as cells."""
    config, sizes = sizes_of(run.model, run.stage, options.lora_r)
    start = [f"{card} GB", run.model.upper(), run.stage, run.method]
    batch_size = largest_batch(run, config, sizes, int((card - options.reserve) * GIB))
    if not batch_size:
        least = predicted(run, config, sizes, 1) / GIB
        return [*start, "does not fit", "", f"{least:.1f}", "", ""]
    gib, tokens, share = predicted(run, config, sizes, batch_size) / GIB, None, None
    if options.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (card - options.reserve) * GIB / total))
        while batch_size:
            try:
                gib, tokens, share = measured(run, options, batch_size)
                break
            except torch.cuda.OutOfMemoryError:
                batch_size //= 2
        if not batch_size:
            return [*start, "does not fit", "", "", "", ""]
    speed = "" if tokens is None else f"{tokens:,.0f}"
    used = "" if share is None else f"{share:.0%}"
    return [*start, str(batch_size), str(EFFECTIVE_BATCH // batch_size), f"{gib:.1f}", speed, used]


def by_card(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows with a column a card: the batch, and its peak in GiB."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for card, model, stage, method, batch, _, peak, *_ in rows:
        cells.setdefault((model, stage, method), {})[card] = f"{batch} ({peak})" if batch.isdigit() else batch
    cards = list(dict.fromkeys(each[0] for each in rows))
    lines = [[*run, *(by[card] for card in cards)] for run, by in cells.items()]
    return common.table(["model", "stage", "trains", *cards], lines)


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row in stages 1 and 2")
    parser.add_argument("--long", type=int, default=1024, help="tokens of a row in stage 3")
    parser.add_argument("--lora_r", type=int, default=64)
    parser.add_argument("--reserve", type=float, default=0.8, help="GiB of a card that are not for torch's tensors")
    parser.add_argument("--cards", type=int, nargs="+", default=CARDS, help="GB")
    parser.add_argument("--models", nargs="+", default=list(common.FULL), choices=list(common.FULL))
    options = common.prepare(parser.parse_args())
    options.bf16, options.dtype = True, "bfloat16"
    if options.quick:
        options.cards, options.models = [8], ["0.5b"]
    logging.disable(logging.WARNING)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "PREDICTION, nothing was measured"
    print(f"{where}; rows of {options.length} tokens, of {options.long} in stage 3; LoRA r={options.lora_r}\n")
    header = ["card", "model", "stage", "method", "batch", "accumulation", "peak GiB", "tokens/s", "MFU"]
    print(common.table(header, []))
    rows = []
    for card, model, (stage, method, nf4) in product(options.cards, options.models, RUNS):
        run = Run(model, stage, method, nf4, options.long if stage == "3" else options.length)
        rows.append(row(run, card, options))
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    print(f"\n{by_card(rows)}")
    common.keep(options, {"fits": common.table(header, rows), "by card": by_card(rows)}, {"kind": where})


if __name__ == "__main__":
    main()

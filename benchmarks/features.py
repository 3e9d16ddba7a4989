"""
What stored vision features gain over pixels in training.

    python benchmarks/features.py                           # 2 CPU cores: some minutes
    python benchmarks/features.py --shape 0.5b --device cuda --rows 512

Pixels against features that the same run computes first, in bfloat16 and in int8: samples a second over the first
epoch, with the computing included, and over all epochs. One picture a row, none in two rows; no loader processes.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import common
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.mixtures import build_mixture
from siq_vl.training.arguments import DataArguments
from siq_vl.training.recipes import Recipe, parse_recipe
from siq_vl.training.run import make_trainer

VARIANTS = {
    "pixels": ["--feature_cache", "off"],
    "features in bfloat16": ["--feature_cache", "on", "--feature_cache_dtype", "bfloat16"],
    "features in int8": ["--feature_cache", "on", "--feature_cache_dtype", "int8"],
}


class EpochEnds(TrainerCallback):
    """Notes when each epoch ends."""

    def __init__(self, seconds):
        self.seconds, self.ends = seconds, []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append(self.seconds())


def recipe_of(options: argparse.Namespace, folder: Path, *variant: str) -> Recipe:
    """Return the tiny recipe's stage with the benchmark's sizes; its backbones are not used."""
    arguments = {
        "stage": options.stage,
        "max_steps": -1,
        "num_train_epochs": options.epochs,
        "effective_batch_size": options.batch_size,
        "per_device_train_batch_size": options.batch_size,
        "dataloader_num_workers": 0,
        "bf16": str(options.bf16).lower(),
        "save_strategy": "no",
        "disable_tqdm": "true",
        "output_dir": folder / "run",
        "feature_cache_dir": folder / "features",
    }
    given = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    return parse_recipe(("1", "2"), [*given, *variant])


def trained(options: argparse.Namespace, variant: list[str], start, rows: Dataset) -> common.Figures:
    """Train once; return samples a second over the first epoch and over all."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(options, Path(folder), *variant)
        model, processor = copy.deepcopy(start[0]), start[1]
        seconds = common.stopwatch(options)
        trainer = make_trainer(recipe, model, processor, rows)
        trainer.remove_callback(PrinterCallback)
        times = EpochEnds(seconds)
        trainer.add_callback(times)
        trainer.train()
    return {"first epoch": len(rows) / times.ends[0], "all epochs": options.epochs * len(rows) / times.ends[-1]}


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--stage", default="2", choices=("1", "2"))
    parser.add_argument("--long_share", type=float, default=0.25, help="rows with a long caption; others are short")
    options = common.prepare(parser.parse_args())
    if options.quick:
        options.rows, options.epochs = 16, 2
    with tempfile.TemporaryDirectory() as folder:
        path = common.write_rows(Path(folder), options.rows, long_share=options.long_share)
        start = common.random_model(options.shape)
        rows = build_mixture(DataArguments(sources=[SourceConfig(str(path))]), "answer", None).rows
        measured = common.interleaved(
            {
                name: lambda variant=variant: trained(options, variant, start, rows)
                for name, variant in VARIANTS.items()
            },
            options.repetitions,
        )
    print(common.environment(options))
    print(f"stage {options.stage}, {options.rows} rows, {options.epochs} epochs, batches of {options.batch_size}\n")
    figures = ("first epoch", "all epochs")
    common.show(options, {figure: common.ratio_table(measured, figure, "samples/s") for figure in figures})


if __name__ == "__main__":
    main()

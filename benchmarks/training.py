"""
What each lever of training gains over plain TRL, and what all of them gain together.

    python benchmarks/training.py                       # 2 CPU cores: some minutes
    python benchmarks/training.py --shape 0.5b --device cuda --rows 256

Stage 2 (projector and LoRA) on short answers and long captions, three to one, over `--epochs` epochs. The baseline is
`SFTTrainer` with its own collator: pixels, padded. Every lever is measured alone, with the rest as in the baseline, and
all together. A run begins with the making of the trainer, so that what a lever prepares is paid for in its first epoch.
"""

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import common
import torch
from datasets import Dataset, Image, List
from peft import PeftConfig
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from siq_vl.data.adapters import llava
from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.mixtures import build_mixture
from siq_vl.training.arguments import STAGES
from siq_vl.training.recipes import Recipe, parse_recipe
from siq_vl.training.run import make_trainer
from siq_vl.training.stages import freeze_for_stage

BASELINE = "plain TRL, pixels, padded"
# Options of the recipe that each lever sets; the output layer is SiQVLTrainer's own.
LEVERS: dict[str, list[str]] = {
    "output layer at supervised positions": [],
    "length-grouped batches": ["--batching", "length_grouped"],
    "packed rows": ["--batching", "packed"],
    "stored vision features": ["--feature_cache", "on"],
}
ALTERNATIVES = ("length-grouped batches",)  # takes the place of another, so is left out of all together


class EpochTimes(TrainerCallback):
    """Notes when each epoch ends."""

    def __init__(self, seconds: Callable[[], float]):
        self.seconds, self.ends = seconds, []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append(self.seconds())


def settings(options, folder: Path) -> list[str]:
    """Return what baseline and levers have in common, as options of a recipe."""
    return [
        "--output_dir", str(folder), "--num_train_epochs", str(options.epochs), "--max_steps", "-1",
        "--per_device_train_batch_size", str(options.batch_size), "--effective_batch_size", "0",
        "--feature_cache", "off", "--feature_cache_dir", str(folder / "features"), "--lora_r", "16", "--bf16", str(options.bf16).lower(), "--gradient_checkpointing", "false",
        "--learning_rate", "1e-4", "--warmup_steps", "0", "--logging_steps", "1000", "--disable_tqdm", "true",
        "--dataloader_num_workers", str(options.workers), "--use_cpu", str(options.device == "cpu").lower(),
        "--dataloader_pin_memory", str(options.device == "cuda").lower(),
    ]  # fmt: skip


def recipe_of(options, folder: Path, lever: list[str]) -> Recipe:
    """Return stage 2 of the tiny recipe with the benchmark's settings and a lever's."""
    recipe = parse_recipe(STAGES, ["--stage", "2", "--recipe", "tiny", *settings(options, folder), *lever])
    recipe.data.sources = [SourceConfig(str(options.rows_file))]
    return recipe


def plain_rows(options) -> Dataset:
    """Return the same rows as TRL's documentation has them: `images`, `prompt`, `completion`."""
    source = Dataset.from_json(str(options.rows_file))
    rows: dict[str, list] = {"images": [], "prompt": [], "completion": []}
    for row in source:
        turns = llava(row, None).messages
        rows["images"].append([str(options.rows_file.parent / name) for name in row["image"]])
        rows["prompt"].append(turns[:1])
        rows["completion"].append(turns[1:])
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


def plain_trainer(options, model, processor, folder: Path, peft_config: PeftConfig | None = None) -> SFTTrainer:
    """Return `SFTTrainer` as its documentation sets it up for a vision-language model.

    Args:
        options: of the benchmark.
        model: SiQ-VL, or any model with a `peft_config` of its own.
        processor: of the model.
        folder: for what the trainer writes.
        peft_config: in place of stage 2's.
    """
    recipe = recipe_of(options, folder, [])
    arguments: SFTConfig = recipe.training
    arguments.max_length = None
    return SFTTrainer(
        model,
        args=arguments,
        train_dataset=options.plain_rows,
        processing_class=processor,
        peft_config=peft_config or freeze_for_stage(model, "2", recipe.model),
    )


def lever_trainer(options, model, processor, folder: Path, lever: list[str], supervised: bool) -> SFTTrainer:
    """Return the project's trainer with one lever or several."""
    recipe = recipe_of(options, folder, lever)
    mixture = build_mixture(recipe.data, "answer", None, processor=processor, places=[common.REPO_ROOT])
    trainer = make_trainer(recipe, model, processor, mixture.rows)
    if not supervised:
        trainer.scored_by_trl = ("cpu", *trainer.scored_by_trl)  # leave all positions to TRL
    return trainer


def one_run(options, make: Callable, model=None, processor=None) -> dict[str, float]:
    """Train a copy of a model once; return samples a second of the first epoch and of all."""
    model, processor = copy.deepcopy(model or options.model), processor or options.processor
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    torch.manual_seed(0)
    seconds = common.stopwatch(options)
    trainer = make(options, model, processor, folder)
    epochs = EpochTimes(seconds)
    trainer.add_callback(epochs)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    total = seconds()
    shutil.rmtree(folder)
    return {
        "first epoch": options.rows / epochs.ends[0],
        f"{options.epochs} epochs": options.rows * options.epochs / total,
    }


def variants(options) -> dict[str, Callable[[], dict[str, float]]]:
    """Return the baseline, each lever alone, and all."""

    def with_lever(lever: list[str], supervised: bool) -> Callable[[], dict[str, float]]:
        return lambda: one_run(options, lambda *a: lever_trainer(*a, lever, supervised))

    runs = {BASELINE: lambda: one_run(options, plain_trainer), "our trainer, no lever": with_lever([], False)}
    for name, lever in LEVERS.items():
        runs[name] = with_lever(lever, not lever)
    together = [option for name, lever in LEVERS.items() if name not in ALTERNATIVES for option in lever]
    runs["all levers"] = with_lever(together, True)
    return runs


def parse_options(description: str):
    """Return the options of a training benchmark."""
    parser = common.parser_of(description)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="processes that read rows, of every variant")
    parser.add_argument("--long_share", type=float, default=0.25, help="share of long captions")
    options = common.prepare(parser.parse_args())
    if options.quick:
        options.rows, options.batch_size = 4, 2
    logging.disable(logging.WARNING)
    return options


def compare(options, variants: Callable) -> None:
    """Write the rows, run the variants that a function makes of the options, and print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        options.rows_file = common.write_rows(options.folder, options.rows, long_share=options.long_share)
        options.plain_rows = plain_rows(options)
        measured = common.interleaved(variants(options), options.repetitions, warm_up=False)
    print(common.environment(options))
    print(f"{options.rows} rows, {options.long_share:.0%} of them long, batches of {options.batch_size}\n")
    figures = ("first epoch", f"{options.epochs} epochs")
    common.show(options, {figure: common.ratio_table(measured, figure, "samples/s") for figure in figures})


def main() -> None:
    options = parse_options(__doc__)
    options.model, options.processor = common.random_model(options.shape)
    compare(options, variants)


if __name__ == "__main__":
    main()

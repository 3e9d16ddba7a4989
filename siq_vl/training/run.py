"""The run that every stage has in common, once its model and its rows are there."""

import logging
import time
from pathlib import Path

from datasets import Dataset
from trl import SFTTrainer

from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.checkpoints import save_stage
from siq_vl.training.recipes import Recipe
from siq_vl.training.stages import freeze_for_stage, log_parameters

logger = logging.getLogger(__name__)


def rows_needed(recipe: Recipe) -> int:
    """Return how many rows the recipe's steps take, or its own `train_samples`."""
    training = recipe.training
    if recipe.data.train_samples:
        return recipe.data.train_samples
    if training.max_steps <= 0:
        raise ValueError("the recipe sets neither train_samples nor max_steps: set one, the drawn data has no end")
    return training.max_steps * training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def make_trainer(
    recipe: Recipe, model: SiQVLForConditionalGeneration, processor: SiQVLProcessor, rows: Dataset
) -> SFTTrainer:
    """Return TRL's trainer for a stage, with completion-only loss on prompt/completion rows."""
    training = recipe.training
    training.remove_unused_columns = False  # rows are drawn when read: their only stored column is an index
    training.max_length = None  # cutting a sample could cut through an image
    training.completion_only_loss = True
    peft_config = freeze_for_stage(model, recipe.stage, recipe.adapter)
    trainer = SFTTrainer(
        model=model, args=training, train_dataset=rows, processing_class=processor, peft_config=peft_config
    )
    log_parameters(trainer.model)
    return trainer


def train_and_save(trainer: SFTTrainer, processor: SiQVLProcessor, recipe: Recipe) -> Path:
    """Train, then write the stage's checkpoint; return its folder."""
    started = time.monotonic()
    trainer.train()
    return save_stage(trainer, processor, recipe, time.monotonic() - started)

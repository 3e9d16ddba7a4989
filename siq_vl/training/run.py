"""The run that every stage has in common, once its model and its rows are there."""

import logging
import time
from pathlib import Path

from datasets import Dataset, IterableDataset
from trl import SFTTrainer

from siq_vl.data.collation import ConversationCollator
from siq_vl.data.mixtures import Mixture, MixtureReport, build_mixture
from siq_vl.data.sources import FIGURES
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.checkpoints import save_stage
from siq_vl.training.recipes import REPO_ROOT, Recipe, local_or_hub
from siq_vl.training.stages import freeze_for_stage, log_parameters

logger = logging.getLogger(__name__)

DROP_LOG = "dropped_rows.jsonl"


def rows_needed(recipe: Recipe) -> int | None:
    """Return how many rows the recipe's steps take, or its own `train_samples`; None for every row once an epoch."""
    training = recipe.training
    if recipe.data.train_samples:
        return recipe.data.train_samples
    if training.max_steps <= 0 and [source.path for source in recipe.data.sources] != [FIGURES]:
        return None
    if training.max_steps <= 0:
        raise ValueError("the recipe sets neither train_samples nor max_steps: set one, the drawn data has no end")
    return training.max_steps * training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def mixture_for_stage(recipe: Recipe, task: str, processor: SiQVLProcessor) -> Mixture:
    """Return the recipe's mixture; rows that are left out are named in `dropped_rows.jsonl` of the output folder."""
    return build_mixture(
        recipe.data,
        task,
        rows_needed(recipe),
        processor=processor,
        max_length=recipe.training.max_length,
        drop_log=Path(recipe.training.output_dir) / DROP_LOG,
        base=REPO_ROOT,
        vision_tower=recipe.model.vision_tower and local_or_hub(recipe.model.vision_tower),
        readers=recipe.training.world_size * max(1, recipe.training.dataloader_num_workers),
    )


def make_trainer(
    recipe: Recipe, model: SiQVLForConditionalGeneration, processor: SiQVLProcessor, rows: Dataset | IterableDataset
) -> SFTTrainer:
    """Return TRL's trainer for a stage, with the loss on every assistant turn."""
    training = recipe.training
    training.remove_unused_columns = False  # rows are made when read: what is stored is where they come from
    # The trainer sets these itself where it also brings the collator.
    model.config.get_text_config().pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    peft_config = freeze_for_stage(model, recipe.stage, recipe.adapter)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=rows,
        data_collator=ConversationCollator(processor, training.max_length),
        processing_class=processor,
        peft_config=peft_config,
    )
    log_parameters(trainer.model)
    return trainer


def train_and_save(
    trainer: SFTTrainer, processor: SiQVLProcessor, recipe: Recipe, report: MixtureReport | None = None
) -> Path:
    """Train, then write the stage's checkpoint, with the counts of its data; return its folder."""
    started = time.monotonic()
    trainer.train()
    return save_stage(trainer, processor, recipe, time.monotonic() - started, report)

"""The run that every stage has in common, once its model and its rows are there."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import EarlyStoppingCallback
from trl import SFTTrainer

from siq_vl.data.collation import ConversationCollator
from siq_vl.data.figures.rows import training_rows
from siq_vl.data.mixture_config import FIGURES
from siq_vl.data.mixtures import Mixture, MixtureReport, build_mixture
from siq_vl.data.packing import row_lengths
from siq_vl.distill.training_rows import TrainingTraces, training_traces
from siq_vl.hub import push_stage
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.callbacks import FreeMemoryCallback, SampleCallback
from siq_vl.training.checkpoints import run_settings, samples_a_step, save_stage, settings_unnamed_before
from siq_vl.training.recipes import Recipe
from siq_vl.training.resume import checkpoint_to_resume, discard_incomplete
from siq_vl.training.sharding import check_engine
from siq_vl.training.stages import freeze_for_stage, log_parameters
from siq_vl.training.stored_features import rows_with_features
from siq_vl.training.trainer import AnswerWeights, SiQVLTrainer

logger = logging.getLogger(__name__)


DROP_LOG = "dropped_rows.jsonl"


def rows_needed(recipe: Recipe) -> int | None:
    """Return how many rows the recipe's steps take, or its own `train_samples`; None for every row once an epoch."""
    training = recipe.training
    if recipe.data.train_samples:
        return recipe.data.train_samples
    if training.max_steps <= 0 and (recipe.traces or not _drawn_only(recipe)):
        return None
    if training.max_steps <= 0:
        raise ValueError("the recipe sets neither train_samples nor max_steps: set one, the drawn data has no end")
    return training.max_steps * samples_a_step(recipe)


def mixture_for_stage(recipe: Recipe, task: str, processor: SiQVLProcessor) -> Mixture:
    """Return the recipe's mixture; rows that are left out are named in `dropped_rows.jsonl` of the output folder."""
    return build_mixture(
        recipe.data,
        task,
        rows_needed(recipe),
        processor=processor,
        max_length=recipe.training.max_length,
        drop_log=Path(recipe.training.output_dir) / DROP_LOG,
        places=recipe.places,
        vision_tower=recipe.model.vision_tower and recipe.find(recipe.model.vision_tower),
        readers=recipe.training.world_size * max(1, recipe.training.dataloader_num_workers),
        processes=recipe.training.dataset_num_proc or 1,
    )


def traces_for_stage(recipe: Recipe, processor: SiQVLProcessor | None) -> TrainingTraces:
    """Return the rows of stage 3; traces that are left out are named in `dropped_rows.jsonl` of the output folder."""
    return training_traces(
        recipe.traces,
        seed=recipe.training.seed,
        count=rows_needed(recipe),
        processor=processor,
        max_length=recipe.training.max_length,
        max_image_side=recipe.data.max_image_side,
        max_bad_share=recipe.data.max_bad_share,
        blind=recipe.data.blind,
        drop_log=None if recipe.run.dry_run else Path(recipe.training.output_dir) / DROP_LOG,
    )


def hold_out(recipe: Recipe, mixture: Mixture, task: str) -> tuple[Dataset | IterableDataset, list[Mapping]]:
    """Return the rows to train on, and those that the model answers every `sample_steps` steps.

    Drawn figures have a validation split of their own; of other mixtures the first rows are kept from training.
    """
    count = recipe.run.sample_count
    if not recipe.run.sample_steps:
        return mixture.rows, []
    if _drawn_only(recipe):
        rows = training_rows("validation", count, task, blind=recipe.data.blind)
        return mixture.rows, list(rows)
    if isinstance(mixture.rows, IterableDataset):
        return mixture.rows.skip(count), list(mixture.rows.take(count))
    count = min(count, len(mixture.rows) // 2)
    return mixture.rows.select(range(count, len(mixture.rows))), [mixture.rows[index] for index in range(count)]


def held_out_traces(recipe: Recipe, traces: TrainingTraces) -> list[Mapping]:
    """Return the rows that the model answers every `sample_steps` steps: the first of the validation rows."""
    if not recipe.run.sample_steps or traces.validation is None:
        return []
    return [traces.validation[index] for index in range(min(recipe.run.sample_count, len(traces.validation)))]


def _drawn_only(recipe: Recipe) -> bool:
    return [source.path for source in recipe.data.sources] == [FIGURES]


def make_trainer(
    recipe: Recipe,
    model: SiQVLForConditionalGeneration,
    processor: SiQVLProcessor,
    rows: Dataset | IterableDataset,
    held_out: Sequence[Mapping] = (),
    validation: Dataset | None = None,
    watched: Sequence[Mapping] = (),
) -> SFTTrainer:
    """Return TRL's trainer for a stage, with the loss on every assistant turn.

    Args:
        recipe: what to run.
        model: the model that the stage starts from; what the stage does not train is frozen.
        processor: its processor.
        rows: training rows for `ConversationCollator`; where they name their `source`, its loss is logged.
        held_out: rows that the model answers every `sample_steps` steps.
        validation: rows whose loss is measured as `eval_strategy` says.
        watched: rows on which the reasoning is measured every `emergence_steps` steps.
    """
    training, traces = recipe.training, recipe.traces
    training.remove_unused_columns = False  # rows are made when read: what is stored is where they come from
    # The trainer sets these itself where it also brings the collator.
    model.config.get_text_config().pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    peft_config = freeze_for_stage(model, recipe.stage, recipe.model)
    if isinstance(rows, IterableDataset):  # each process reads its own: batches of unlike sizes cannot be cut up
        training.accelerator_config.dispatch_batches = False
    pictured = rows
    rows = rows_with_features(recipe, model, processor, pictured)
    collate: Callable = ConversationCollator(processor, training.max_length)
    lengths = None
    if recipe.run.batching == "length_grouped":
        lengths = row_lengths(rows, collate, training.dataloader_num_workers)
    if traces is not None and traces.answer_weight != 1:
        collate = AnswerWeights(collate, processor.tokenizer, traces.answer_weight)
    trainer = SiQVLTrainer(
        model=model,
        args=training,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collate,
        processing_class=processor,
        peft_config=peft_config,
        run_settings=run_settings(recipe),
        in_order=traces is not None and traces.curriculum != "none",
        pack_tokens=recipe.run.pack_tokens if recipe.run.batching == "packed" else 0,
        lengths=lengths,
        stored_features=rows is not pictured,
    )
    check_engine(trainer, recipe)
    _add_callbacks(trainer, recipe, processor, held_out)
    _watch(trainer, recipe, processor, watched)
    log_parameters(trainer.model)
    logger.info(
        "a step takes %d samples: %d a device x %d accumulated x %d processes",
        samples_a_step(recipe),
        training.train_batch_size,
        training.gradient_accumulation_steps,
        training.world_size,
    )
    return trainer


def _add_callbacks(trainer: SFTTrainer, recipe: Recipe, processor: SiQVLProcessor, held_out: Sequence[Mapping]) -> None:
    run = recipe.run
    if run.free_memory_steps:
        trainer.add_callback(FreeMemoryCallback(run.free_memory_steps))
    if recipe.traces is not None and recipe.traces.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(recipe.traces.early_stopping_patience))
    if run.sample_steps and held_out:
        callback = SampleCallback(held_out, processor, run.sample_steps, run.sample_tokens)
        callback.trainer = trainer
        trainer.add_callback(callback)
    elif run.sample_steps:
        logger.warning("sample_steps is %d, but there are no held-out rows to answer", run.sample_steps)


def _watch(trainer: SFTTrainer, recipe: Recipe, processor: SiQVLProcessor, watched: Sequence[Mapping]) -> None:
    steps = recipe.run.emergence_steps
    if steps and watched:
        # Evaluation, which it measures with, is loaded for the runs that ask for it.
        from siq_vl.training.emergence import EmergenceCallback

        callback = EmergenceCallback(watched, processor, steps)
        callback.trainer = trainer
        trainer.add_callback(callback)
    elif steps:
        logger.warning(
            "emergence_steps is %d, but there are no held-out rows with a rationale: set validation_share in stage 3",
            steps,
        )


def train_and_save(
    trainer: SFTTrainer, processor: SiQVLProcessor, recipe: Recipe, report: MixtureReport | None = None
) -> Path:
    """Train, write the stage's checkpoint and, with `push_to_hub`, push it; return its folder.

    A run that was ended goes on from the last complete checkpoint of its output folder.

    Args:
        trainer: what `make_trainer` returned.
        processor: the processor to save with the model.
        recipe: what to run.
        report: counts of the rows that were used and left out, for settings and model card.

    Raises:
        ValueError: the output folder holds checkpoints of another run.
    """
    folder = Path(recipe.training.output_dir)
    checkpoint = recipe.training.resume_from_checkpoint
    if checkpoint is None:
        if trainer.accelerator.is_main_process:
            discard_incomplete(folder)
        trainer.accelerator.wait_for_everyone()
        checkpoint = checkpoint_to_resume(folder, run_settings(recipe), settings_unnamed_before())
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.monotonic() - started
    steps = None
    if checkpoint is not None:
        steps = trainer.state.global_step - int(Path(checkpoint).name.rpartition("-")[2])
    save_stage(trainer, processor, recipe, seconds, report, steps=steps)
    if recipe.hub.push_to_hub and trainer.accelerator.is_main_process:
        hub = recipe.hub
        push_stage(folder, repo_id=hub.repo_id, revision=hub.revision, private=hub.private, token=hub.token)
    trainer.accelerator.wait_for_everyone()
    return folder

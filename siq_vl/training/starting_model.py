"""Building or loading what a stage starts from."""

import logging
import tempfile

import torch
from transformers import set_seed

from siq_vl.data.hub_errors import unreadable_model
from siq_vl.loading import load_model, load_processor
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.backbones import random_model
from siq_vl.training.quantization import load_nf4
from siq_vl.training.recipes import Recipe, local_or_hub, starting_checkpoint

logger = logging.getLogger(__name__)


def load_for_stage(recipe: Recipe) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    """Return the model and processor that a stage starts from.

    Stage 1 joins the recipe's two backbones with a fresh projector; later stages load the previous stage's checkpoint,
    with `load_in_4bit` its language model in NF4. With `random_weights` any stage starts from random weights.

    Raises:
        ValueError: the recipe names no backbones, or the previous stage has left no checkpoint.
    """
    set_seed(recipe.training.seed)  # the fresh projector is drawn here, before the trainer seeds itself
    model, processor = _load(recipe)
    # Everything is frozen but what the stage names, and that has to be float32 to take small steps.
    model.model.projector.float()
    return model, processor


def _load(recipe: Recipe) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    dtype = getattr(torch, recipe.model.dtype)
    if recipe.model.random_weights:
        model, processor = random_model(recipe)
        if not recipe.adapter.load_in_4bit:
            return model.to(dtype), processor
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            return _load_4bit(folder, recipe), processor
    if recipe.stage != "1":
        path = starting_checkpoint(recipe)
        logger.info("stage %s of recipe %s starts from %s", recipe.stage, recipe.name, path)
        processor = load_processor(path)
        if recipe.adapter.load_in_4bit:
            return _load_4bit(path, recipe), processor
        return load_model(path, dtype=dtype), processor
    return _join_backbones(recipe, dtype)


def _load_4bit(path: str, recipe: Recipe) -> SiQVLForConditionalGeneration:
    compute_dtype = torch.bfloat16 if recipe.training.bf16 else torch.float32
    return load_nf4(path, recipe.adapter, getattr(torch, recipe.model.dtype), compute_dtype)


def _join_backbones(recipe: Recipe, dtype: torch.dtype) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    model = recipe.model
    if model.vision_tower is None or model.language_model is None:
        raise ValueError(
            "stage 1 builds the model from two backbones: set vision_tower and language_model in the recipe"
        )
    tower, language_model = local_or_hub(model.vision_tower), local_or_hub(model.language_model)
    logger.info("stage 1 of recipe %s joins %s and %s", recipe.name, model.vision_tower, model.language_model)
    # The processor reads both backbones' small files, so that an id that cannot be had is found before any weights.
    try:
        processor = SiQVLProcessor.from_backbones(
            tower, language_model, pixel_shuffle_factor=model.pixel_shuffle_factor
        )
        built = SiQVLForConditionalGeneration.from_backbones(
            tower,
            language_model,
            image_token_id=processor.image_token_id,
            vision_start_token_id=processor.vision_start_token_id,
            vision_end_token_id=processor.vision_end_token_id,
            projector_type=model.projector_type,
            pixel_shuffle_factor=model.pixel_shuffle_factor,
            dtype=dtype,
        )
    except OSError as error:
        raise unreadable_model(f"{model.vision_tower} or {model.language_model}", error) from error
    return built, processor

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
from siq_vl.training.quantization import load_quantized
from siq_vl.training.recipes import Recipe, starting_checkpoint
from siq_vl.training.sharding import whole_weights

logger = logging.getLogger(__name__)


def load_for_stage(recipe: Recipe) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    """Return the model and processor that a stage starts from.

    Stage 1 joins the recipe's two backbones with a fresh projector; later stages load the previous stage's checkpoint,
    with `load_in_4bit` or `load_in_8bit` its language model quantized. With `random_weights` any stage starts from random weights.

    Raises:
        ValueError: the recipe names no backbones, or the previous stage has left no checkpoint.
    """
    set_seed(recipe.training.seed)  # the fresh projector is drawn here, before the trainer seeds itself
    with whole_weights(recipe.training):
        model, processor = _load(recipe)
    # Everything is frozen but what the stage names, and that has to be float32 to take small steps.
    model.model.projector.float()
    return model, processor


def _load(recipe: Recipe) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    arguments = recipe.model
    if arguments.random_weights:
        model, processor = random_model(recipe)
        if arguments.quantized:
            # bitsandbytes quantizes what is loaded, and nothing else.
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                del model
                return _load_checkpoint(folder, recipe), processor
        if arguments.attn_implementation is not None:
            model.set_attn_implementation(arguments.attn_implementation)
        return model.to(getattr(torch, arguments.dtype)), processor
    if recipe.stage == "1":
        return _join_backbones(recipe)
    path = starting_checkpoint(recipe)
    logger.info("stage %s of recipe %s starts from %s", recipe.stage, recipe.name, path)
    revision = arguments.model_revision
    return _load_checkpoint(path, recipe, revision=revision), load_processor(path, revision=revision)


def _load_checkpoint(path: str, recipe: Recipe, **kwargs) -> SiQVLForConditionalGeneration:
    """Load a checkpoint as the recipe wants it held."""
    arguments = recipe.model
    dtype = getattr(torch, arguments.dtype)
    if arguments.attn_implementation is not None:
        kwargs["attn_implementation"] = arguments.attn_implementation
    if not arguments.quantized:
        return load_model(path, dtype=dtype, **kwargs)
    compute_dtype = torch.float32
    if recipe.training.bf16:
        compute_dtype = torch.bfloat16
    return load_quantized(path, arguments, dtype, compute_dtype, **kwargs)


def _join_backbones(recipe: Recipe) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    arguments = recipe.model
    if arguments.vision_tower is None or arguments.language_model is None:
        raise ValueError(
            "stage 1 builds the model from two backbones: set vision_tower and language_model in the recipe"
        )
    tower, language_model = recipe.find(arguments.vision_tower), recipe.find(arguments.language_model)
    logger.info("stage 1 of recipe %s joins %s and %s", recipe.name, arguments.vision_tower, arguments.language_model)
    # The processor reads both backbones' small files, so that an id that cannot be had is found before any weights.
    try:
        processor = SiQVLProcessor.from_backbones(
            tower, language_model, pixel_shuffle_factor=arguments.pixel_shuffle_factor
        )
        model = SiQVLForConditionalGeneration.from_backbones(
            tower,
            language_model,
            image_token_id=processor.image_token_id,
            vision_start_token_id=processor.vision_start_token_id,
            vision_end_token_id=processor.vision_end_token_id,
            projector_type=arguments.projector_type,
            pixel_shuffle_factor=arguments.pixel_shuffle_factor,
            dtype=getattr(torch, arguments.dtype),
        )
    except OSError as error:
        raise unreadable_model(f"{arguments.vision_tower} or {arguments.language_model}", error) from error
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    return model, processor

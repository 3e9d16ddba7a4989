"""Building or loading what a stage starts from."""

import logging

from transformers import set_seed

from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.recipes import Recipe, local_or_hub, starting_checkpoint

logger = logging.getLogger(__name__)


def load_for_stage(recipe: Recipe) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    """Return the model and processor that a stage starts from.

    Stage 1 joins the recipe's two backbones with a fresh projector; later stages load the previous stage's checkpoint.

    Raises:
        ValueError: the recipe names no backbones, or the previous stage has left no checkpoint.
    """
    set_seed(recipe.training.seed)  # the fresh projector is drawn here, before the trainer seeds itself
    if recipe.stage != "1":
        path = starting_checkpoint(recipe)
        logger.info("stage %s of recipe %s starts from %s", recipe.stage, recipe.name, path)
        return SiQVLForConditionalGeneration.from_pretrained(path), SiQVLProcessor.from_pretrained(path)
    model = recipe.model
    if model.vision_tower is None or model.language_model is None:
        raise ValueError(
            "stage 1 builds the model from two backbones: set vision_tower and language_model in the recipe"
        )
    tower, language_model = local_or_hub(model.vision_tower), local_or_hub(model.language_model)
    logger.info("stage 1 of recipe %s joins %s and %s", recipe.name, model.vision_tower, model.language_model)
    processor = SiQVLProcessor.from_backbones(tower, language_model, pixel_shuffle_factor=model.pixel_shuffle_factor)
    built = SiQVLForConditionalGeneration.from_backbones(
        tower,
        language_model,
        image_token_id=processor.image_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        projector_type=model.projector_type,
        pixel_shuffle_factor=model.pixel_shuffle_factor,
    )
    return built, processor

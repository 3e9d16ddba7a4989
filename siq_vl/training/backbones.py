"""The model that a recipe names: its sizes without a download, and a stand-in with random weights."""

import logging

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.planning.sizes import model_config
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.recipes import REPO_ROOT, ModelArguments, Recipe, backbones_of, starting_checkpoint

logger = logging.getLogger(__name__)

STAND_INS = (REPO_ROOT / "backbones" / "siglip2-tiny", REPO_ROOT / "backbones" / "qwen2.5-tiny")


def planned_config(recipe: Recipe) -> tuple[SiQVLConfig, str]:
    """Return the configuration of the model that a recipe trains, and where it came from; loads no weights.

    Raises:
        ValueError: the recipe names no backbones.
        OSError: a backbone is neither a folder, nor known here, nor to be had from the Hub.
    """
    if recipe.stage != "1" and not recipe.model.random_weights:
        try:
            path = starting_checkpoint(recipe)
            return SiQVLConfig.from_pretrained(path), f"the checkpoint {path}"
        except ValueError:
            logger.info("there is no checkpoint to start from yet: sizes are those of the recipe's backbones")
    tower, language_model = backbones_of(recipe)
    if tower is None or language_model is None:
        raise ValueError(
            "the model is built from two backbones: set vision_tower and language_model in the recipe, in stage 1's"
        )
    model = ModelArguments(
        vision_tower=tower,
        language_model=language_model,
        projector_type=recipe.model.projector_type,
        pixel_shuffle_factor=recipe.model.pixel_shuffle_factor,
    )
    return model_config(model), f"{tower} and {language_model}"


def random_model(recipe: Recipe) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    """Return the recipe's model in full size with random weights, and a processor with the tiny tokenizer.

    It learns nothing of use: it is there to measure speed and memory where no backbone can be downloaded. The
    tokenizer's ids are valid in any larger vocabulary.
    """
    config, source = planned_config(recipe)
    logger.warning("RANDOM WEIGHTS, in the sizes of %s: good for measuring speed and memory, for nothing else", source)
    processor = stand_in_processor(config)
    config.image_token_id = processor.image_token_id
    config.vision_start_token_id = processor.vision_start_token_id
    config.vision_end_token_id = processor.vision_end_token_id
    config.text_config.bos_token_id = None
    config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    model = SiQVLForConditionalGeneration(config)
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval(), processor


def stand_in_processor(config: SiQVLConfig) -> SiQVLProcessor:
    """Return a processor with the tiny tokenizer, for images of the size that a configuration says."""
    tower, language_model = map(str, STAND_INS)
    processor = SiQVLProcessor.from_backbones(tower, language_model, pixel_shuffle_factor=config.pixel_shuffle_factor)
    size = config.vision_config.image_size
    processor.image_processor.size = {"height": size, "width": size}
    processor.patch_size = config.vision_config.patch_size
    return processor

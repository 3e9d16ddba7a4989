"""The model that a recipe names: its sizes without a download, and a stand-in with random weights."""

import logging

from transformers import AutoConfig, PretrainedConfig

from siq_vl.configuration_siq_vl import DEFAULT_TEXT_CONFIG, DEFAULT_VISION_CONFIG, SiQVLConfig
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.arguments import ModelArguments
from siq_vl.training.recipes import REPO_ROOT, Recipe, backbones_of, local_or_hub, starting_checkpoint

logger = logging.getLogger(__name__)

VISION_TOWER, LANGUAGE_MODEL = "google/siglip2-large-patch16-512", "Qwen/Qwen2.5-0.5B-Instruct"

# The backbones of the report's recipes, so that their sizes need no network.
BACKBONES = {
    VISION_TOWER: DEFAULT_VISION_CONFIG,
    LANGUAGE_MODEL: DEFAULT_TEXT_CONFIG,
    "Qwen/Qwen2.5-1.5B-Instruct": {
        **DEFAULT_TEXT_CONFIG,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
}

STAND_INS = (REPO_ROOT / "backbones" / "siglip2-tiny", REPO_ROOT / "backbones" / "qwen2.5-tiny")


def backbone_config(name: str) -> PretrainedConfig:
    """Return the configuration of a backbone: one of `BACKBONES`, a folder, or a Hub id."""
    if name in BACKBONES:
        known = dict(BACKBONES[name])
        return AutoConfig.for_model(known.pop("model_type"), **known)
    config = AutoConfig.from_pretrained(local_or_hub(name))
    return config.vision_config if config.model_type == "siglip" else config


def model_config(model: ModelArguments) -> SiQVLConfig:
    """Return the configuration that stage 1 would build from a recipe's backbones."""
    text = backbone_config(model.language_model or LANGUAGE_MODEL)
    # Ids do not matter for sizes, and a small vocabulary would not have the default ones.
    return SiQVLConfig(
        vision_config=backbone_config(model.vision_tower or VISION_TOWER),
        text_config=text,
        projector_type=model.projector_type,
        pixel_shuffle_factor=model.pixel_shuffle_factor,
        image_token_id=0,
        vision_start_token_id=1,
        vision_end_token_id=2,
    )


def planned_config(recipe: Recipe) -> tuple[SiQVLConfig, str]:
    """Return the configuration of the model that a recipe trains, and where it came from; loads no weights.

    Raises:
        ValueError: the recipe names no backbones.
        OSError: a backbone is neither a folder, nor known here, nor to be had from the Hub.
    """
    if recipe.stage != "1" and not recipe.model.random_weights:
        try:
            path = starting_checkpoint(recipe)
            config = SiQVLConfig.from_pretrained(path, revision=recipe.model.model_revision)
            return config, f"the checkpoint {path}"
        except ValueError:
            logger.info("there is no checkpoint to start from yet: sizes are those of the recipe's backbones")
    tower, language_model = backbones_of(recipe)
    if tower is None or language_model is None:
        raise ValueError(
            "the model is built from two backbones: set vision_tower and language_model in the recipe, in stage 1's"
        )
    model = ModelArguments(
        vision_tower=recipe.find(tower),
        language_model=recipe.find(language_model),
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

"""Whether a run reads the frozen vision tower's features from a store."""

import logging
import os

from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from pyarrow.types import is_integer

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.data.feature_cache.build import FeaturesTooLarge, cached_rows, share_stored, store_of, tile_costs
from siq_vl.data.feature_cache.store import FeatureLayout
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.checkpoints import samples_a_step
from siq_vl.training.recipes import Recipe

logger = logging.getLogger(__name__)

_SHARED = 0.5  # of the pictures; with so many stored by another stage, a single epoch gains by computing the rest


def obstacle(recipe: Recipe, config: SiQVLConfig, streaming: bool) -> str | None:
    """Return why the vision tower's features cannot be stored; None where they can."""
    adapter = recipe.model
    if adapter.vision_lora or adapter.unfreeze_vision_layers:
        return "the vision tower trains (vision_lora or unfreeze_vision_layers is set)"
    if config.vision_config.attention_dropout:
        return f"the vision tower draws dropout (attention_dropout={config.vision_config.attention_dropout})"
    if streaming:
        return "rows are streamed, so that nobody knows which come again"
    if recipe.data.blind:
        return "pictures are withheld"
    return None


def times_read(recipe: Recipe, rows: int, distinct: int) -> float:
    """Return how often a run reads a row on average: of so many rows an epoch, so many different."""
    samples = recipe.training.num_train_epochs * rows
    if recipe.training.max_steps > 0:
        samples = recipe.training.max_steps * samples_a_step(recipe)
    return samples / distinct


def count_distinct(rows: Dataset) -> int:
    """Return how many different rows there are, of rows that are made from numbers; otherwise all count as such."""
    if rows.format["type"] != "custom" or not all(map(is_integer, rows.data.schema.types)):
        return len(rows)
    table = rows.with_format("arrow")[:]
    return table.group_by(table.column_names).aggregate([]).num_rows


def rows_with_features(
    recipe: Recipe,
    model: SiQVLForConditionalGeneration,
    processor: SiQVLProcessor,
    rows: Dataset | IterableDataset,
) -> Dataset | IterableDataset:
    """Return a run's rows, with stored features in place of pictures where the recipe asks for it or where it pays.

    With `feature_cache: auto` it pays where each row is read more than once and reading features takes less than
    computing them, as measured here, or where another run has stored the features of most pictures; and only where they
    fit `feature_cache_gb`.

    Raises:
        ValueError: `feature_cache` is on, and cannot be.
    """
    settings = recipe.features
    if settings.feature_cache == "off":
        logger.info("vision features are not stored: feature_cache is off")
        return rows
    reason = obstacle(recipe, model.config, isinstance(rows, IterableDataset))
    if reason and settings.feature_cache == "on":
        raise ValueError(f"feature_cache is on, but {reason}: set feature_cache to auto or off, or change that")
    if reason is None and settings.feature_cache == "auto":
        reason = _does_not_pay(recipe, model, processor, rows)
    if reason:
        logger.info("vision features are not stored: %s", reason)
        return rows
    training = recipe.training
    try:
        return cached_rows(
            rows,
            model,
            processor,
            settings,
            bf16=_autocasts(recipe),
            device=training.device,
            workers=training.dataloader_num_workers,
        )
    except FeaturesTooLarge as error:
        if settings.feature_cache == "on":
            raise
        logger.info("vision features are not stored: %s", error)
        return rows


def _autocasts(recipe: Recipe) -> bool:
    """Whether training computes in bfloat16: the recipe says so, or `accelerate launch` does."""
    return recipe.training.bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"


def _does_not_pay(
    recipe: Recipe, model: SiQVLForConditionalGeneration, processor: SiQVLProcessor, rows: Dataset
) -> str | None:
    distinct = count_distinct(rows)
    read = times_read(recipe, len(rows), distinct)
    dear = ""
    if read > 1:
        settings, training = recipe.features, recipe.training
        measured = tile_costs(model, processor, settings.feature_cache_dtype, _autocasts(recipe), training.device)
        costs = gather_object([measured])[0]  # all processes do the same
        said = f"a tile's features take {1e3 * costs.tower:.3g} ms to compute and {1e3 * costs.read:.3g} ms to read"
        if costs.pay(read):
            logger.info("vision features are stored: each of %d rows is read %.3g times; %s", distinct, read, said)
            return None
        dear = f"{said}, which does not pay for {read:.3g} times"
    store = store_of(model, processor, recipe.features, _autocasts(recipe), create=False)
    share = gather_object([share_stored(rows, store) if store is not None else 0.0])[0]  # all processes do the same
    if share >= _SHARED:
        logger.info("vision features are read: %.0f%% of the pictures are stored from another run", 100 * share)
        return None
    why = dear or "no row is read more than once"
    return f"{why}, and {100 * share:.0f}% of the pictures are stored from other runs"


def feature_plan(recipe: Recipe, config: SiQVLConfig, rows: int | None, available: int | None) -> str:
    """Say, for the plan of a run, whether it would store vision features, and how large they are.

    Args:
        recipe: what would be run.
        config: of the model.
        rows: rows of an epoch; None where nobody knows yet.
        available: different rows that the sources have; None where they have no end or nobody knows.
    """
    settings, vision = recipe.features, config.vision_config
    if settings.feature_cache == "off":
        return "not stored: feature_cache is off"
    if reason := obstacle(recipe, config, any(source.streaming for source in recipe.data.sources)):
        return f"not stored: {reason}"
    side = vision.image_size // vision.patch_size
    layout = FeatureLayout(side, side, vision.hidden_size, settings.feature_cache_dtype)
    size = (
        f"{side * side} patches x {vision.hidden_size} channels in {layout.dtype} = {layout.tile_bytes:,} bytes a tile"
    )
    if rows is None:
        return f"{size}; decided once the rows can be read"
    distinct = min(rows, available or rows)
    read = times_read(recipe, rows, distinct)
    if settings.feature_cache == "auto" and read <= 1:
        return f"not stored: no row is read more than once (unless other runs have stored most pictures); {size}"
    whole = distinct * layout.tile_bytes / 1e9
    return (
        f"computed once and stored in {settings.feature_cache_dir}, if they fit feature_cache_gb="
        f"{settings.feature_cache_gb:g}: each row is read {read:.3g} times\n"
        f"{size}; {whole:.3g} GB for {distinct:,} rows of one picture of their own and one tile each"
    )

"""The plan of a run: what `--dry_run` prints, with no weight loaded and no step taken."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.data.collation import IGNORED, ConversationCollator
from siq_vl.data.mixture_config import FIGURES
from siq_vl.data.mixtures import MANY_PASSES, Mixture, build_mixture, repeated
from siq_vl.data.packing import fill, padding_share
from siq_vl.distill.training_rows import TrainingTraces
from siq_vl.planning.sizes import Memory, Sizes, count, memory_table, size_table, training_memory
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.terms import inherited, licence_for, made_from, terms_of, terms_table
from siq_vl.training.arguments import ADAPTER_FIELDS, DataArguments, ModelArguments
from siq_vl.training.backbones import planned_config, stand_in_processor
from siq_vl.training.checkpoints import asked_from, samples_a_step
from siq_vl.training.recipes import Recipe, backbones_of, read_settings, starting_checkpoint
from siq_vl.training.run import rows_needed, traces_for_stage
from siq_vl.training.stored_features import feature_plan

logger = logging.getLogger(__name__)

_SAMPLED_ROWS = 64
_ASSUMED_LENGTH = 1024  # where no row can be read


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of some rows: the length of each, and means a row."""

    lengths: Sequence[int]
    image: float
    supervised: float

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths)


def plan(recipe: Recipe, task: str) -> str:
    """Return the plan of a run as text: model, parameters, data, steps, tokens and predicted memory.

    Args:
        recipe: what would be run.
        task: what drawn figures are asked, see `build_mixture`.

    Where the data or the tokenizer cannot be had here, the plan says so and goes on.

    Raises:
        ValueError: the recipe cannot run.
    """
    config, source = planned_config(recipe)
    sizes = count(config, recipe.stage, recipe.model)
    mixture, data = _data(recipe, task) if recipe.traces is None else _traces(recipe)
    counted, tokens = _tokens(recipe, config, mixture)
    length = counted.longest if counted else _ASSUMED_LENGTH
    batch = recipe.training.per_device_train_batch_size
    if recipe.run.batching == "packed":
        batch, length = 1, max(length, min(recipe.run.pack_tokens, batch * length))
    memory = predicted_memory(recipe, config, sizes, batch, length)
    sections = {
        "Model": f"{source}\n{config.image_seq_length} tokens an image{_random_note(recipe)}",
        "Parameters": "\n\n".join(filter(None, [size_table(sizes, recipe.model.lora_r), _trained(recipe, config)])),
        "Data": data,
        "Terms": _terms(recipe),
        "Steps": _steps(recipe, mixture),
        "Tokens": tokens,
        "Vision features": feature_plan(recipe, config, _rows_an_epoch(recipe, mixture), _available(mixture)),
        f"Memory of one device, predicted for {batch} x {length} tokens": memory_table(memory),
    }
    title = f"Plan of stage {recipe.stage}, recipe {recipe.title}"
    return "\n\n".join([title, *(f"{heading}\n\n{text}" for heading, text in sections.items())])


def predicted_memory(
    recipe: Recipe, config: SiQVLConfig, sizes: Sizes, batch_size: int, length: int, supervised: int | None = None
) -> Memory:
    """Return the estimate of `siq_vl.planning.sizes`, with the frozen weights in the type that the recipe holds them in.

    Args:
        recipe: what would be run.
        config: of its model.
        sizes: of its model.
        batch_size: samples on the device at once.
        length: tokens of a sample, image tokens included.
        supervised: tokens of the batch that have a label.
    """
    training = recipe.training
    return training_memory(
        config,
        sizes,
        batch_size,
        length,
        bf16=training.bf16,
        checkpointing=training.gradient_checkpointing,
        supervised=supervised,
        bf16_weights=recipe.model.dtype == "bfloat16",
        nf4=recipe.model.load_in_4bit and recipe.stage != "1",
        nested=recipe.model.use_bnb_nested_quant,
        device="cpu" if training.use_cpu else "cuda",
    )


def _random_note(recipe: Recipe) -> str:
    return "\nrandom weights: good for measuring, for nothing else" if recipe.model.random_weights else ""


def _trained(recipe: Recipe, config: SiQVLConfig) -> str:
    """Say what share trains; in stage 1, also what stage 2 of the same recipe will make of it."""
    lines = []
    for stage, adapter in (("1", recipe.model), ("2", _adapter_of_stage_2(recipe))):
        if recipe.stage == "1" and adapter is not None:
            sizes = count(config, stage, adapter)
            lora = f" with LoRA r={adapter.lora_r}" if sizes.lora else ""
            share = f"{100 * sizes.trainable_share:.2f}%"
            lines.append(f"stage {stage}{lora} trains {sizes.trainable:,} of {sizes.total:,} = {share}")
    return "\n".join(lines)


def _adapter_of_stage_2(recipe: Recipe) -> ModelArguments | None:
    if recipe.folder is None or not (recipe.folder / "stage2.yaml").exists():
        return None
    stated = read_settings(recipe.folder / "stage2.yaml")
    return ModelArguments(**{name: value for name, value in stated.items() if name in ADAPTER_FIELDS})


def _terms(recipe: Recipe) -> str:
    """Say what the model will be made from, under which terms, and what licence its card will therefore name."""
    names = set(made_from({"backbones": dict(enumerate(backbones_of(recipe)))}))
    if recipe.traces is not None:
        names.update(made_from({"traces": asdict(recipe.traces)}), asked_from(recipe))
    else:
        names.update(made_from({"data": asdict(recipe.data)}))
    if recipe.stage != "1" and not recipe.model.random_weights:
        try:
            names.update(inherited(Path(starting_checkpoint(recipe))))
        except ValueError:
            logger.info("there is no checkpoint to start from yet: its terms are not among these")
    licence = f"the card will say: {licence_for(names)}"
    return "\n\n".join(filter(None, [terms_table(sorted(names)), licence]))


def _data(recipe: Recipe, task: str) -> tuple[Mixture | None, str]:
    """Open the sources and look some of their rows through; return the mixture and what to say of it."""
    data = recipe.data
    try:
        needed = rows_needed(recipe)
        count = min(needed, _SAMPLED_ROWS) if needed else _SAMPLED_ROWS
        mixture = build_mixture(_streamed(recipe), task, count, places=recipe.places)
        _share_by_size(mixture, data)
    except (OSError, ValueError) as error:
        total = sum(source.weight or 1 for source in data.sources)
        lines = [f"{(source.weight or 1) / total:.1%}  {source.name}" for source in data.sources]
        return None, "\n".join([*lines, f"cannot be read here: {_line(error)}"])
    withheld = "\npictures are withheld" if data.blind else ""
    return mixture, f"{mixture.report.table()}\n\n({count} rows are looked at for this plan){withheld}"


def _traces(recipe: Recipe) -> tuple[TrainingTraces | None, str]:
    """Open the store of traces; return its rows and what to say of it."""
    config = recipe.traces
    named = f"traces of {config.traces}, teachers: {', '.join(config.teachers) or 'all of the store'}"
    if config.student == "text":
        named += "\nthe student sees captions and texts in place of pictures"
    try:
        processor = _processor(recipe)
    except (OSError, ValueError):
        processor = None
    try:
        traces = traces_for_stage(recipe, processor)
    except (OSError, ValueError) as error:
        return None, f"{named}\ncannot be read here: {_line(error)}"
    return traces, f"{named}\n{traces.report.table()}"


def _streamed(recipe: Recipe) -> DataArguments:
    """Return the mixture with sources from the Hub as streams: a plan downloads no data set."""
    places = (Path(), *recipe.places)
    remote = []
    for source in recipe.data.sources:
        is_here = any((place / source.path).exists() for place in places)
        remote.append(source.path != FIGURES and not is_here)
    if not any(remote):
        return recipe.data
    sources = []
    for source, away in zip(recipe.data.sources, remote, strict=True):
        sources.append(replace(source, streaming=source.streaming or away, weight=source.weight or 1.0))
    return replace(recipe.data, sources=sources)


def _share_by_size(mixture: Mixture, data: DataArguments) -> None:
    """Correct the shares of sources that a plan streams and training does not: without weights, by their sizes."""
    counted = mixture.report.sources
    if any(source.weight for source in data.sources) or any(not each.available for each in counted):
        return
    total = sum(each.available for each in counted)
    for each in counted:
        each.share = each.available / total


def _passes(recipe: Recipe, mixture: Mixture | TrainingTraces | None) -> dict[str, float]:
    """Return how often the run reads each row of a source, by its name, where that is known."""
    training = recipe.training
    steps_take = training.max_steps * samples_a_step(recipe) if training.max_steps > 0 else 0
    if mixture is None:
        return _passes_as_published(recipe, steps_take) if recipe.traces is None else {}
    if isinstance(mixture, TrainingTraces):
        different = len(mixture.rows)
        times = steps_take / different if steps_take else training.num_train_epochs
        return {"the traces": times}
    if not steps_take:
        return {}
    counted = mixture.report.sources
    return {each.name: steps_take * each.share / each.available for each in counted if each.available}


def _passes_as_published(recipe: Recipe, draws: int) -> dict[str, float]:
    """Return the same for a Hub that cannot be reached, by the sizes that are known of its data sets."""
    sizes, sources = {}, recipe.data.sources
    for source in sources:
        rows = (terms_of(source.name).rows or {}).get(source.split)
        if rows is not None:
            sizes[source.name] = rows if source.max_samples is None else min(rows, source.max_samples)
    if len(sizes) < len(sources) or not draws:
        return {}
    weights = {source.name: source.weight or sizes[source.name] for source in sources}
    total = sum(weights.values())
    return {name: draws * weights[name] / total / sizes[name] for name in sizes}


def _steps(recipe: Recipe, mixture: Mixture | TrainingTraces | None) -> str:
    """Say how many steps there are, of how many samples, and how often each row is read."""
    lines = [_counted_steps(recipe, mixture)]
    for name, times in _passes(recipe, mixture).items():
        lines.append(
            f"WARNING: {repeated(name, times)}"
            if times > MANY_PASSES
            else f"each row of {name} is read {times:.2f} times"
        )
    return "\n".join(lines)


def _counted_steps(recipe: Recipe, mixture: Mixture | TrainingTraces | None) -> str:
    training = recipe.training
    each = samples_a_step(recipe)
    how = (
        f"{each} samples a step: {training.train_batch_size} a device x {training.gradient_accumulation_steps} "
        f"accumulated x {training.world_size} processes"
    )
    if training.max_steps > 0:
        return f"{training.max_steps:,} steps, {training.max_steps * each:,} samples\n{how}"
    epochs = f"{training.num_train_epochs:g} epochs"
    rows = _rows_an_epoch(recipe, mixture)
    if not rows:
        return f"{epochs}; the number of steps is known once the data can be read\n{how}"
    return f"at most {-(-rows // each) * training.num_train_epochs:,.0f} steps, {epochs} of {rows:,} rows\n{how}"


def _rows_an_epoch(recipe: Recipe, mixture: Mixture | TrainingTraces | None) -> int | None:
    """Return the rows of an epoch, at most; None where they are not known yet."""
    return rows_needed(recipe) or _available(mixture)


def _available(mixture: Mixture | TrainingTraces | None) -> int | None:
    """Return the different rows that there are; None where a source has no end, or nobody knows."""
    if isinstance(mixture, TrainingTraces):
        return len(mixture.rows)
    counts = [source.available for source in mixture.report.sources] if mixture else [None]
    return None if None in counts else sum(counts)


def _tokens(
    recipe: Recipe, config: SiQVLConfig, mixture: Mixture | TrainingTraces | None
) -> tuple[TokenCounts | None, str]:
    images = f"{config.image_seq_length} an image"
    if mixture is None:
        return None, f"{images}; texts are counted where the data can be read"
    try:
        processor = _processor(recipe)
    except (OSError, ValueError) as error:
        return None, f"{images}; texts are not counted, the tokenizer is not here: {_line(error)}"
    counted = count_tokens(processor, islice(mixture.rows, _SAMPLED_ROWS))
    steps = recipe.training.max_steps
    total = f"; about {counted.mean * steps * samples_a_step(recipe):,.0f} in all" if steps > 0 else ""
    return counted, (
        f"{counted.mean:.1f} a row, {counted.image:.1f} of them of images, {counted.supervised:.1f} supervised; the "
        f"longest row has {counted.longest} ({counted.rows} rows counted){total}\n{_batching(recipe, counted.lengths)}"
    )


def _batching(recipe: Recipe, lengths: Sequence[int]) -> str:
    """Say how much of the passes of such rows would be padding, and how full packed rows would be."""
    run, at_once = recipe.run, recipe.training.train_batch_size
    text = f"batches of {at_once}, padded, are {padding_share(lengths, at_once):.1%} padding"
    if run.batching == "length_grouped":
        return f"{text}; grouped by length, {padding_share(sorted(lengths), at_once):.1%}"
    if run.batching == "packed":
        packed = f"packed rows of {run.pack_tokens} tokens are {fill(lengths, run.pack_tokens, at_once):.1%} full"
        return f"{text}; {packed} and hold no padding"
    return text


def longest_row(recipe: Recipe, task: str) -> int:
    """Return the tokens of the longest of some rows, or an assumed length where no row can be read here."""
    rows, _ = _data(recipe, task) if recipe.traces is None else _traces(recipe)
    counted, _ = _tokens(recipe, planned_config(recipe)[0], rows)
    return counted.longest if counted else _ASSUMED_LENGTH


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:1000]


def _processor(recipe: Recipe) -> SiQVLProcessor:
    if recipe.stage != "1" and not recipe.model.random_weights:
        try:
            return SiQVLProcessor.from_pretrained(starting_checkpoint(recipe), trust_remote_code=True)
        except ValueError:
            logger.info("texts are counted with the tokenizer of the recipe's language model")
    if recipe.model.random_weights:
        return stand_in_processor(planned_config(recipe)[0])
    tower, language_model = backbones_of(recipe)
    return SiQVLProcessor.from_backbones(
        recipe.find(tower), recipe.find(language_model), pixel_shuffle_factor=recipe.model.pixel_shuffle_factor
    )


def count_tokens(processor: SiQVLProcessor, rows: Iterable[Mapping]) -> TokenCounts:
    """Count the tokens of training rows, as the model will see them.

    Args:
        processor: renders and tokenizes.
        rows: rows for `ConversationCollator`.
    """
    collate = ConversationCollator(processor)
    whole, image, supervised = [], [], []
    for row in rows:
        batch = collate([row])
        whole.append(batch["input_ids"].numel())
        image.append(int((batch["input_ids"] == processor.image_token_id).sum()))
        supervised.append(int((batch["labels"] != IGNORED).sum()))
    return TokenCounts(
        lengths=whole,
        image=sum(image) / len(whole),
        supervised=sum(supervised) / len(whole),
    )

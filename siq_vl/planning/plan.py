"""The plan of a run: what `--dry_run` prints, with no weight loaded and no step taken."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.data.collation import IGNORED, ConversationCollator
from siq_vl.data.mixture_config import FIGURES
from siq_vl.data.mixtures import MANY_PASSES, Mixture, build_mixture, repeated
from siq_vl.data.packing import fill, padding_share
from siq_vl.planning.sizes import Memory, Sizes, count, memory_table, predicted_memory, size_table
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
class PlannedData:
    """The data of a run, as far as they can be seen here.

    Args:
        text: what to say of them.
        rows: training rows to look at; None where none can be read here.
        available: different rows that there are; None where a source has no end, or nobody knows.
        passes: how often the run reads each row, by the name of its source, where that is known.
    """

    text: str
    rows: Iterable[Mapping] | None = None
    available: int | None = None
    passes: Mapping[str, float] = field(default_factory=dict)


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
    data = _data(recipe, task)
    counted, tokens = _tokens(recipe, config, data)
    batch, length = batch_on_device(recipe, _longest(counted))
    memory = memory_of_run(recipe, config, sizes, _longest(counted))

    model = f"{source}\n{config.image_seq_length} tokens an image"
    if recipe.model.random_weights:
        model += "\nrandom weights: good for measuring, for nothing else"
    parameters = size_table(sizes, recipe.model.lora_r)
    if recipe.stage == "1":
        parameters += f"\n\n{_trained(recipe, config)}"
    rows_an_epoch = rows_needed(recipe) or data.available
    sections = {
        "Model": model,
        "Parameters": parameters,
        "Data": data.text,
        "Terms": _terms(recipe),
        "Steps": _steps(recipe, rows_an_epoch, data.passes),
        "Tokens": tokens,
        "Vision features": feature_plan(recipe, config, rows_an_epoch, data.available),
        f"Memory of one device, predicted for {batch} x {length} tokens": memory_table(memory),
    }
    text = f"Plan of stage {recipe.stage}, recipe {recipe.title}"
    for heading, section in sections.items():
        text += f"\n\n{heading}\n\n{section}"
    return text


def batch_on_device(recipe: Recipe, longest: int) -> tuple[int, int]:
    """Return the rows that a device has at once, and the tokens of each.

    Args:
        recipe: what would be run.
        longest: tokens of the longest row of its data.
    """
    batch = recipe.training.per_device_train_batch_size
    if recipe.run.batching != "packed":
        return batch, longest
    # One packed row, as full as the batch's rows can make it.
    return 1, max(longest, min(recipe.run.pack_tokens, batch * longest))


def memory_of_run(recipe: Recipe, config: SiQVLConfig, sizes: Sizes, longest: int) -> Memory:
    """Return what a device of a run holds at most, predicted for rows as long as the longest of its data.

    Args:
        recipe: what would be run.
        config: of its model.
        sizes: of its model.
        longest: tokens of the longest row of its data.
    """
    batch, length = batch_on_device(recipe, longest)
    return predicted_memory(recipe, config, sizes, batch, length)


def longest_row(recipe: Recipe) -> int:
    """Return the tokens of the longest of some rows, or an assumed length where no row can be read here."""
    config, _ = planned_config(recipe)
    counted, _ = _tokens(recipe, config, _data(recipe, recipe.task))
    return _longest(counted)


def _longest(counted: TokenCounts | None) -> int:
    if counted is None:
        return _ASSUMED_LENGTH
    return counted.longest


def _trained(recipe: Recipe, config: SiQVLConfig) -> str:
    """Say what share stage 1 trains, and what stage 2 of the same recipe will make of it."""
    adapters = {"1": recipe.model}
    if recipe.folder is not None and (recipe.folder / "stage2.yaml").exists():
        adapters["2"] = _adapter_in(recipe.folder / "stage2.yaml")
    lines = []
    for stage, adapter in adapters.items():
        sizes = count(config, stage, adapter)
        how = f"stage {stage}"
        if sizes.lora:
            how += f" with LoRA r={adapter.lora_r}"
        share = f"{100 * sizes.trainable_share:.2f}%"
        lines.append(f"{how} trains {sizes.trainable:,} of {sizes.total:,} = {share}")
    return "\n".join(lines)


def _adapter_in(path: Path) -> ModelArguments:
    """Return what a stage's file says of the adapter."""
    stated = read_settings(path)
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


def _data(recipe: Recipe, task: str) -> PlannedData:
    """Look through what the run reads: traces in stage 3, else the sources of its mixture."""
    if recipe.traces is not None:
        return _traces(recipe)
    wanted = _SAMPLED_ROWS
    try:
        needed = rows_needed(recipe)
        if needed:
            wanted = min(needed, _SAMPLED_ROWS)
        mixture = build_mixture(_streamed(recipe), task, wanted, places=recipe.places)
        _share_by_size(mixture, recipe.data)
    except (OSError, ValueError) as error:
        return PlannedData(
            f"{_shares(recipe.data)}\ncannot be read here: {_line(error)}", passes=_passes_as_published(recipe)
        )
    text = f"{mixture.report.table()}\n\n({wanted} rows are looked at for this plan)"
    if recipe.data.blind:
        text += "\npictures are withheld"
    return PlannedData(text, mixture.rows, _available(mixture), _passes(recipe, mixture))


def _shares(data: DataArguments) -> str:
    """Name the sources of a mixture, each with its share of the rows."""
    total = sum(source.weight or 1 for source in data.sources)
    lines = []
    for source in data.sources:
        lines.append(f"{(source.weight or 1) / total:.1%}  {source.name}")
    return "\n".join(lines)


def _available(mixture: Mixture) -> int | None:
    """Return the different rows of all sources; None where one has no end, or nobody knows."""
    available = 0
    for source in mixture.report.sources:
        if source.available is None:
            return None
        available += source.available
    return available


def _streamed(recipe: Recipe) -> DataArguments:
    """Return the mixture with sources from the Hub as streams: a plan downloads no data set."""
    sources = []
    any_away = False
    for source in recipe.data.sources:
        # Streams have no size to be mixed by, so all sources get a weight once one is a stream.
        away = source.path != FIGURES and not recipe.has(source.path)
        any_away = any_away or away
        sources.append(replace(source, streaming=source.streaming or away, weight=source.weight or 1.0))
    if not any_away:
        return recipe.data
    return replace(recipe.data, sources=sources)


def _traces(recipe: Recipe) -> PlannedData:
    """Open the store of traces."""
    config = recipe.traces
    named = f"traces of {config.traces}, teachers: {', '.join(config.teachers) or 'all of the store'}"
    if config.student == "text":
        named += "\nthe student sees captions and texts in place of pictures"
    try:
        processor = _processor(recipe)
    except (OSError, ValueError):
        processor = None  # no trace is then left out for its length
    try:
        traces = traces_for_stage(recipe, processor)
    except (OSError, ValueError) as error:
        return PlannedData(f"{named}\ncannot be read here: {_line(error)}")
    # Where the steps are not counted, epochs are.
    times = _draws(recipe) / len(traces.rows) or recipe.training.num_train_epochs
    return PlannedData(f"{named}\n{traces.report.table()}", traces.rows, len(traces.rows), {"the traces": times})


def _share_by_size(mixture: Mixture, data: DataArguments) -> None:
    """Correct the shares of sources that a plan streams and training does not: without weights, by their sizes."""
    counted = mixture.report.sources
    if any(source.weight for source in data.sources) or any(not each.available for each in counted):
        return
    total = sum(each.available for each in counted)
    for each in counted:
        each.share = each.available / total


def _draws(recipe: Recipe) -> int:
    """Return the rows that the run's steps take; 0 where epochs are counted instead."""
    return max(0, recipe.training.max_steps) * samples_a_step(recipe)


def _passes(recipe: Recipe, mixture: Mixture) -> dict[str, float]:
    """Return how often the run reads each row of a source, by its name, where that is known."""
    passes = {}
    for source in mixture.report.sources:
        if source.available and _draws(recipe):
            passes[source.name] = _draws(recipe) * source.share / source.available
    return passes


def _passes_as_published(recipe: Recipe) -> dict[str, float]:
    """Return the same for a Hub that cannot be reached, by the sizes that are known of its data sets."""
    sizes, sources = {}, recipe.data.sources
    for source in sources:
        rows = (terms_of(source.name).rows or {}).get(source.split)
        if rows is not None:
            sizes[source.name] = rows if source.max_samples is None else min(rows, source.max_samples)
    if len(sizes) < len(sources):
        return {}
    weights = {source.name: source.weight or sizes[source.name] for source in sources}
    total = sum(weights.values())
    return {name: _draws(recipe) * weights[name] / total / sizes[name] for name in sizes if _draws(recipe)}


def _steps(recipe: Recipe, rows_an_epoch: int | None, passes: Mapping[str, float]) -> str:
    """Say how many steps there are, of how many samples, and how often each row is read."""
    lines = [_counted_steps(recipe, rows_an_epoch)]
    for name, times in passes.items():
        if times > MANY_PASSES:
            lines.append(f"WARNING: {repeated(name, times)}")
        else:
            lines.append(f"each row of {name} is read {times:.2f} times")
    return "\n".join(lines)


def _counted_steps(recipe: Recipe, rows_an_epoch: int | None) -> str:
    training = recipe.training
    each = samples_a_step(recipe)
    how = (
        f"{each} samples a step: {training.train_batch_size} a device x {training.gradient_accumulation_steps} "
        f"accumulated x {training.world_size} processes"
    )
    if training.max_steps > 0:
        return f"{training.max_steps:,} steps, {training.max_steps * each:,} samples\n{how}"
    epochs = f"{training.num_train_epochs:g} epochs"
    if not rows_an_epoch:
        return f"{epochs}; the number of steps is known once the data can be read\n{how}"
    steps = -(-rows_an_epoch // each) * training.num_train_epochs  # the last one may have fewer samples
    return f"at most {steps:,.0f} steps, {epochs} of {rows_an_epoch:,} rows\n{how}"


def _tokens(recipe: Recipe, config: SiQVLConfig, data: PlannedData) -> tuple[TokenCounts | None, str]:
    """Count the tokens of some rows, where rows and tokenizer are here; return the counts and what to say."""
    images = f"{config.image_seq_length} an image"
    if data.rows is None:
        return None, f"{images}; texts are counted where the data can be read"
    try:
        processor = _processor(recipe)
    except (OSError, ValueError) as error:
        return None, f"{images}; texts are not counted, the tokenizer is not here: {_line(error)}"
    counted = count_tokens(processor, islice(data.rows, _SAMPLED_ROWS))
    total = ""
    if recipe.training.max_steps > 0:
        samples = recipe.training.max_steps * samples_a_step(recipe)
        total = f"; about {counted.mean * samples:,.0f} in all"
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:1000]


def _processor(recipe: Recipe) -> SiQVLProcessor:
    """Return the processor that the run would have, or one that makes the same tokens.

    Raises:
        OSError: a backbone is neither here nor to be had from the Hub.
        ValueError: a backbone's files are of another kind.
    """
    if recipe.model.random_weights:
        return stand_in_processor(planned_config(recipe)[0])
    if recipe.stage != "1":
        try:
            return SiQVLProcessor.from_pretrained(starting_checkpoint(recipe), trust_remote_code=True)
        except ValueError:
            logger.info("texts are counted with the tokenizer of the recipe's language model")
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
    lengths, image, supervised = [], 0, 0
    for row in rows:
        batch = collate([row])
        lengths.append(batch["input_ids"].numel())
        image += int((batch["input_ids"] == processor.image_token_id).sum())
        supervised += int((batch["labels"] != IGNORED).sum())
    return TokenCounts(lengths, image / len(lengths), supervised / len(lengths))

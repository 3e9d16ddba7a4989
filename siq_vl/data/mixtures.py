"""Mixtures: several sources, each with its weight, filters and bounds, as one data set of training rows."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random

from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from siq_vl.data.conversations import Dropped
from siq_vl.data.feature_cache.pictures import Pictures
from siq_vl.data.figures import rows as figures
from siq_vl.data.figures.dataset import sample
from siq_vl.data.filters import Duplicates
from siq_vl.data.preprocessing import DropLog, Preprocessor, Scorer
from siq_vl.data.scoring import SiglipScorer
from siq_vl.data.sources import FIGURES, Source, SourceConfig
from siq_vl.processing_siq_vl import SiQVLProcessor

logger = logging.getLogger(__name__)


@dataclass
class MixtureConfig:
    """What is trained on."""

    sources: list[SourceConfig] = field(
        default_factory=lambda: [SourceConfig(FIGURES)],
        metadata={"help": "Sources of the mixture: in a recipe, a list of mappings; here, paths or Hub ids."},
    )
    train_samples: int = field(
        default=0, metadata={"help": "Rows of the mixture; 0: as many as the steps take, or every row once an epoch."}
    )
    data_seed_offset: int = field(default=0, metadata={"help": "Stream of samples; each stage has its own."})
    blind: bool = field(default=False, metadata={"help": "Withhold every picture: the blind baseline."})
    max_bad_share: float = field(
        default=0.05, metadata={"help": "Stop when more than this share of the rows read from a source is broken."}
    )
    max_image_side: int = field(
        default=4096, metadata={"help": "Pictures with a longer side are scaled down to it while they are read."}
    )
    score_model: str | None = field(
        default=None, metadata={"help": "SigLIP checkpoint for min_image_text_score; the vision tower's by default."}
    )

    def __post_init__(self) -> None:
        self.sources = [SourceConfig(**each) if isinstance(each, Mapping) else each for each in self.sources]
        if not self.sources:
            raise ValueError("sources is empty; name at least one, for instance `path: figures`")
        weighted = [each.path for each in self.sources if each.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise ValueError(f"weight is set for {', '.join(weighted)} alone; set it for every source or for none")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; it must lie between 0 and 1")
        if self.max_image_side < 1:
            raise ValueError(f"max_image_side is {self.max_image_side}; it must be at least 1 pixel")


@dataclass
class SourceCount:
    """What one source gives to a mixture.

    Args:
        name: of the source.
        share: of the mixture's rows.
        available: rows that the source has; None where nobody knows, as in a stream.
        read: rows looked at before training.
        kept: of these, the rows that passed; None where rows are only looked at while training.
        used: rows of the mixture; a row may be used several times; None where the mixture has no end.
    """

    name: str
    share: float
    available: int | None = None
    read: int = 0
    kept: int | None = None
    used: int | None = None


@dataclass
class MixtureReport:
    """Counts of a mixture, for the log and the model card: by source, and dropped rows by reason."""

    sources: list[SourceCount]
    drops: DropLog

    def to_dict(self) -> dict:
        """Return the counts, with what was left out so far, before and while training, for JSON."""
        dropped = self.drops.merged()
        return {"sources": [{**asdict(each), "dropped": dropped.get(each.name, {})} for each in self.sources]}

    def table(self) -> str:
        """Return the counts as a Markdown table."""
        lines = ["| source | share | rows used | kept of read | left out |", "|---|---|---|---|---|"]
        for each in self.to_dict()["sources"]:
            dropped = sorted(each["dropped"].items(), key=lambda item: -item[1])
            kept = "while training" if each["kept"] is None else f"{each['kept']:,} of {each['read']:,}"
            cells = (
                each["name"],
                f"{each['share']:.1%}",
                "as many as the steps take" if each["used"] is None else f"{each['used']:,}",
                kept,
                ", ".join(f"{reason}: {count:,}" for reason, count in dropped) or "none",
            )
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


@dataclass
class Mixture:
    """Rows to train on, and where they come from.

    Args:
        rows: `images` and `messages` (or `prompt` and `completion`) for `ConversationCollator`; pictures are opened
            when a row is read.
        report: the counts.
    """

    rows: Dataset | IterableDataset
    report: MixtureReport


def build_mixture(
    config: MixtureConfig,
    task: str,
    count: int | None,
    *,
    processor: SiQVLProcessor | None = None,
    max_length: int | None = None,
    drop_log: Path | None = None,
    base: Path | None = None,
    vision_tower: str | None = None,
    scorer: Scorer | None = None,
    readers: int = 1,
) -> Mixture:
    """Open the sources, look their rows through, and mix them.

    Rows that are stored are looked through before training, as many as the run will use; the pictures of those that
    pass are opened when their turn comes, and a row whose picture cannot be read gives its place to the next of its
    source. Streams are looked through while they are read.

    Args:
        config: the mixture.
        task: `"caption"`, `"answer"` or `"reason"`: what drawn figures are asked.
        count: rows of the run; None for every row once an epoch.
        processor: counts tokens, for `max_length`.
        max_length: longest row in tokens; longer ones are left out.
        drop_log: file that names each row left out.
        base: folder for relative paths, beside the working folder.
        vision_tower: checkpoint that scores pictures and texts where `config.score_model` is not set.
        scorer: scores them in place of a checkpoint.
        readers: loader processes of all training processes together, among which streams are dealt out.

    Raises:
        ValueError: a source is not there, has nothing to train on, or has too many broken rows; a mixture without an
            end that no number of rows bounds; weights that are needed and not set.
    """
    drops = DropLog(config.max_bad_share, drop_log)
    if [each.path for each in config.sources] == [FIGURES]:
        count = _bounded(count, config.sources[0])
        rows = figures.training_rows("train", count, task, seed=config.data_seed_offset, blind=config.blind)
        return Mixture(rows, MixtureReport([SourceCount(FIGURES, 1.0, read=count, kept=count, used=count)], drops))
    drops.begin({"mixture": asdict(config), "max_length": max_length})
    if scorer is None and any(each.filters.min_image_text_score is not None for each in config.sources):
        checkpoint = config.score_model or vision_tower
        if checkpoint is None:
            raise ValueError("min_image_text_score needs a SigLIP checkpoint with both towers: set score_model")
        scorer = SiglipScorer.from_pretrained(checkpoint)
    reader = Preprocessor(drops, processor, max_length, config.max_image_side, scorer, config.blind)
    drawn = partial(_drawn, task=task, seed=config.data_seed_offset, blind=config.blind)
    sources = [None if each.path == FIGURES else Source(each, base) for each in config.sources]
    _name_apart(sources)
    for source in sources:
        for place, (file, why) in enumerate(source.damaged.items() if source is not None else ()):
            drops.add(source.name, -1 - place, Dropped("file that cannot be read", f"{file}: {why}", defect=True))
    mixed = MixedRows(sources, reader, drawn, config)
    mixture = mixed.stream(readers) if any(each.streaming for each in config.sources) else mixed.stored(count)
    logger.info("training rows\n%s", mixture.report.table())
    return mixture


class MixedRows:
    """The rows of several sources. See `build_mixture`; None stands for the drawn data set."""

    def __init__(self, sources: Sequence[Source | None], reader: Preprocessor, drawn, config: MixtureConfig):
        self.sources, self.reader, self.drawn, self.config = sources, reader, drawn, config
        self.names = [FIGURES if source is None else source.name for source in sources]
        self.kept: list[list[int]] = [[] for _ in sources]
        self.unreadable: set[tuple[int, int]] = set()

    def stored(self, count: int | None) -> Mixture:
        """Look stored rows through, and return a mixture that any row can be read from."""
        sizes = [self._size(index) for index in range(len(self.sources))]
        shares = self._shares(sizes)
        duplicates = Duplicates()
        for index, source in enumerate(self.sources):
            if source is not None:
                wanted = sizes[index] if count is None else min(sizes[index], math.ceil(count * shares[index]))
                self._look_through(index, wanted, duplicates)
        kept = [
            size if source is None else len(self.kept[i])
            for i, (source, size) in enumerate(zip(self.sources, sizes, strict=True))
        ]
        used = self._used(count, shares, kept)
        plan = [
            (index, position if size is None else position % size)
            for index, (rows, size) in enumerate(zip(used, kept, strict=True))
            for position in range(rows)
        ]
        Random(f"{self.config.data_seed_offset}/plan").shuffle(plan)
        columns = {"source": [index for index, _ in plan], "position": [position for _, position in plan]}
        counts = [
            SourceCount(
                name,
                rows / len(plan),
                available=None if source is None else len(source),
                read=rows if source is None else self.reader.drops.read[name],
                kept=rows if source is None else len(self.kept[index]),
                used=rows,
            )
            for index, (name, source, rows) in enumerate(zip(self.names, self.sources, used, strict=True))
        ]
        return Mixture(Dataset.from_dict(columns).with_transform(self._read), MixtureReport(counts, self.reader.drops))

    def stream(self, readers: int) -> Mixture:
        """Return a mixture without an end that is read in order, dealt out to so many readers."""
        sizes = [None if source is None or source.streaming else self._size(i) for i, source in enumerate(self.sources)]
        shares = self._shares(sizes)
        rows = IterableDataset.from_generator(
            partial(self._generate, readers=readers, shares=shares), gen_kwargs={"parts": list(range(readers))}
        )
        counts = [SourceCount(name, share) for name, share in zip(self.names, shares, strict=True)]
        return Mixture(rows, MixtureReport(counts, self.reader.drops))

    def row(self, index: int, position: int, pictures: Pictures | None = None) -> dict:
        """Return a training row: that at a position of a source, or the next that can be read.

        With `pictures`, those whose features are stored are not opened.

        Raises:
            ValueError: none can be read, or too many cannot.
        """
        source = self.sources[index]
        if source is None:
            return self.drawn(position)
        kept, drops = self.kept[index], self.reader.drops
        for step in range(len(kept)):
            number = kept[(position + step) % len(kept)]
            if (index, number) in self.unreadable:
                continue
            drops.read[source.name] += 1
            try:
                return self.reader.training_row(source, self.reader.conversation(source, source[number]), pictures)
            except Dropped as dropped:
                self.unreadable.add((index, number))
                drops.add(source.name, number, dropped)
        raise ValueError(f"no row of {source.name} can be read: {drops.summary(source.name)}")

    def _read(self, batch: Mapping, pictures: Pictures | None = None) -> dict[str, list]:
        rows = [self.row(*place, pictures) for place in zip(batch["source"], batch["position"], strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _size(self, index: int) -> int | None:
        """Return how many rows a source may give; None where only the recipe's steps bound it."""
        source, most = self.sources[index], self.config.sources[index].max_samples
        if source is None:
            return most
        return len(source) if most is None else min(len(source), most)

    def _shares(self, sizes: Sequence[int | None]) -> list[float]:
        weights = [each.weight for each in self.config.sources]
        if len(weights) == 1:
            return [1.0]
        if None in weights:
            endless = [name for name, size in zip(self.names, sizes, strict=True) if size is None]
            if endless:
                raise ValueError(f"{', '.join(endless)} has no known size: set `weight` for every source")
            weights = list(sizes)
        return [weight / sum(weights) for weight in weights]

    def _look_through(self, index: int, wanted: int, duplicates: Duplicates) -> None:
        """Keep `wanted` rows of a source that pass every check and filter, drawn at random."""
        source = self.sources[index]
        order = list(range(len(source)))
        Random(f"{self.config.data_seed_offset}/{source.name}").shuffle(order)
        rows = ((number, source[number]) for number in tqdm(order, desc=f"looking through {source.name}", disable=None))
        for number, _ in self.reader.accepted(source, rows, duplicates):
            self.kept[index].append(number)
            if len(self.kept[index]) == wanted:
                break
        if not self.kept[index]:
            why = self.reader.drops.summary(source.name) or "it is empty"
            raise ValueError(f"nothing is left of {source.name}, {len(source)} rows: {why}")

    def _used(self, count: int | None, shares: Sequence[float], kept: Sequence[int | None]) -> list[int]:
        """Return how many rows each source gives: `count` in all, or as many as repeat none."""
        if count is None:
            if None in kept:
                raise ValueError(
                    "drawn figures have no end: set max_steps, train_samples, or max_samples of this source"
                )
            if self.config.sources[0].weight is None:
                return list(kept)
            whole = min(rows / share for rows, share in zip(kept, shares, strict=True))
            return [max(1, math.floor(whole * share + 1e-9)) for share in shares]
        used = [math.floor(count * share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda index: used[index] - count * shares[index])
        for index in by_remainder[: count - sum(used)]:
            used[index] += 1
        return used

    def _generate(self, parts: Sequence[int], readers: int, shares: Sequence[float]) -> Iterator[dict]:
        """Yield one reader's rows without an end, each from the source that is furthest behind its share.

        `datasets` deals the list `parts` out, and so every reader is called with one of them.
        """
        streams = {index: self._endless(index, parts[0], readers) for index in range(len(self.sources))}
        credit = dict.fromkeys(streams, 0.0)
        while streams:
            for index in streams:
                credit[index] += shares[index]
            index = max(streams, key=credit.__getitem__)
            credit[index] -= 1
            row = next(streams[index], None)
            if row is None:  # none of its rows are dealt out to this reader
                del streams[index]
            else:
                yield row

    def _endless(self, index: int, part: int, readers: int) -> Iterator[dict]:
        """Yield a source's rows over and over, shuffled anew each time."""
        source, most, passes = self.sources[index], self.config.sources[index].max_samples, 0
        if most is not None:
            most = math.ceil(most / readers)
        while source is None:
            for position in range(most or 2**40):
                yield self.drawn(position * readers + part)
        while True:
            found, before = 0, self.reader.drops.read[source.name]
            seed = self.config.data_seed_offset + 1000 * passes if most is None else self.config.data_seed_offset
            for row in self._passed(source, part, readers, seed):
                found += 1
                yield row
                if found == most:
                    break
            if self.reader.drops.read[source.name] == before:
                return
            if not found:
                others = (each for each in range(readers) if each != part)
                if any(True for other in others for _ in self._passed(source, other, readers, seed)):
                    return  # only the rows of this reader are all unfit
                raise ValueError(f"nothing is left of {source.name}: {self.reader.drops.summary(source.name)}")
            passes += 1

    def _passed(self, source: Source, part: int, readers: int, seed: int) -> Iterator[dict]:
        """Yield the rows of one reader's part of a stream that can be trained on, once, in an order of their own."""
        for number, conversation in self.reader.accepted(source, source.stream(part, readers, seed), Duplicates()):
            try:
                yield self.reader.training_row(source, conversation)
            except Dropped as dropped:
                self.reader.drops.add(source.name, number, dropped)


def _drawn(index: int, task: str, seed: int, blind: bool) -> dict:
    """Return a drawn figure's row in the form of the other sources' rows."""
    made = figures.row(sample("train", index, seed=seed), task, blind=blind)
    return {
        "images": made["images"],
        "messages": [*made["prompt"], *made["completion"]],
        "source": FIGURES,
        "chat_template_kwargs": made.get("chat_template_kwargs", {}),
    }


def _bounded(count: int | None, config: SourceConfig) -> int:
    bounds = [bound for bound in (count, config.max_samples) if bound is not None]
    if not bounds:
        raise ValueError("drawn figures have no end: set max_steps, train_samples, or max_samples of this source")
    return min(bounds)


def _name_apart(sources: Sequence[Source | None]) -> None:
    """Number the sources of one name, so that their counts stay apart."""
    seen: dict[str, int] = {}
    for source in sources:
        if source is not None:
            seen[source.name] = seen.get(source.name, 0) + 1
            if seen[source.name] > 1:
                source.name = f"{source.name} #{seen[source.name]}"

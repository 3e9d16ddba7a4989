"""Mixtures: several sources, each with its weight, filters and bounds, as one data set of training rows."""

import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random

from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from siq_vl.data.conversations import Dropped
from siq_vl.data.feature_cache.pictures import Pictures, RowTransform, as_columns
from siq_vl.data.figures import rows as figures
from siq_vl.data.figures.dataset import sample
from siq_vl.data.filters import Duplicates
from siq_vl.data.look_through import looked_through
from siq_vl.data.mixture_config import FIGURES, MixtureConfig, SourceConfig
from siq_vl.data.preprocessing import DropLog, Preprocessor, Scorer
from siq_vl.data.scoring import SiglipScorer
from siq_vl.data.sources import Source
from siq_vl.processing_siq_vl import SiQVLProcessor

logger = logging.getLogger(__name__)

_NO_END = "drawn figures have no end: set max_steps, train_samples, or max_samples of this source"
MANY_PASSES = 4  # a row that is read more often is worth a word
_NO_BOUND = 2**40  # drawn figures before a stream begins anew: more than any run takes


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

    def passes(self) -> dict[str, float]:
        """Return how often each row of a source is read, by its name, where that is known and above 0."""
        found = {}
        for count in self.sources:
            if count.used and count.kept:
                found[count.name] = count.used / count.kept
        return found

    def to_dict(self) -> dict:
        """Return the counts, with what was left out so far, before and while training, for JSON."""
        dropped = self.drops.merged()
        sources = []
        for count in self.sources:
            sources.append({**asdict(count), "dropped": dropped.get(count.name, {})})
        return {"sources": sources}

    def table(self) -> str:
        """Return the counts as a Markdown table."""
        lines = ["| source | share | rows used | kept of read | left out |", "|---|---|---|---|---|"]
        for count in self.to_dict()["sources"]:
            used = "as many as the steps take"
            if count["used"] is not None:
                used = f"{count['used']:,}"
            kept = "while training"
            if count["kept"] is not None:
                kept = f"{count['kept']:,} of {count['read']:,}"
            # The commonest reason first.
            by_number = sorted(count["dropped"].items(), key=lambda item: -item[1])
            dropped = ", ".join(f"{reason}: {number:,}" for reason, number in by_number)
            lines.append(f"| {count['name']} | {count['share']:.1%} | {used} | {kept} | {dropped or 'none'} |")
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
    places: Sequence[Path] = (),
    vision_tower: str | None = None,
    scorer: Scorer | None = None,
    readers: int = 1,
    processes: int = 1,
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
        places: folders for relative paths, beside the working folder.
        vision_tower: checkpoint that scores pictures and texts where `config.score_model` is not set.
        scorer: scores them in place of a checkpoint.
        readers: loader processes of all training processes together, among which streams are dealt out.
        processes: that look stored rows through.

    Raises:
        ValueError: a source is not there, has nothing to train on, or has too many broken rows; a mixture without an
            end that no number of rows bounds; weights that are needed and not set.
    """
    drops = DropLog(config.max_bad_share, drop_log)
    if [source.path for source in config.sources] == [FIGURES]:
        # The drawn data set alone keeps its own form of rows, and its own order.
        count = _bounded(count, config.sources[0])
        rows = figures.training_rows("train", count, task, seed=config.data_seed_offset, blind=config.blind)
        return Mixture(rows, MixtureReport([SourceCount(FIGURES, 1.0, read=count, kept=count, used=count)], drops))
    drops.begin({"mixture": asdict(config), "max_length": max_length})
    if scorer is None and any(source.filters.min_image_text_score is not None for source in config.sources):
        checkpoint = config.score_model or vision_tower
        if checkpoint is None:
            raise ValueError("min_image_text_score needs a SigLIP checkpoint with both towers: set score_model")
        scorer = SiglipScorer.from_pretrained(checkpoint)
    preprocessor = Preprocessor(drops, processor, max_length, config.max_image_side, scorer, config.blind)
    mixed = MixedRows(_opened(config, task, places, preprocessor, processes), config, drops)
    streams = any(source.streaming for source in config.sources)
    mixture = mixed.stream(readers) if streams else mixed.stored(count)
    logger.info("training rows\n%s", mixture.report.table())
    for name, times in mixture.report.passes().items():
        if times > MANY_PASSES:
            logger.warning("%s", repeated(name, times))
    return mixture


def repeated(name: str, times: float) -> str:
    """Say of a source that its rows are read often, and what to do."""
    return (
        f"each row of {name} is read {times:.1f} times: add sources, or lower max_steps, unless that is what you want"
    )


def _bounded(count: int | None, config: SourceConfig) -> int:
    least = _least(count, config.max_samples)
    if least is None:
        raise ValueError(_NO_END)
    return least


def _opened(
    config: MixtureConfig, task: str, places: Sequence[Path], preprocessor: Preprocessor, processes: int
) -> "list[MixtureSource]":
    """Open every source, and take note of the files that cannot be read."""
    sources: list[MixtureSource] = []
    times_named: Counter[str] = Counter()
    for each in config.sources:
        if each.path == FIGURES:
            sources.append(DrawnFigures(each, task, config.data_seed_offset, config.blind))
            continue
        source = Source(each, places)
        # Sources of one name are numbered, so that their counts stay apart.
        times_named[source.name] += 1
        if times_named[source.name] > 1:
            source.name = f"{source.name} #{times_named[source.name]}"
        sources.append(CheckedSource(source, config.data_seed_offset, preprocessor, processes))
    for opened in sources:
        opened.note_damage()
    return sources


class MixtureSource(ABC):
    """A source as a mixture sees it, stored, streamed or drawn.

    Args:
        name: of its rows' counts and losses.
        size: rows that it may give before training; None where it has no end.
        streamed_size: the same for a mixture that is streamed; None where nobody knows.
        declared: different rows that it has, as far as its card says; None where it says nothing, or there is no end.
    """

    name: str
    size: int | None
    streamed_size: int | None
    declared: int | None

    @property
    @abstractmethod
    def kept(self) -> int | None:
        """Different rows that it gives, once `look_through` has been called; None where it has no end."""

    @abstractmethod
    def look_through(self, most: int | None, duplicates: Duplicates) -> None:
        """Find the rows that may be trained on, at most so many.

        Raises:
            ValueError: there is none, or too many are broken.
        """

    @abstractmethod
    def row(self, position: int, pictures: Pictures) -> dict:
        """Return the training row at a position below `kept`, its pictures come by through `pictures`."""

    @abstractmethod
    def rows(self, part: int, parts: int) -> Iterator[dict]:
        """Yield one of the `parts` that the rows are dealt out in, over and over, without an end."""

    @abstractmethod
    def counted(self, used: int, share: float) -> SourceCount:
        """Return what the source gives to a mixture that uses so many rows of it."""

    @abstractmethod
    def note_damage(self) -> None:
        """Take note, among the rows left out, of files that cannot be read."""


class DrawnFigures(MixtureSource):
    """The drawn data set, without an end: every position has a figure of its own.

    Args:
        config: bounds it, by `max_samples`.
        task: what figures are asked.
        seed: stream of figures.
        blind: withhold every picture.
    """

    name = FIGURES
    streamed_size = None
    declared = None

    def __init__(self, config: SourceConfig, task: str, seed: int, blind: bool):
        self.size = config.max_samples
        self.task, self.seed, self.blind = task, seed, blind

    @property
    def kept(self) -> int | None:
        return self.size

    def note_damage(self) -> None:
        """Do nothing: there are no files."""

    def look_through(self, most: int | None, duplicates: Duplicates) -> None:
        """Do nothing: a drawn figure is always fit to train on."""

    def row(self, position: int, pictures: Pictures) -> dict:
        made = figures.row(sample("train", position, seed=self.seed), self.task, blind=self.blind)
        return {
            "images": list(map(pictures.from_pixels, made["images"])),
            "messages": [*made["prompt"], *made["completion"]],
            "source": FIGURES,
            "chat_template_kwargs": made.get("chat_template_kwargs", {}),
        }

    def rows(self, part: int, parts: int) -> Iterator[dict]:
        most = _NO_BOUND
        if self.size is not None:
            most = math.ceil(self.size / parts)
        while True:
            for position in range(most):
                # Every part has figures of its own; a streamed picture is seen once, and its features are not stored.
                yield self.row(position * parts + part, Pictures())

    def counted(self, used: int, share: float) -> SourceCount:
        return SourceCount(self.name, share, read=used, kept=used, used=used)


class CheckedSource(MixtureSource):
    """The rows of a `Source` that pass every check and filter.

    Args:
        source: the rows, as they are stored.
        seed: of their order.
        preprocessor: checks them, and opens their pictures.
        processes: that look them through.
    """

    def __init__(self, source: Source, seed: int, preprocessor: Preprocessor, processes: int = 1):
        self.source, self.seed, self.preprocessor, self.processes = source, seed, preprocessor, processes
        self.name, self.drops = source.name, preprocessor.drops
        self.most = source.config.max_samples
        self.size = self.streamed_size = None
        self.declared = None if source.declared is None else _least(source.declared, self.most)
        if not source.streaming:
            self.size = self.streamed_size = _least(len(source), self.most)
        self.numbers: list[int] = []  # of the rows that passed
        self.unreadable: set[int] = set()  # of these, by number, whose pictures turned out not to be readable

    @property
    def kept(self) -> int:
        return len(self.numbers)

    def note_damage(self) -> None:
        for place, (file, why) in enumerate(self.source.damaged.items()):
            # Files have no row number: they count downwards from -1.
            self.drops.add(self.name, -1 - place, Dropped("file that cannot be read", f"{file}: {why}", defect=True))

    def look_through(self, most: int | None, duplicates: Duplicates) -> None:
        wanted = _least(self.size, most)
        # Drawn at random, so that a part of a source is like the whole.
        order = list(range(len(self.source)))
        Random(f"{self.seed}/{self.name}").shuffle(order)
        filters = self.source.config.filters
        if filters.read_pictures:
            self.numbers = self._with_pictures(order, wanted, duplicates)
        else:
            about = {"seed": self.seed, "name": self.name}
            self.numbers = looked_through(self.source, self.preprocessor, order, wanted, self.processes, about).numbers
        if not self.numbers:
            why = self.drops.summary(self.name) or "it is empty"
            raise ValueError(f"nothing is left of {self.name}, {len(self.source)} rows: {why}")

    def _with_pictures(self, order: Sequence[int], wanted: int, duplicates: Duplicates) -> list[int]:
        """Return the rows that pass filters which read pictures, or depend on the rows of other sources."""
        passed: list[int] = []
        progress = tqdm(order, desc=f"looking through {self.name}", disable=None)
        rows = ((number, self.source[number]) for number in progress)
        for number, _ in self.preprocessor.accepted(self.source, rows, duplicates):
            passed.append(number)
            if len(passed) == wanted:
                break
        return passed

    def row(self, position: int, pictures: Pictures) -> dict:
        """Return the training row at a position, or the next that can be read.

        Raises:
            ValueError: none can be read, or too many cannot.
        """
        for step in range(self.kept):
            number = self.numbers[(position + step) % self.kept]
            if number in self.unreadable:
                continue
            # Counted as read again, since a picture that cannot be read is counted as broken only now.
            self.drops.read[self.name] += 1
            try:
                conversation = self.preprocessor.conversation(self.source, self.source[number])
                return self.preprocessor.training_row(self.source, conversation, pictures)
            except Dropped as dropped:
                self.unreadable.add(number)
                self.drops.add(self.name, number, dropped)
        raise ValueError(f"no row of {self.name} can be read: {self.drops.summary(self.name)}")

    def rows(self, part: int, parts: int) -> Iterator[dict]:
        most = None
        if self.most is not None:
            most = math.ceil(self.most / parts)
        seed, passes = self.seed, 0
        while True:
            found, read_before = 0, self.drops.read[self.name]
            # Shuffled anew each time; but a bounded source takes the same rows again, the first of one order.
            if most is None:
                seed = self.seed + 1000 * passes
            for row in self._once(part, parts, seed):
                found += 1
                yield row
                if found == most:
                    break
            if self.drops.read[self.name] == read_before:
                return  # no row is dealt out to this part
            if not found:
                self._check_others(part, parts, seed)
                return
            passes += 1

    def _once(self, part: int, parts: int, seed: int) -> Iterator[dict]:
        """Yield the rows of one part that can be trained on, once, in an order of their own."""
        stored = self.source.stream(part, parts, seed)
        # Duplicates are looked for within one pass: the next pass reads the same rows again.
        for number, conversation in self.preprocessor.accepted(self.source, stored, Duplicates()):
            try:
                yield self.preprocessor.training_row(self.source, conversation)
            except Dropped as dropped:
                self.drops.add(self.name, number, dropped)

    def _check_others(self, part: int, parts: int, seed: int) -> None:
        """Refuse a source of which no other part has a row either: none of it can be trained on."""
        for other in range(parts):
            if other == part:
                continue
            for _ in self._once(other, parts, seed):
                return
        raise ValueError(f"nothing is left of {self.name}: {self.drops.summary(self.name)}")

    def counted(self, used: int, share: float) -> SourceCount:
        read = self.drops.read[self.name]
        return SourceCount(self.name, share, available=len(self.source), read=read, kept=self.kept, used=used)


def _least(*bounds: int | None) -> int | None:
    """Return the least of bounds, of which each may be missing; None where all are."""
    return min((bound for bound in bounds if bound is not None), default=None)


class MixedRows(RowTransform):
    """The rows of several sources, as a data set that is stored or streamed. See `build_mixture`.

    Args:
        sources: the sources, in the order of `config.sources`.
        config: of the mixture.
        drops: takes note of the rows that are left out.
    """

    def __init__(self, sources: Sequence[MixtureSource], config: MixtureConfig, drops: DropLog):
        self.sources, self.config, self.drops = sources, config, drops

    def stored(self, count: int | None) -> Mixture:
        """Look stored rows through, and return a mixture that any row can be read from."""
        shares = self._shares([source.size for source in self.sources])
        duplicates = Duplicates()  # one for all: what one source has is a duplicate in the next
        for source, share in zip(self.sources, shares, strict=True):
            # No more rows are looked at than the run will use: each costs reading and checking.
            most = None
            if count is not None:
                most = math.ceil(count * share)
            source.look_through(most, duplicates)
        used = self._used(count, shares)
        plan = []  # (source, position) of each row
        for index, (source, rows) in enumerate(zip(self.sources, used, strict=True)):
            for position in range(rows):
                # A source that has fewer rows than its share wants gives them again.
                if source.kept is not None:
                    position %= source.kept
                plan.append((index, position))
        # Shuffled here, not by the trainer alone: the first rows, which may be held out, are to be of every source.
        Random(f"{self.config.data_seed_offset}/plan").shuffle(plan)
        columns = {"source": [index for index, _ in plan], "position": [position for _, position in plan]}
        counts = []
        for source, rows in zip(self.sources, used, strict=True):
            counts.append(source.counted(rows, rows / len(plan)))
        return Mixture(Dataset.from_dict(columns).with_transform(self), MixtureReport(counts, self.drops))

    def stream(self, readers: int) -> Mixture:
        """Return a mixture without an end that is read in order, dealt out to so many loader processes."""
        shares = self._shares([source.streamed_size for source in self.sources])
        rows = IterableDataset.from_generator(
            partial(self._generate, readers=readers, shares=shares), gen_kwargs={"parts": list(range(readers))}
        )
        counts = []
        for source, share in zip(self.sources, shares, strict=True):
            counts.append(SourceCount(source.name, share, available=source.declared))
        return Mixture(rows, MixtureReport(counts, self.drops))

    def read(self, batch: Mapping[str, list], pictures: Pictures) -> dict[str, list]:
        """Return the columns of planned rows; see `RowTransform`."""
        rows = []
        for index, position in zip(batch["source"], batch["position"], strict=True):
            rows.append(self.sources[index].row(position, pictures))
        return as_columns(rows)

    def _shares(self, sizes: Sequence[int | None]) -> list[float]:
        """Return each source's share of the mixture: by the weights or, where none is set, by the sizes."""
        if len(self.sources) == 1:
            return [1.0]
        weights: list[float] = []
        endless = []
        for source, each, size in zip(self.sources, self.config.sources, sizes, strict=True):
            if each.weight is not None:
                weights.append(each.weight)
            elif size is not None:
                weights.append(size)
            else:
                endless.append(source.name)
        if endless:
            raise ValueError(f"{', '.join(endless)} has no known size: set `weight` for every source")
        return [weight / sum(weights) for weight in weights]

    def _used(self, count: int | None, shares: Sequence[float]) -> list[int]:
        """Return how many rows each source gives: `count` in all, or as many as repeat none."""
        if count is None:
            return self._whole(shares)
        used = [math.floor(count * share) for share in shares]
        # What rounding down has left goes to the sources that lost most by it.
        by_remainder = sorted(range(len(shares)), key=lambda index: used[index] - count * shares[index])
        for index in by_remainder[: count - sum(used)]:
            used[index] += 1
        return used

    def _whole(self, shares: Sequence[float]) -> list[int]:
        """Return how many rows each source gives to the largest mixture of these shares that repeats none."""
        kept = []
        for source in self.sources:
            if source.kept is None:
                raise ValueError(_NO_END)
            kept.append(source.kept)
        if self.config.sources[0].weight is None:
            return kept
        # The source that runs out first ends the mixture.
        whole = min(rows / share for rows, share in zip(kept, shares, strict=True))
        # What should come out whole may come out a little below.
        return [max(1, math.floor(whole * share + 1e-9)) for share in shares]

    def _generate(self, parts: Sequence[int], readers: int, shares: Sequence[float]) -> Iterator[dict]:
        """Yield one reader's rows without an end, each from the source that is furthest behind its share.

        `datasets` deals the list `parts` out, and so every reader is called with one of them.
        """
        streams = {index: source.rows(parts[0], readers) for index, source in enumerate(self.sources)}
        # Each row earns every source its share, and costs the source that gives it 1.
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

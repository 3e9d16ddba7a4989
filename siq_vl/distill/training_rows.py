"""From a store of traces to training rows: which traces, how many of a question, in which order, seen how.

One row is one trace: the question with its pictures, answered by `<think>rationale</think><answer>answer</answer>`, or,
for a share of the rows, by the answer alone. A trace that is left out is counted by its reason, as a mixture's rows are.

`training_traces` is the story: open the store, look every trace through (`_usable`), choose (`choice`), and hand out rows
that are read when their turn comes (`_Rows`).
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from siq_vl.data.conversations import Conversation, Dropped, check, check_text, message, well_formed
from siq_vl.data.feature_cache.pictures import Pictures, RowTransform, as_columns
from siq_vl.data.fields import Unreadable, as_items, as_text, bad_row, kind, plain_rows, texts_of
from siq_vl.data.fields import field as column
from siq_vl.data.figures.rows import reasoned
from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.mixtures import MixtureReport, SourceCount
from siq_vl.data.preprocessing import DropLog, Preprocessor
from siq_vl.distill.choice import PlannedRow, TraceChoice, choose, order_epoch, split_by_question
from siq_vl.distill.descriptions import DESCRIPTIONS, Descriptions
from siq_vl.distill.trace_arguments import TraceArguments
from siq_vl.distill.traces import evaluated, read_traces
from siq_vl.processing_siq_vl import SiQVLProcessor

logger = logging.getLogger(__name__)

DIRECT = "direct answers"  # what loss and counts call the rows that do not reason
NO_TEACHER = "no teacher"  # what counts call the rows whose teacher is not named
_TEXTS = ("sample_id", "question", "teacher", "rationale", "answer", "verdict")
_LISTS = ("golds", "choices", "rejected_by")
_EXTRA = ("image_paths", "caption", "ocr")  # columns that some stores have
_RULE = re.compile(r"[a-z_]{1,40}")
_SCANNED = 1024  # traces that are looked through together
# The most tokens that the chat template adds to a question and its answer, pictures not counted.
_TEMPLATE_TOKENS = 64


@dataclass
class TrainingTraces:
    """Rows to train on and to validate with, and the counts of both.

    Args:
        rows: rows for `ConversationCollator`; pictures are opened when a row is read.
        validation: rows of the questions that are kept from training; None where no share is.
        report: what was used and left out, by teacher.
    """

    rows: Dataset
    validation: Dataset | None
    report: MixtureReport


def training_traces(
    config: TraceArguments,
    *,
    seed: int,
    count: int | None = None,
    processor: SiQVLProcessor | None = None,
    max_length: int | None = None,
    max_image_side: int | None = None,
    max_bad_share: float = 0.05,
    blind: bool = False,
    drop_log: Path | None = None,
) -> TrainingTraces:
    """Open a store, look its traces through, and choose those to train on and to validate with.

    Args:
        config: which traces.
        seed: decides what is drawn; the same seed draws the same rows.
        count: rows of the run, where fewer than all are wanted.
        processor: counts tokens; without it, no length is checked.
        max_length: longest row, in tokens; longer ones are left out.
        max_image_side: pictures with a longer side are scaled down while they are read.
        max_bad_share: greatest share of a teacher's traces that may be broken.
        blind: withhold every picture.
        drop_log: file that names each trace left out.

    Raises:
        ValueError: there is no store, it lacks a teacher, or nothing is left to train on.
    """
    if config.traces is None:
        raise ValueError("traces names no store: set it to the folder that generate_traces.py wrote")
    folder = Path(config.traces)
    stored = _open(folder)
    if found := evaluated(folder):
        logger.warning("the traces are of %s: do not evaluate on it what is trained on them", ", ".join(found))
    weights = _weights(config, stored, folder)

    drops = DropLog(max_bad_share, drop_log)
    drops.begin({"traces": asdict(config), "max_length": max_length})
    # Counting every row's tokens takes longer than reading it: it is left out where no row can be too long.
    counts_tokens = config.student == "text" or not _all_short(stored, processor, max_length)
    preprocessor = Preprocessor(drops, processor if counts_tokens else None, max_length, max_image_side, blind=blind)
    descriptions = None
    if config.student == "text":
        descriptions = Descriptions(folder, drops)
    root = Path(config.image_root or folder)
    teachers = {name: _TeacherSource(name, root, descriptions) for name in weights}
    usable = list(_usable(stored, teachers, preprocessor, config, processor))

    def chosen(traces: Sequence[TraceChoice]) -> list[PlannedRow]:
        return choose(traces, weights, config.traces_per_question, config.direct_share, seed)

    for_training, for_validation = split_by_question(usable, config.validation_share, seed)
    train = chosen(for_training)
    if not train or (config.validation_share and not for_validation):
        left_out = ", ".join(f"{name}: {drops.summary(name)}" for name in drops.reasons)
        raise ValueError(
            f"{folder} leaves {len(train)} traces to train on, of teachers {', '.join(weights)} (left out: {left_out or 'none'}): "
            "generate more, or loosen max_rationale_tokens, max_length, verified or validation_share"
        )
    epoch = order_epoch(train, config.curriculum, seed, count)
    rows = _Rows(stored, epoch, teachers, preprocessor).dataset()
    validation = None
    if for_validation:
        held_out = order_epoch(chosen(for_validation), config.curriculum, seed, None)
        validation = _Rows(stored, held_out, teachers, preprocessor).dataset()
    report = MixtureReport(_counts(epoch, usable, weights, drops), drops)
    logger.info("training rows\n%s", report.table())
    return TrainingTraces(rows, validation, report)


def store_state(config: TraceArguments) -> dict[str, int]:
    """Return what tells whether a store is still the same: its shards and their sizes in bytes."""
    folder = Path(config.traces or "")
    files = sorted((folder / "data").glob("traces-*.parquet"))
    state = {path.name: path.stat().st_size for path in files}
    if config.student == "text":
        # A student without eyes learns from what it is told, too.
        for path in sorted((folder / DESCRIPTIONS / "data").glob("traces-*.parquet")):
            state[f"{DESCRIPTIONS}/{path.name}"] = path.stat().st_size
    return state


def _open(folder: Path) -> Dataset:
    """Return a store's traces, rejected ones too, their pictures still encoded."""
    stored = read_traces(folder, kept=False)
    extra = [name for name in _EXTRA if name in stored.column_names]
    return stored.select_columns([*_TEXTS, *_LISTS, "images", *extra]).with_format("arrow")


def _weights(config: TraceArguments, stored: Dataset, folder: Path) -> dict[str, float]:
    """Return the weights of the teachers that are learned from: those that are named, or all of the store."""
    known = sorted(name for name in stored.unique("teacher") if _is_name(name))
    weights = config.weights or dict.fromkeys(known, 1.0)
    for name in weights:
        if name not in known:
            raise ValueError(
                f"teachers names {name!r}, and {folder} has traces of {', '.join(known)}: name one of these"
            )
    return weights


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _all_short(stored: Dataset, processor: SiQVLProcessor | None, max_length: int | None) -> bool:
    """Return whether no row can have more than `max_length` tokens, since a token of text has at least one byte."""
    # Where pictures are cut into tiles, their tokens hang on their sizes, which are not looked at here.
    if processor is None or max_length is None or processor.max_tiles > 1:
        return False
    table = stored.data.table
    # A store that another tool wrote may have other types; choices would lengthen the question.
    if not pa.types.is_list(table["choices"].type) or pc.max(pc.list_value_length(table["choices"])).as_py():
        return False
    most = _TEMPLATE_TOKENS
    for name in ("question", "rationale", "answer"):
        if not pa.types.is_string(table[name].type):
            return False
        most += pc.max(pc.binary_length(table[name])).as_py() or 0
    pictures = pc.max(pc.list_value_length(table["images"])).as_py() or 0
    return most + pictures * processor.image_seq_length <= max_length


def _usable(
    stored: Dataset,
    teachers: Mapping[str, "_TeacherSource"],
    preprocessor: Preprocessor,
    config: TraceArguments,
    processor: SiQVLProcessor | None,
) -> Iterator[TraceChoice]:
    """Yield the traces that may be trained on, in the store's order; the others are counted."""
    pictures_of = pc.list_value_length(stored.data.column("images")).to_pylist()
    wants_lengths = bool(config.max_rationale_tokens) or config.curriculum == "length"
    start = 0
    for batch in stored.remove_columns("images").iter(_SCANNED):
        rows = plain_rows(batch)
        sound = _sound(rows, start, teachers, preprocessor.drops)
        start += len(rows)
        lengths = [0] * len(sound)
        if processor is not None and wants_lengths and sound:
            # Tokenized together: one call a batch takes a fraction of the time of one a row.
            tokens = processor.tokenizer([row["rationale"] for _, row in sound])["input_ids"]
            lengths = [len(ids) for ids in tokens]
        for (index, row), length in zip(sound, lengths, strict=True):
            teacher = teachers[row["teacher"]]
            try:
                _check(row, length, config)
                # Whether its pictures can be read is seen when they are: they are not looked at here.
                pictures = [b""] * (pictures_of[index] or 0)
                preprocessor.conversation(teacher, {**row, "images": pictures, "direct": False})
            except Dropped as dropped:
                preprocessor.drops.add(teacher.name, index, dropped)
            else:
                yield TraceChoice(index, row["sample_id"], row["teacher"], length)


def _sound(
    rows: Sequence[Mapping], start: int, teachers: Mapping[str, "_TeacherSource"], drops: DropLog
) -> list[tuple[int, dict]]:
    """Return the rows of the teachers that are learned from whose columns are what they must be, with their positions."""
    sound = []
    for index, row in enumerate(rows, start):
        name = row["teacher"] if _is_name(row["teacher"]) else NO_TEACHER
        # A trace of nobody is a defect of the store, whoever is learned from; others' traces are merely not wanted.
        if name not in teachers and name != NO_TEACHER:
            continue
        drops.read[name] += 1
        try:
            sound.append((index, _validated(row)))
        except Dropped as dropped:
            drops.add(name, index, dropped)
    return sound


def _validated(row: Mapping) -> dict:
    """Return a stored trace with every column in the type that it must have.

    Raises:
        Dropped: one has another.
    """
    checked = dict(row)
    for name in _TEXTS:
        checked[name] = as_text(column(row, name), name)
    for name in _LISTS:
        checked[name] = texts_of(as_items(column(row, name)), name)
    for name in ("sample_id", "teacher", "question"):
        if not checked[name].strip():
            raise bad_row(f"its {name} is empty")
    for name in ("sample_id", "rationale"):  # the others are seen where the conversation is made
        check_text(checked[name])
    return checked


def _check(row: Mapping, length: int, config: TraceArguments) -> None:
    """Look at what this run wants of a trace.

    Raises:
        Dropped: it is rejected, does not reason or answer, or is too long.
    """
    if config.verified and row["verdict"] != "kept":
        rule = row["rejected_by"][0] if row["rejected_by"] else ""
        # The name becomes a line of the counts, so it must be one.
        raise Dropped(f"rejected: {rule if _RULE.fullmatch(rule) else 'no rule is named'}")
    if not row["rationale"].strip() or not row["answer"].strip():
        raise Dropped("no rationale or no answer")
    if config.max_rationale_tokens and length > config.max_rationale_tokens:
        raise Dropped("longer than max_rationale_tokens", f"{length} tokens")


def _counts(
    epoch: Sequence[PlannedRow], usable: Sequence[TraceChoice], weights: Mapping[str, float], drops: DropLog
) -> list[SourceCount]:
    """Return what was read, kept and used, by teacher; rows that answer directly are a line of their own."""
    used = Counter(DIRECT if row.direct else row.trace.teacher for row in epoch)
    kept = Counter(trace.teacher for trace in usable)
    counts = []
    for name in weights:
        read = drops.read[name]
        share = used[name] / len(epoch)
        counts.append(SourceCount(name, share, available=read, read=read, kept=kept[name], used=used[name]))
    if used[DIRECT]:
        answers = used[DIRECT]
        share = answers / len(epoch)
        counts.append(SourceCount(DIRECT, share, available=answers, read=answers, kept=answers, used=answers))
    return counts


class _TeacherSource:
    """One teacher's traces as a source for `Preprocessor`.

    Args:
        name: of the teacher.
        root: folder that paths of pictures start from.
        descriptions: what a student without eyes is told in place of pictures; None where it sees them.
    """

    def __init__(self, name: str, root: Path, descriptions: Descriptions | None):
        self.name = name
        self.roots = [root]
        self.config = SourceConfig(str(root))
        self._descriptions = descriptions

    def conversation(self, row: Mapping | Unreadable) -> Conversation:
        """Return a trace, as `_validated` leaves it, as the one turn that is trained on.

        Raises:
            Dropped: a student without eyes is told nothing of its pictures.
        """
        if not isinstance(row, Mapping):
            raise bad_row(f"it is {kind(row)}")
        rationale, answer = row["rationale"], row["answer"]
        if row["direct"]:
            rationale = ""
            # The gold answer is as short as answers shall be; the teacher's may be a sentence.
            if row["golds"]:
                answer = row["golds"][0]
        images = as_items(row["images"] or row.get("image_paths"))
        question = student_question(row)
        # A question about no picture needs none described.
        if self._descriptions is not None and images:
            images = []
            question = f"{self._descriptions.of(row)}\n{question}"
        turns = [message("user", question, len(images)), message("assistant", reasoned(rationale, answer))]
        options = {"enable_thinking": not row["direct"]}
        return well_formed(Conversation(images, turns, template_options=options))


def student_question(row: Mapping) -> str:
    """Return a question as it is put to the student: with its choices, lettered, where it has some."""
    lines = [row["question"]]
    for place, choice in enumerate(row["choices"]):
        lines.append(f"{chr(ord('A') + place)}. {choice}")
    return "\n".join(lines)


class _Rows(RowTransform):
    """The planned rows of a store, read when their turn comes."""

    def __init__(
        self,
        stored: Dataset,
        plan: Sequence[PlannedRow],
        teachers: Mapping[str, _TeacherSource],
        preprocessor: Preprocessor,
    ):
        self._stored, self._plan, self._teachers, self._preprocessor = stored, plan, teachers, preprocessor
        self._unreadable: set[int] = set()

    def dataset(self) -> Dataset:
        return Dataset.from_dict({"position": range(len(self._plan))}).with_transform(self)

    def read(self, batch: Mapping[str, list], pictures: Pictures) -> dict[str, list]:
        return as_columns([self._row(position, pictures) for position in batch["position"]])

    def _row(self, position: int, pictures: Pictures) -> dict:
        """Return the row at a position, or the next whose pictures can be read.

        Raises:
            ValueError: none can be read, or too many cannot.
        """
        for step in range(len(self._plan)):
            trace, direct = self._plan[(position + step) % len(self._plan)]
            if trace.index in self._unreadable:
                continue
            teacher = self._teachers[trace.teacher]
            try:
                (stored,) = plain_rows(self._stored[trace.index])
                conversation = teacher.conversation({**_validated(stored), "direct": direct})
                check(conversation)
                if self._preprocessor.blind:
                    conversation = conversation.without_images()
                row = self._preprocessor.training_row(teacher, conversation, pictures)
            except Dropped as dropped:
                self._unreadable.add(trace.index)
                self._preprocessor.drops.add(trace.teacher, trace.index, dropped)
                continue
            return {**row, "source": DIRECT} if direct else row
        drops = self._preprocessor.drops
        raise ValueError(f"no trace can be read: {', '.join(map(drops.summary, drops.reasons))}")

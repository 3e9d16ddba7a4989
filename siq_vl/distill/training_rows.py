"""From a store of traces to training rows: which traces, how many of a question, in which order, seen how.

One row is one trace: the question with its pictures, answered by `<think>rationale</think><answer>answer</answer>`, or,
for a share of the rows, by the answer alone. A trace that is left out is counted by its reason, as a mixture's rows are.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from siq_vl.data.conversations import Conversation, Dropped, check, check_text, message, well_formed
from siq_vl.data.feature_cache.pictures import Pictures, RowTransform, as_columns
from siq_vl.data.fields import Unreadable, as_items, as_text, bad_row, kind, parse_row, plain_rows, texts_of
from siq_vl.data.fields import field as column
from siq_vl.data.figures.dataset import sample
from siq_vl.data.figures.rows import reasoned
from siq_vl.data.mixtures import MixtureReport, SourceCount
from siq_vl.data.preprocessing import DropLog, Preprocessor
from siq_vl.data.sources import SourceConfig
from siq_vl.distill.traces import read_traces
from siq_vl.processing_siq_vl import SiQVLProcessor

logger = logging.getLogger(__name__)

CURRICULA = ("none", "length")
STUDENTS = ("multimodal", "text")
DIRECT = "direct answers"  # what loss and counts call the rows that do not reason
NO_TEACHER = "no teacher"  # what counts call the rows whose teacher is not named
CAPTIONS_FILE = "captions.jsonl"
_COLUMNS = ("sample_id", "question", "golds", "choices", "teacher", "rationale", "answer", "rejected_by", "verdict")
_TEXTS = ("sample_id", "question", "teacher", "rationale", "answer", "verdict")
_RULE = re.compile(r"[a-z_]{1,40}")
_DRAWN = re.compile(r"(train|validation|test|combinations)/(\d{1,18})/(scenes|charts|documents)/(\d{1,18})")
_SCANNED = 1024  # traces that are looked through together
# The most tokens that the chat template adds to a question and its answer, pictures not counted.
_TEMPLATE_TOKENS = 64


@dataclass
class TraceArguments:
    """What stage 3 learns from: the traces of a store, and which of them."""

    traces: str | None = field(default=None, metadata={"help": "Folder of the store, as generate_traces.py leaves it."})
    teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "Teachers, 'name' or 'name=weight' (where traces are drawn); default: every teacher alike."},
    )
    traces_per_question: int = field(
        default=1, metadata={"help": "Traces of one question, drawn by the teachers' weights; 0: all of them."}
    )
    max_rationale_tokens: int = field(
        default=0,
        metadata={"help": "Longest rationale, in the student's tokens; longer ones are left out; 0: no bound."},
    )
    curriculum: str = field(
        default="none", metadata={"help": "'none', or 'length': in each epoch short rationales first, growing."}
    )
    direct_share: float = field(
        default=0.0, metadata={"help": "Share of rows that answer directly, so that short answers survive."}
    )
    answer_weight: float = field(
        default=1.0, metadata={"help": "Loss weight of the tokens of <answer>...</answer>; all others have 1."}
    )
    verified: bool = field(
        default=True, metadata={"help": "Kept traces; false: rejected ones too, where they reason and answer."}
    )
    student: str = field(
        default="multimodal", metadata={"help": "'multimodal', or 'text': captions and OCR text in place of pictures."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder of the pictures, for a store that keeps them by reference."}
    )
    validation_share: float = field(
        default=0.0, metadata={"help": "Share of the questions that is kept from training, for eval_strategy."}
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after so many evaluations without a better validation loss; 0: never."}
    )

    def __post_init__(self) -> None:
        _ = self.weights
        for name, choices in (("curriculum", CURRICULA), ("student", STUDENTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        for name in ("traces_per_question", "max_rationale_tokens", "early_stopping_patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.direct_share <= 1:
            raise ValueError(f"direct_share is {self.direct_share}; it must lie between 0 and 1")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}; it must be at least 0 and less than 1")
        if self.answer_weight <= 0:
            raise ValueError(f"answer_weight is {self.answer_weight}; it must be above 0, 1 for the plain loss")

    @property
    def weights(self) -> dict[str, float]:
        """The named teachers and their weights.

        Raises:
            ValueError: a weight that is no number above 0, or a teacher named twice.
        """
        weights: dict[str, float] = {}
        for given in self.teachers:
            name, sign, weight = given.partition("=")
            try:
                weights[name] = float(weight) if sign else 1.0
            except ValueError:
                weights[name] = 0.0
            if weights[name] <= 0:
                raise ValueError(f"teacher {given!r}: write it as name or name=weight, with a weight above 0")
        if len(weights) < len(self.teachers):
            raise ValueError(f"teachers are {', '.join(self.teachers)}: name each of them once")
        return weights


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


@dataclass(frozen=True)
class _Trace:
    """What choosing has to know of a trace that may be trained on."""

    index: int
    sample_id: str
    teacher: str
    length: int  # of its rationale, in the student's tokens; 0 where nobody asks


class _Teacher:
    """One teacher's traces as a source for `Preprocessor`."""

    def __init__(self, name: str, folder: Path, pictures_as: "Descriptions | None"):
        self.name, self.roots, self.config = name, [folder], SourceConfig(str(folder))
        self._descriptions = pictures_as

    def conversation(self, row: Mapping | Unreadable) -> Conversation:
        """Return a trace, as `_validated` leaves it, as the one turn that is trained on.

        Raises:
            Dropped: a student without eyes is told nothing of its pictures.
        """
        if not isinstance(row, Mapping):
            raise bad_row(f"it is {kind(row)}")
        answer = row["golds"][0] if row["direct"] and row["golds"] else row["answer"]
        completion = reasoned("" if row["direct"] else row["rationale"], answer)
        options = {"enable_thinking": not row["direct"]}
        images, question = as_items(row["images"] or row.get("image_paths")), asked(row)
        if self._descriptions is not None:
            images, question = [], f"{self._descriptions.of(row)}\n{question}"
        turns = [message("user", question, len(images)), message("assistant", completion)]
        return well_formed(Conversation(images, turns, template_options=options))


def asked(row: Mapping) -> str:
    """Return a question as it is put to the student: with its choices, lettered, where it has some."""
    choices = [f"{chr(ord('A') + place)}. {choice}" for place, choice in enumerate(row["choices"])]
    return "\n".join([row["question"], *choices])


class Descriptions:
    """What a student without eyes is told of a picture: its caption, and the text in it.

    They are columns `caption` and `ocr` of the store, or of `captions.jsonl` beside its data (one object a line, with
    the `sample_id`); drawn figures have their own. A line that is no such object is left out.

    Args:
        folder: the store.
        drops: takes note of the lines that are left out, by their number.
    """

    def __init__(self, folder: Path, drops: DropLog):
        self._folder = folder
        self._listed: dict[str, Mapping] = {}
        path = folder / CAPTIONS_FILE
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            drops.read[CAPTIONS_FILE] += 1
            entry = parse_row(line)
            if isinstance(entry, Mapping) and isinstance(entry.get("sample_id"), str | int):
                self._listed[str(entry["sample_id"])] = entry
                continue
            fault = f"it is {kind(entry)}" if isinstance(entry, Unreadable) else "its sample_id is missing or no text"
            fault = f"{CAPTIONS_FILE}, line {number} is not an object with a sample_id: {fault}"
            drops.add(CAPTIONS_FILE, number, Dropped("caption that cannot be read", fault, defect=True))

    def of(self, row: Mapping) -> str:
        """Return the description of a trace's pictures.

        Raises:
            Dropped: there is none, or it is no text.
        """
        entry = {**row, **self._listed.get(row["sample_id"], {})}
        caption, text = as_text(entry.get("caption"), "caption"), as_text(entry.get("ocr"), "ocr")
        lines = [*([caption] if caption else []), *([f"Text in the picture: {text}"] if text else [])]
        if not lines and (found := _DRAWN.fullmatch(row["sample_id"])):
            split, seed, domain, index = found.groups()
            drawn = sample(split, int(index), seed=int(seed), domain=domain)
            if drawn.question.text == row["question"]:
                lines = [drawn.figure.caption]
        if not lines:
            fault = (
                f"student is 'text', and sample {row['sample_id']!r:.80} has neither caption nor OCR text: give them as "
                f"columns `caption` and `ocr` of the store, or in {self._folder / CAPTIONS_FILE}, one line a sample: "
                '{"sample_id": "...", "caption": "...", "ocr": "..."}'
            )
            raise Dropped("neither caption nor OCR text", fault, defect=True)
        return "\n".join(lines)


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
    weights = _weights(config, stored, folder)
    drops = DropLog(max_bad_share, drop_log)
    drops.begin({"traces": asdict(config), "max_length": max_length})
    all_short = config.student == "multimodal" and _all_short(stored, processor, max_length)
    # Counting every row's tokens takes longer than reading it.
    preprocessor = Preprocessor(drops, None if all_short else processor, max_length, max_image_side, blind=blind)
    descriptions = Descriptions(folder, drops) if config.student == "text" else None
    root = Path(config.image_root) if config.image_root else folder
    teachers = {name: _Teacher(name, root, descriptions) for name in weights}
    usable = list(_usable(stored, teachers, preprocessor, config, processor))
    parts = _split(usable, config.validation_share, seed)
    train = _chosen(parts[False], weights, config, seed)
    if not train or (config.validation_share and not parts[True]):
        left_out = ", ".join(f"{name}: {drops.summary(name)}" for name in drops.reasons)
        raise ValueError(
            f"{folder} leaves {len(train)} traces to train on, of teachers {', '.join(weights)} (left out: {left_out or 'none'}): "
            "generate more, or loosen max_rationale_tokens, max_length, verified or validation_share"
        )
    plan = _plan(train, config, seed, count)
    held_out = _plan(_chosen(parts[True], weights, config, seed), config, seed, None) if parts[True] else None
    report = MixtureReport(_counts(plan, usable, weights, drops), drops)
    logger.info("training rows\n%s", report.table())
    return TrainingTraces(
        _Rows(stored, plan, teachers, preprocessor).dataset(),
        held_out and _Rows(stored, held_out, teachers, preprocessor).dataset(),
        report,
    )


def store_state(config: TraceArguments) -> dict[str, int]:
    """Return what tells whether a store is still the same: its shards and their sizes in bytes."""
    shards = sorted((Path(config.traces or "") / "data").glob("traces-*.parquet"))
    return {path.name: path.stat().st_size for path in shards}


def _open(folder: Path) -> Dataset:
    """Return a store's traces, rejected ones too, their pictures still encoded."""
    stored = read_traces(folder, kept=False)
    extra = [name for name in ("image_paths", "caption", "ocr") if name in stored.column_names]
    return stored.select_columns([*_COLUMNS, "images", *extra]).with_format("arrow")


def _weights(config: TraceArguments, stored: Dataset, folder: Path) -> dict[str, float]:
    known = sorted(name for name in stored.unique("teacher") if isinstance(name, str) and name)
    weights = config.weights or dict.fromkeys(known, 1.0)
    for name in weights:
        if name not in known:
            raise ValueError(
                f"teachers names {name!r}, and {folder} has traces of {', '.join(known)}: name one of these"
            )
    return weights


def _all_short(stored: Dataset, processor: SiQVLProcessor | None, max_length: int | None) -> bool:
    """Return whether no row can have more than `max_length` tokens, since a token of text has at least one byte."""
    if processor is None or max_length is None or processor.max_tiles > 1:
        return False
    table = stored.data.table
    if not pa.types.is_list(table["choices"].type) or pc.max(pc.list_value_length(table["choices"])).as_py():
        return False
    if not all(pa.types.is_string(table[name].type) for name in ("question", "rationale", "answer")):
        return False
    texts = sum(pc.max(pc.binary_length(table[name])).as_py() or 0 for name in ("question", "rationale", "answer"))
    pictures = pc.max(pc.list_value_length(table["images"])).as_py() or 0
    return texts + pictures * processor.image_seq_length + _TEMPLATE_TOKENS <= max_length


def _usable(
    stored: Dataset,
    teachers: Mapping[str, _Teacher],
    preprocessor: Preprocessor,
    config: TraceArguments,
    processor: SiQVLProcessor | None,
) -> Iterator[_Trace]:
    """Yield the traces that may be trained on, in the store's order; the others are counted."""
    images = pc.list_value_length(stored.data.column("images")).to_pylist()
    drops, wants_lengths = preprocessor.drops, bool(config.max_rationale_tokens) or config.curriculum == "length"
    start = 0
    for batch in stored.remove_columns("images").iter(_SCANNED):
        sound: list[tuple[int, dict]] = []
        rows = plain_rows(batch)
        for index, row in enumerate(rows, start):
            name = row["teacher"] if isinstance(row["teacher"], str) and row["teacher"] else NO_TEACHER
            if name in teachers or name == NO_TEACHER:
                drops.read[name] += 1
                try:
                    sound.append((index, _validated(row)))
                except Dropped as dropped:
                    drops.add(name, index, dropped)
        start += len(rows)
        lengths = [0] * len(sound)
        if processor is not None and wants_lengths and sound:
            lengths = list(map(len, processor.tokenizer([row["rationale"] for _, row in sound])["input_ids"]))
        for (index, row), length in zip(sound, lengths, strict=True):
            teacher = teachers[row["teacher"]]
            try:
                _check(row, length, config)
                # Whether its pictures can be read is seen when they are: they are not looked at here.
                pictures = [b""] * (images[index] or 0)
                preprocessor.conversation(teacher, {**row, "images": pictures, "direct": False})
            except Dropped as dropped:
                drops.add(teacher.name, index, dropped)
            else:
                yield _Trace(index, row["sample_id"], row["teacher"], length)


def _validated(row: Mapping) -> dict:
    """Return a stored trace with every column in the type that it must have.

    Raises:
        Dropped: one has another.
    """
    texts = {name: as_text(column(row, name), name) for name in _TEXTS}
    lists = {name: texts_of(as_items(column(row, name)), name) for name in ("golds", "choices", "rejected_by")}
    for name in ("sample_id", "teacher", "question"):
        if not texts[name].strip():
            raise bad_row(f"its {name} is empty")
    for name in ("sample_id", "rationale"):  # the others are seen where the conversation is made
        check_text(texts[name])
    return {**row, **texts, **lists}


def _check(row: Mapping, length: int, config: TraceArguments) -> None:
    if config.verified and row["verdict"] != "kept":
        rule = row["rejected_by"][0] if row["rejected_by"] else ""
        raise Dropped(f"rejected: {rule if _RULE.fullmatch(rule) else 'no rule is named'}")
    if not row["rationale"].strip() or not row["answer"].strip():
        raise Dropped("no rationale or no answer")
    if config.max_rationale_tokens and length > config.max_rationale_tokens:
        raise Dropped("longer than max_rationale_tokens", f"{length} tokens")


def _split(usable: Sequence[_Trace], share: float, seed: int) -> dict[bool, list[_Trace]]:
    """Return the traces to train on (False) and to validate with (True); a question is in one of the two."""
    parts: dict[bool, list[_Trace]] = {False: [], True: []}
    for trace in usable:
        parts[Random(f"{seed}/{trace.sample_id}/validation").random() < share].append(trace)
    return parts


def _chosen(
    traces: Sequence[_Trace], weights: Mapping[str, float], config: TraceArguments, seed: int
) -> list[tuple[_Trace, bool]]:
    """Return the traces that are used, in the store's order, each with whether it only answers."""
    by_question: dict[str, list[_Trace]] = defaultdict(list)
    for trace in traces:
        by_question[trace.sample_id].append(trace)
    chosen = []
    for sample_id, group in by_question.items():
        if config.traces_per_question:
            group = _drawn(group, weights, config.traces_per_question, Random(f"{seed}/{sample_id}/draw"))
        rng = Random(f"{sample_id}/row")  # which rows only answer depends neither on the seed nor on the teachers
        chosen += [(trace, rng.random() < config.direct_share) for trace in group]
    return sorted(chosen, key=lambda pair: pair[0].index)


def _drawn(group: Sequence[_Trace], weights: Mapping[str, float], count: int, rng: Random) -> list[_Trace]:
    """Draw some traces of a question without replacement: first a teacher by weight, then one of its traces."""
    left = list(group)
    drawn: list[_Trace] = []
    while left and len(drawn) < count:
        names = sorted({trace.teacher for trace in left})
        name = rng.choices(names, [weights[name] for name in names])[0]
        trace = rng.choice([trace for trace in left if trace.teacher == name])
        drawn.append(trace)
        left.remove(trace)
    return drawn


def _plan(
    chosen: list[tuple[_Trace, bool]], config: TraceArguments, seed: int, count: int | None
) -> list[tuple[_Trace, bool]]:
    """Return the rows of an epoch: no more than `count`, and for a curriculum in their order.

    Without a curriculum the trainer shuffles them, anew in each epoch. With one, rows that only answer have their places
    drawn at random among the others.
    """
    rng = Random(f"{seed}/plan")
    if count is not None and count < len(chosen):
        chosen = [chosen[place] for place in sorted(rng.sample(range(len(chosen)), count))]
    if config.curriculum == "none":
        return chosen
    rng.shuffle(chosen)
    growing = iter(sorted((pair for pair in chosen if not pair[1]), key=lambda pair: pair[0].length))
    return [pair if pair[1] else next(growing) for pair in chosen]


def _counts(
    plan: Sequence[tuple[_Trace, bool]], usable: Sequence[_Trace], weights: Mapping[str, float], drops: DropLog
) -> list[SourceCount]:
    used = Counter(DIRECT if direct else trace.teacher for trace, direct in plan)
    kept = Counter(trace.teacher for trace in usable)
    counts = [
        SourceCount(
            name, used[name] / len(plan), available=drops.read[name], read=drops.read[name], kept=kept[name], used=used[name]
        )
        for name in weights
    ]  # fmt: skip
    if used[DIRECT]:
        answers = used[DIRECT]
        counts.append(
            SourceCount(DIRECT, answers / len(plan), available=answers, read=answers, kept=answers, used=answers)
        )
    return counts


class _Rows(RowTransform):
    """The planned rows of a store, read when their turn comes."""

    def __init__(
        self,
        stored: Dataset,
        plan: Sequence[tuple[_Trace, bool]],
        teachers: Mapping[str, _Teacher],
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

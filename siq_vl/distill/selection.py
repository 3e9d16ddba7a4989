"""What can be said of a trace only beside the others: agreement, near-duplicates, and the best of several samples.

`settle` goes over a store, applies the rules of `verification` where they have changed, and these. It asks no teacher,
reads one shard at a time, and writes the shards whose verdicts are not what they were.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasketch import LeanMinHash, MinHash, MinHashLSH
from tqdm.auto import tqdm

from siq_vl.distill.traces import FEATURES, JUDGED, TraceStore
from siq_vl.distill.verification import Trace, Verification, pieces, read
from siq_vl.parsing.answers import agrees, number_in, plain_answer

SELECTING = ("agreement", "duplicate", "not_best")
SCOPES = ("question", "all", "none")
KEEP = ("all", "best")
_PERMUTATIONS = 128
_SHINGLE = 3


@dataclass(frozen=True)
class Selection:
    """How accepted traces are chosen among one another.

    Attributes:
        keep: `"all"` samples of a question and teacher that were accepted, or only the `"best"` one of each.
        target_tokens: length that the best sample comes nearest to; 0: the shortest is best.
        duplicates: traces are held against those of the same `"question"`, against `"all"`, or against `"none"`.
        similarity: Jaccard similarity of two rationales' runs of three pieces, estimated by MinHash, from which the
            second is a near-duplicate.
        min_agreement: least share of the question's other traces that must have the same answer; for questions without
            gold answers. 0 asks for none.
    """

    keep: str = "all"
    target_tokens: int = 0
    duplicates: str = "question"
    similarity: float = 0.9
    min_agreement: float = 0.0

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise ValueError(f"keep is {self.keep!r}; it must be one of {', '.join(KEEP)}")
        if self.duplicates not in SCOPES:
            raise ValueError(f"duplicates is {self.duplicates!r}; it must be one of {', '.join(SCOPES)}")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity is {self.similarity}; it must lie above 0, at most at 1")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement is {self.min_agreement}; it must lie between 0 and 1")


@dataclass(slots=True)
class _Mark:
    """What selection has to know of one trace."""

    place: int  # its position in the store
    teacher: int
    repeat: int
    answer: str
    accepted: bool
    answered: bool
    tokens: int
    kind: str
    agreement: float = float("nan")
    reasons: list[str] = field(default_factory=list)


def settle(
    store: TraceStore, verification: Verification, selection: Selection, *, progress: bool = False
) -> tuple[int, int]:
    """Bring every verdict of a store up to date with its rules and with all of its traces.

    Returns:
        The number of traces, and of those that are kept.
    """
    store.seal()
    rejudge = store.read_settings().get("verification") != verification.settings()
    if rejudge:
        for path in tqdm(store.shards(), desc="verifying again", disable=not progress, leave=False):
            table = pq.read_table(path)
            store.rewrite(path, _judged_again(table, verification))
    marks = _marks(store)
    for group in _by_question(store, marks):
        _compare(group, selection)
    if selection.duplicates != "none":
        _reject_duplicates(store, marks, selection)
    if selection.keep == "best":
        for group in _by_question(store, marks):
            _reject_all_but_best(group, selection.target_tokens)
    kept = _write_verdicts(store, marks)
    store.write_settings({"verification": verification.settings(), "selection": asdict(selection)})
    return len(marks), kept


def announce(store: TraceStore, verification: Verification) -> None:
    """Note with which rules the next traces are judged, so that `settle` knows whether earlier ones are to be again."""
    if not store.shards():
        store.write_settings({"verification": verification.settings()})
    elif store.read_settings().get("verification") != verification.settings():
        store.write_settings({"verification": None})


def verdict_columns(trace: Trace, verification: Verification) -> dict:
    """Return the columns that verification writes for one trace, before selection."""
    rejected_by = verification.judge(trace)
    return {
        "rationale": trace.parsed.rationale,
        "answer": trace.parsed.answer,
        "rationale_tokens": trace.tokens,
        "rejected_by": rejected_by,
        "agreement": None,
        "verdict": "rejected" if rejected_by else "kept",
    }


def _judged_again(table: pa.Table, verification: Verification) -> pa.Table:
    names = ["question", "golds", "kind", "choices", "output", "finish_reason", "hinted", "error"]
    columns = []
    for row in table.select(names).to_pylist():
        parsed, tokens = read(row["output"])
        trace = Trace(
            **{
                **row,
                "golds": tuple(row["golds"]),
                "choices": tuple(row["choices"]),
                "parsed": parsed,
                "tokens": tokens,
            }
        )
        columns.append(verdict_columns(trace, verification))
    return _replaced(table, {name: [row[name] for row in columns] for name in JUDGED})


def _replaced(table: pa.Table, columns: dict[str, list]) -> pa.Table:
    for name, values in columns.items():
        field_ = FEATURES.arrow_schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field_, pa.array(values, field_.type))
    return table


def _marks(store: TraceStore) -> list[_Mark]:
    teachers: dict[str, int] = {}
    marks: list[_Mark] = []
    names = ("teacher", "repeat", "answer", "rejected_by", "error", "rationale_tokens", "kind")
    for table in store.columns(*names):
        for row in table.to_pylist():
            reasons = [reason for reason in row["rejected_by"] if reason not in SELECTING]
            teacher = teachers.setdefault(row["teacher"], len(teachers))
            answer = _canonical(row["answer"])
            marks.append(
                _Mark(
                    len(marks), teacher, row["repeat"], answer, not reasons, bool(answer) and not row["error"],
                    row["rationale_tokens"], row["kind"], reasons=reasons,
                )
            )  # fmt: skip
    return marks


def _canonical(answer: str) -> str:
    """Return an answer such that most equal ones are the same text; memory is kept small for long ones."""
    number = number_in(answer)
    return f"{number[0]:g} {number[1]}".strip() if number else plain_answer(answer).casefold()[:200]


def _by_question(store: TraceStore, marks: list[_Mark]) -> Iterator[list[_Mark]]:
    """Yield the traces of each question together, best-known order first: by teacher, then by sample."""
    groups: dict[int, list[int]] = defaultdict(list)
    place = 0
    for table in store.columns("sample_id"):
        for sample_id in table["sample_id"].to_pylist():
            groups[_key(sample_id)].append(place)
            place += 1
    for places in groups.values():
        yield sorted((marks[place] for place in places), key=lambda mark: (mark.teacher, mark.repeat, mark.place))


def _key(sample_id: str) -> int:
    data = sample_id.encode()
    return zlib.crc32(data) << 32 | zlib.adler32(data)


def _compare(group: list[_Mark], selection: Selection) -> None:
    """Record, for each answer, the share of the question's other answers that agree with it."""
    answered = [mark for mark in group if mark.answered]
    if len(answered) < 2:
        return
    for mark in answered:
        same = sum(
            mark.answer == other.answer or agrees(mark.answer, other.answer, kind=mark.kind)
            for other in answered
            if other is not mark
        )
        mark.agreement = same / (len(answered) - 1)
        if mark.accepted and mark.agreement < selection.min_agreement:
            mark.reasons.append("agreement")


def _reject_duplicates(store: TraceStore, marks: list[_Mark], selection: Selection) -> None:
    """Reject each accepted rationale that is nearly the same as an accepted one before it."""
    together = None if selection.duplicates == "all" else _question_of(store, marks)
    # The index proposes candidates generously; the signatures' own estimate decides.
    index = MinHashLSH(threshold=0.75 * selection.similarity, num_perm=_PERMUTATIONS)
    earlier: dict[int, list[LeanMinHash]] = defaultdict(list)
    signatures: dict[int, LeanMinHash] = {}
    for mark, rationale in zip(marks, _texts(store, "rationale"), strict=True):
        if mark.reasons:
            continue
        if together is not None and together[mark.place] < 0:
            continue  # the only trace of its question
        signature = _signature(rationale)
        if together is not None:
            known = earlier[together[mark.place]]
            if any(signature.jaccard(other) >= selection.similarity for other in known):
                mark.reasons.append("duplicate")
            else:
                known.append(signature)
        elif any(signature.jaccard(signatures[place]) >= selection.similarity for place in index.query(signature)):
            mark.reasons.append("duplicate")
        else:
            index.insert(mark.place, signature, check_duplication=False)
            signatures[mark.place] = signature


def _question_of(store: TraceStore, marks: list[_Mark]) -> np.ndarray:
    """Return the number of each trace's question, -1 where it is the only accepted one."""
    numbers = np.full(len(marks), -1, np.int64)
    for number, group in enumerate(_by_question(store, marks)):
        accepted = [mark.place for mark in group if not mark.reasons]
        if len(accepted) > 1:
            numbers[accepted] = number
    return numbers


def _texts(store: TraceStore, name: str) -> Iterable[str]:
    for table in store.columns(name):
        yield from table[name].to_pylist()


def _signature(text: str) -> LeanMinHash:
    words = [piece.casefold() for piece in pieces(text)]
    runs = {" ".join(words[start : start + _SHINGLE]) for start in range(max(1, len(words) - _SHINGLE + 1))}
    signature = MinHash(num_perm=_PERMUTATIONS, seed=1)
    signature.update_batch([run.encode() for run in sorted(runs)])
    return LeanMinHash(signature)


def _reject_all_but_best(group: list[_Mark], target: int) -> None:
    """Keep, of each teacher's accepted samples, the one most agreed with, then nearest to the target length."""
    by_teacher: dict[int, list[_Mark]] = defaultdict(list)
    for mark in group:
        if not mark.reasons:
            by_teacher[mark.teacher].append(mark)
    for accepted in by_teacher.values():
        best = min(
            accepted,
            key=lambda mark: (-np.nan_to_num(mark.agreement), abs(mark.tokens - target), mark.repeat),
        )
        for mark in accepted:
            if mark is not best:
                mark.reasons.append("not_best")


def _write_verdicts(store: TraceStore, marks: list[_Mark]) -> int:
    """Write the shards whose verdicts have changed; return how many traces are kept."""
    place = kept = 0
    for path in store.shards():
        before = pq.read_table(path, columns=["rejected_by", "agreement", "verdict"])
        part = marks[place : place + before.num_rows]
        place += before.num_rows
        after: dict[str, list] = {
            "rejected_by": [mark.reasons for mark in part],
            "agreement": [None if np.isnan(mark.agreement) else mark.agreement for mark in part],
            "verdict": ["rejected" if mark.reasons else "kept" for mark in part],
        }
        kept += sum(not mark.reasons for mark in part)
        if before.to_pydict() != after:
            store.rewrite(path, _replaced(pq.read_table(path), after))
    return kept

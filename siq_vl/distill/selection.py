"""What can be said of a trace only beside the others: agreement, near-duplicates, and the best of several samples.

`update_verdicts` goes over a store, applies the rules of `verification` where they have changed, and these. It asks no
teacher, reads one shard at a time, and writes the shards whose verdicts are not what they were.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
from datasketch import LeanMinHash, MinHash, MinHashLSH
from tqdm.auto import tqdm

from siq_vl.distill.schema import FEATURES, VERDICT_COLUMNS
from siq_vl.distill.traces import TraceStore
from siq_vl.distill.verification import RULE_COLUMNS, RuleInput, Verification, verdict_of
from siq_vl.parsing.answers import agrees, number_in, plain_answer
from siq_vl.parsing.texts import pieces

SELECTION_RULES = ("agreement", "duplicate", "not_best")
SCOPES = ("question", "all", "none")
KEEP = ("all", "best")
_PERMUTATIONS = 128
_SHINGLE = 3  # pieces of a rationale that are compared together
_CHANGED = ("rejected_by", "agreement", "verdict")  # the columns that selection writes
_LONGEST_ANSWER = 200  # characters of an answer that are compared: memory stays small


@dataclass(frozen=True)
class Selection:
    """How accepted traces are chosen among one another; the fields' help says what each of them is."""

    _argument_group_name = "selection, of accepted traces among one another"

    keep: str = field(
        default="all",
        metadata={"choices": KEEP, "help": "of the accepted samples of a question and teacher: all, or the best one"},
    )
    target_length: int = field(
        default=0, metadata={"help": "the best sample is nearest to it, in words and marks; 0: the shortest is best"}
    )
    duplicates: str = field(
        default="question",
        metadata={
            "choices": SCOPES,
            "help": "where near-duplicates are looked for: among traces of one question, or all",
        },
    )
    similarity: float = field(
        default=0.9,
        metadata={
            "help": "from which the second rationale is a near-duplicate: Jaccard's, of runs of three words, by MinHash"
        },
    )
    min_agreement: float = field(
        default=0.0,
        metadata={"help": "least share of the question's other traces with the same answer, for lack of gold answers"},
    )

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise ValueError(f"keep is {self.keep!r}; it must be one of {', '.join(KEEP)}")
        if self.duplicates not in SCOPES:
            raise ValueError(f"duplicates is {self.duplicates!r}; it must be one of {', '.join(SCOPES)}")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity is {self.similarity}; it must lie above 0, at most at 1")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement is {self.min_agreement}; it must lie between 0 and 1")

    def settings(self) -> dict:
        """Return what a store's settings.json keeps; its keys are those of the first stores."""
        return {
            "keep": self.keep,
            "target_tokens": self.target_length,
            "duplicates": self.duplicates,
            "similarity": self.similarity,
            "min_agreement": self.min_agreement,
        }


@dataclass(slots=True)
class _Candidate:
    """What selection has to know of one trace; a store can hold millions, so it is not the trace itself."""

    place: int  # its position in the store
    question: int
    teacher: int
    repeat: int
    answer: str
    answered: bool
    tokens: int
    kind: str
    rejected_by: list[str] = field(default_factory=list)
    agreement: float = math.nan  # where there is no other answer


def update_verdicts(
    store: TraceStore, verification: Verification, selection: Selection, *, progress: bool = False
) -> tuple[int, int]:
    """Bring every verdict of a store up to date with its rules and with all of its traces.

    Returns:
        The number of traces, and of those that are kept.
    """
    store.seal()
    if store.read_settings().get("verification") != verification.settings():
        for path in tqdm(store.shards(), desc="verifying again", disable=not progress, leave=False):
            store.rewrite(path, _verified_again(pq.read_table(path), verification))
    candidates = _candidates(store)
    questions = _by_question(candidates)
    # The order matters: a duplicate of a trace that was rejected before is none, and the best is chosen of what is left.
    for traces in questions:
        _compare_answers(traces, selection)
    if selection.duplicates != "none":
        _reject_duplicates(store, candidates, selection)
    if selection.keep == "best":
        for traces in questions:
            _reject_all_but_best(traces, selection.target_length)
    kept = _write_verdicts(store, candidates)
    store.write_settings({"verification": verification.settings(), "selection": selection.settings()})
    return len(candidates), kept


def record_rules(store: TraceStore, verification: Verification) -> None:
    """Note with which rules the next traces are judged, so that `update_verdicts` knows whether to judge earlier ones."""
    if not store.shards():
        store.write_settings({"verification": verification.settings()})
    elif store.read_settings().get("verification") != verification.settings():
        store.write_settings({"verification": None})


def _verified_again(table: pa.Table, verification: Verification) -> pa.Table:
    columns: dict[str, list] = {name: [] for name in VERDICT_COLUMNS}
    for row in table.select(list(RULE_COLUMNS)).to_pylist():
        for name, value in verification.verdict(RuleInput.of(row)).items():
            columns[name].append(value)
    return _with_columns(table, columns)


def _with_columns(table: pa.Table, columns: Mapping[str, list]) -> pa.Table:
    """Return a table with other values in some of its columns."""
    for name, values in columns.items():
        described = FEATURES.arrow_schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), described, pa.array(values, described.type))
    return table


def _candidates(store: TraceStore) -> list[_Candidate]:
    """Return every trace of the store, in its order, as verification has left it."""
    teachers: dict[str, int] = {}
    candidates: list[_Candidate] = []
    names = ("sample_id", "teacher", "repeat", "answer", "rejected_by", "error", "rationale_tokens", "kind")
    for table in store.columns(*names):
        for row in table.to_pylist():
            # What an earlier selection said is forgotten: it is decided anew.
            rejected_by = [rule for rule in row["rejected_by"] if rule not in SELECTION_RULES]
            answer = _comparable(row["answer"])
            candidate = _Candidate(
                place=len(candidates),
                question=_hash(row["sample_id"]),
                teacher=teachers.setdefault(row["teacher"], len(teachers)),
                repeat=row["repeat"],
                answer=answer,
                answered=bool(answer) and not row["error"],
                tokens=row["rationale_tokens"],
                kind=row["kind"],
                rejected_by=rejected_by,
            )
            candidates.append(candidate)
    return candidates


def _comparable(answer: str) -> str:
    """Return an answer such that most equal ones are the same text."""
    number = number_in(answer)
    if number is None:
        return plain_answer(answer).casefold()[:_LONGEST_ANSWER]
    value, unit = number
    return f"{value:g} {unit}".strip()


def _hash(sample_id: str) -> int:
    """Return 64 bits that stand for a question: numbers take a fraction of the memory of texts."""
    data = sample_id.encode()
    return zlib.crc32(data) << 32 | zlib.adler32(data)


def _by_question(candidates: Iterable[_Candidate]) -> list[list[_Candidate]]:
    """Return the traces of each question together: by teacher, then by sample."""
    questions: dict[int, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        questions[candidate.question].append(candidate)
    for traces in questions.values():
        traces.sort(key=lambda trace: (trace.teacher, trace.repeat, trace.place))
    return list(questions.values())


def _compare_answers(traces: Sequence[_Candidate], selection: Selection) -> None:
    """Record, for each answer to a question, the share of the others that agree with it; reject where it is too small."""
    answered = [trace for trace in traces if trace.answered]
    if len(answered) < 2:
        return
    for trace in answered:
        same = 0
        for other in answered:
            if other is trace:
                continue
            if trace.answer == other.answer or agrees(trace.answer, other.answer, kind=trace.kind):
                same += 1
        trace.agreement = same / (len(answered) - 1)
        if not trace.rejected_by and trace.agreement < selection.min_agreement:
            trace.rejected_by.append("agreement")


def _reject_duplicates(store: TraceStore, candidates: Sequence[_Candidate], selection: Selection) -> None:
    """Reject each accepted rationale that is nearly the same as an accepted one before it."""
    within_question = selection.duplicates == "question"
    accepted_of_question: dict[int, int] = defaultdict(int)
    for trace in candidates:
        accepted_of_question[trace.question] += not trace.rejected_by
    # Within a question, all rationales before are compared. Among all traces the index proposes candidates, generously,
    # and the signatures' own estimate decides.
    of_question: dict[int, list[LeanMinHash]] = defaultdict(list)
    index = MinHashLSH(threshold=0.75 * selection.similarity, num_perm=_PERMUTATIONS)
    signatures: dict[int, LeanMinHash] = {}
    for trace, rationale in zip(candidates, _rationales(store), strict=True):
        if trace.rejected_by:
            continue
        # Signatures are what takes time: the only accepted trace of its question needs none.
        if within_question and accepted_of_question[trace.question] < 2:
            continue
        signature = _signature(rationale)
        if within_question:
            earlier = of_question[trace.question]
        else:
            earlier = [signatures[place] for place in index.query(signature)]
        if _is_near(signature, earlier, selection.similarity):
            trace.rejected_by.append("duplicate")
        elif within_question:
            earlier.append(signature)
        else:
            index.insert(trace.place, signature, check_duplication=False)
            signatures[trace.place] = signature


def _rationales(store: TraceStore) -> Iterator[str]:
    for table in store.columns("rationale"):
        yield from table["rationale"].to_pylist()


def _signature(text: str) -> LeanMinHash:
    """Return the MinHash of a text's runs of `_SHINGLE` pieces; of the whole text where it is shorter than one."""
    words = [piece.casefold() for piece in pieces(text)]
    runs = set()
    for start in range(max(1, len(words) - _SHINGLE + 1)):
        runs.add(" ".join(words[start : start + _SHINGLE]))
    signature = MinHash(num_perm=_PERMUTATIONS, seed=1)
    signature.update_batch([run.encode() for run in sorted(runs)])
    return LeanMinHash(signature)


def _is_near(signature: LeanMinHash, others: Iterable[LeanMinHash], similarity: float) -> bool:
    return any(signature.jaccard(other) >= similarity for other in others)


def _reject_all_but_best(traces: Sequence[_Candidate], target_length: int) -> None:
    """Keep, of each teacher's accepted samples, the one most agreed with, then nearest to the target length."""
    by_teacher: dict[int, list[_Candidate]] = defaultdict(list)
    for trace in traces:
        if not trace.rejected_by:
            by_teacher[trace.teacher].append(trace)

    def badness(trace: _Candidate) -> tuple[float, int, int]:
        agreement = 0.0 if math.isnan(trace.agreement) else trace.agreement
        return -agreement, abs(trace.tokens - target_length), trace.repeat

    for accepted in by_teacher.values():
        best = min(accepted, key=badness)
        for trace in accepted:
            if trace is not best:
                trace.rejected_by.append("not_best")


def _write_verdicts(store: TraceStore, candidates: Sequence[_Candidate]) -> int:
    """Write the shards whose verdicts have changed; return how many traces are kept."""
    start = kept = 0
    for path in store.shards():
        before = pq.read_table(path, columns=list(_CHANGED))
        traces = candidates[start : start + before.num_rows]
        start += before.num_rows
        after: dict[str, list] = {name: [] for name in _CHANGED}
        for trace in traces:
            after["rejected_by"].append(trace.rejected_by)
            after["agreement"].append(None if math.isnan(trace.agreement) else trace.agreement)
            after["verdict"].append(verdict_of(trace.rejected_by))
            kept += not trace.rejected_by
        if before.to_pydict() != after:
            store.rewrite(path, _with_columns(pq.read_table(path), after))
    return kept

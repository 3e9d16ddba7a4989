"""What a store holds, in numbers: yield by teacher and rule, agreement, lengths, and verification against the truth."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import pyarrow.parquet as pq

from siq_vl.distill.schema import reply_bound
from siq_vl.distill.selection import SELECTION_RULES
from siq_vl.distill.verification import RULES, TEACHER_ERROR
from siq_vl.evaluation.statistics import wilson
from siq_vl.evaluation.tables import markdown
from siq_vl.parsing.answers import agrees

ALL_RULES = (TEACHER_ERROR, *RULES, *SELECTION_RULES)
LENGTH_BINS = (0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_COLUMNS = (
    "sample_id", "teacher", "repeat", "kind", "answer", "error", "rejected_by", "verdict", "rationale_tokens", "injected",
    "teacher_kind", "prompt_tokens", "completion_tokens", "seconds", "finish_reason", "sampling",
)  # fmt: skip


@dataclass
class TeacherYield:
    """One teacher's traces in numbers.

    Attributes:
        made: traces in the store.
        kept: of those, the ones that no rule rejects.
        rules: traces that each rule rejects.
        lengths: rationales by the bin of `LENGTH_BINS` that their length lies in.
        read: tokens read.
        written: tokens written.
        seconds: from asking to having, summed over the traces.
        cut: question and number of each sample whose reply broke off at its bound, and was not asked again since.
        bound: tokens of a reply, the greatest bound at which one broke off.
    """

    made: int = 0
    kept: int = 0
    rules: Counter = field(default_factory=Counter)
    lengths: Counter = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    seconds: float = 0.0
    cut: set[tuple[str, int]] = field(default_factory=set)
    bound: int = 0

    def count(self, row: Mapping) -> None:
        """Count one trace."""
        self.made += 1
        self.kept += row["verdict"] == "kept"
        self.rules.update(row["rejected_by"])
        self.read += row["prompt_tokens"]
        self.written += row["completion_tokens"]
        self.seconds += row["seconds"]
        sample = (row["sample_id"], row["repeat"])
        if row["finish_reason"] == "length":
            self.cut.add(sample)
            self.bound = max(self.bound, reply_bound(row["sampling"]))
        else:
            # Asked again with room for more, it came to its end: later traces lie behind earlier ones.
            self.cut.discard(sample)
        if not row["error"]:
            self.lengths[_length_bin(row["rationale_tokens"])] += 1


@dataclass
class StoreYield:
    """A store in numbers.

    Attributes:
        teachers: by name.
        pairs: for two teachers, questions that both answered and those they answered alike, by their first samples.
        truth: for traces of the scripted oracle, by the kind of fault put in (`""`: none), how many there were and how
            many a rule for single traces rejected.
    """

    teachers: dict[str, TeacherYield] = field(default_factory=dict)
    pairs: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    truth: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def made(self) -> int:
        return sum(teacher.made for teacher in self.teachers.values())

    @property
    def kept(self) -> int:
        return sum(teacher.kept for teacher in self.teachers.values())


def sealed_traces(folder: Path, columns: Iterable[str]) -> Iterator[dict]:
    """Yield some columns of every sealed trace, a shard in memory at a time."""
    for path in sorted((folder / "data").glob("traces-*.parquet")):
        yield from pq.read_table(path, columns=list(columns)).to_pylist()


def store_yield(folder: Path) -> StoreYield:
    """Count what a store holds."""
    found = StoreYield()
    # By question and teacher: what the teacher answered first, and how such answers are compared.
    first_answers: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    made_with: Counter[str] = Counter()  # traces of the oracle, by the fault put in
    caught_with: Counter[str] = Counter()
    for row in sealed_traces(folder, _COLUMNS):
        found.teachers.setdefault(row["teacher"], TeacherYield()).count(row)
        if row["repeat"] == 0 and row["answer"]:
            first_answers[row["sample_id"]][row["teacher"]] = (row["answer"], row["kind"])
        if row["teacher_kind"] == "figures":
            made_with[row["injected"]] += 1
            # A trace that only loses against another one was not found to be wrong.
            caught_with[row["injected"]] += not set(row["rejected_by"]) <= set(SELECTION_RULES)
    for kind in sorted(made_with):
        found.truth[kind] = (made_with[kind], caught_with[kind])
    found.pairs = _pairs(first_answers)
    return found


def _length_bin(tokens: int) -> int:
    """Return the greatest of `LENGTH_BINS` that is not above a length."""
    found = LENGTH_BINS[0]
    for bound in LENGTH_BINS:
        if bound <= tokens:
            found = bound
    return found


def _pairs(first_answers: Mapping[str, Mapping[str, tuple[str, str]]]) -> dict[tuple[str, str], tuple[int, int]]:
    """Return, by two teachers, the questions that both answered, and those that they answered alike."""
    both: Counter[tuple[str, str]] = Counter()
    alike: Counter[tuple[str, str]] = Counter()
    for answers in first_answers.values():
        for one, other in combinations(sorted(answers), 2):
            answer, kind = answers[one]
            other_answer, _ = answers[other]
            both[one, other] += 1
            alike[one, other] += agrees(answer, other_answer, kind=kind)
    pairs = {}
    for names in sorted(both):
        pairs[names] = (both[names], alike[names])
    return pairs


def yield_table(found: StoreYield) -> str:
    """Return how many traces each teacher made, how many are kept, and how many each rule rejected."""
    rejected: Counter[str] = Counter()
    for teacher in found.teachers.values():
        rejected.update(teacher.rules)
    used = [rule for rule in ALL_RULES if rejected[rule]]
    lines = [["teacher", "traces", "kept", "kept %", *used]]
    for name, teacher in sorted(found.teachers.items()):
        line = [name, str(teacher.made), str(teacher.kept), _percent(teacher.kept, teacher.made)]
        line += [str(teacher.rules[rule]) for rule in used]
        lines.append(line)
    return markdown(lines)


def agreement_table(found: StoreYield) -> str:
    """Return how often two teachers gave the same answer to a question that both answered."""
    lines = [["teachers", "questions", "same answer %"]]
    for (one, other), (both, alike) in found.pairs.items():
        lines.append([f"{one} and {other}", str(both), _percent(alike, both)])
    return markdown(lines)


def cost_table(found: StoreYield) -> str:
    """Return what each teacher read and wrote, and how long it took."""
    lines = [["teacher", "tokens read", "tokens written", "written a trace", "seconds a trace"]]
    for name, teacher in sorted(found.teachers.items()):
        written = f"{teacher.written / teacher.made:.0f}"
        seconds = f"{teacher.seconds / teacher.made:.2f}"
        lines.append([name, str(teacher.read), str(teacher.written), written, seconds])
    return markdown(lines)


def cut_table(found: StoreYield) -> str:
    """Return, of each teacher with replies that broke off at their bound, how many did, and the flag that mends it."""
    lines = [["teacher", "cut off", "of", "cut off %", "at tokens", "asks these again"]]
    for name, teacher in sorted(found.teachers.items()):
        if teacher.cut:
            cut = len(teacher.cut)
            bound = str(teacher.bound or "-")
            lines.append(
                [name, str(cut), str(teacher.made), _percent(cut, teacher.made), bound, longer_replies(teacher)]
            )
    return markdown(lines)


def longer_replies(teacher: TeacherYield) -> str:
    """Return the flag that leaves room for the replies of a teacher that broke off."""
    # Twice as much; where nobody knows how much it was, as much as a model that thinks takes.
    return f"--max_new_tokens {2 * teacher.bound or 4096}"


def precision_and_recall(found: StoreYield) -> tuple[float, float] | None:
    """Return verification's precision and recall against the oracle's own record; None without a faulty trace.

    Precision: of the traces that were rejected, the share with a fault put in. Recall: of the traces with a fault, the
    share that was rejected. Near-duplicates and samples that were not the best do not count as rejected here.
    """
    faulty = caught = rejected = 0
    for kind, (made, found_wrong) in found.truth.items():
        rejected += found_wrong
        if kind:
            faulty += made
            caught += found_wrong
    if not faulty:
        return None
    # Where nothing was rejected, nothing was rejected wrongly.
    precision = caught / rejected if rejected else 1.0
    return precision, caught / faulty


def truth_table(found: StoreYield) -> str:
    """Return, by the kind of fault that the scripted oracle put in, how many traces had it and how many were rejected."""
    lines = [["fault put in by the oracle", "traces", "rejected", "rejected %", "95% interval"]]
    for kind, (made, caught) in found.truth.items():
        low, high = wilson(caught, made)
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append([kind or "none", str(made), str(caught), _percent(caught, made), interval])
    return markdown(lines)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}"


def tables(found: StoreYield) -> dict[str, str]:
    """Return every table that has something to say, by its heading."""
    shown = {"Yield, and traces rejected by rule (a trace can be rejected by several)": yield_table(found)}
    if any(teacher.cut for teacher in found.teachers.values()):
        shown["Replies cut off at the bound on their length"] = cut_table(found)
    if found.pairs:
        shown["Agreement between teachers"] = agreement_table(found)
    if scores := precision_and_recall(found):
        precision, recall = scores
        note = f"precision {100 * precision:.1f}%, recall {100 * recall:.1f}%"
        shown["Verification against the oracle's own record"] = f"{truth_table(found)}\n\n{note}"
    shown["Cost"] = cost_table(found)
    return shown

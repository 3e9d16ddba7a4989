"""What a store holds, in numbers: yield by teacher and rule, agreement, lengths, and verification against the truth."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from siq_vl.distill.selection import SELECTING
from siq_vl.distill.verification import RULES
from siq_vl.evaluation.intervals import wilson
from siq_vl.evaluation.tables import markdown
from siq_vl.parsing.answers import agrees

ALL_RULES = ("teacher_error", *RULES, *SELECTING)
LENGTH_BINS = (0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_COLUMNS = (
    "sample_id", "teacher", "repeat", "kind", "answer", "error", "rejected_by", "verdict", "rationale_tokens", "injected",
    "teacher_kind", "prompt_tokens", "completion_tokens", "seconds",
)  # fmt: skip


@dataclass
class TeacherSummary:
    """One teacher's traces: how many, how many kept, which rules rejected them, how long, and what they took."""

    made: int = 0
    kept: int = 0
    rules: Counter = field(default_factory=Counter)
    lengths: Counter = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    seconds: float = 0.0


@dataclass
class Summary:
    """A store in numbers.

    Attributes:
        teachers: by name.
        pairs: for two teachers, questions that both answered and those they answered alike, by their first samples.
        truth: for traces of the scripted oracle, by the kind of fault put in (`""`: none), how many there were and how
            many a rule for single traces rejected.
    """

    teachers: dict[str, TeacherSummary] = field(default_factory=dict)
    pairs: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    truth: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def made(self) -> int:
        return sum(teacher.made for teacher in self.teachers.values())

    @property
    def kept(self) -> int:
        return sum(teacher.kept for teacher in self.teachers.values())


def rows(folder: Path, columns: Iterable[str]) -> Iterator[dict]:
    """Yield some columns of every sealed trace, a shard in memory at a time."""
    for path in sorted((folder / "data").glob("traces-*.parquet")):
        yield from pq.read_table(path, columns=list(columns)).to_pylist()


def summarize(folder: Path) -> Summary:
    """Count what a store holds."""
    summary = Summary()
    firsts: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    truth: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows(folder, _COLUMNS):
        teacher = summary.teachers.setdefault(row["teacher"], TeacherSummary())
        teacher.made += 1
        teacher.kept += row["verdict"] == "kept"
        teacher.rules.update(row["rejected_by"])
        teacher.read += row["prompt_tokens"]
        teacher.written += row["completion_tokens"]
        teacher.seconds += row["seconds"]
        if not row["error"]:
            teacher.lengths[max(bound for bound in LENGTH_BINS if bound <= row["rationale_tokens"])] += 1
        if row["repeat"] == 0 and row["answer"]:
            firsts[row["sample_id"]][row["teacher"]] = (row["answer"], row["kind"])
        if row["teacher_kind"] == "figures":
            counted = truth[row["injected"]]
            counted[0] += 1
            counted[1] += any(rule not in SELECTING for rule in row["rejected_by"])
    summary.truth = {kind: (made, caught) for kind, (made, caught) in sorted(truth.items())}
    summary.pairs = _pairs(firsts)
    return summary


def _pairs(firsts: Mapping[str, Mapping[str, tuple[str, str]]]) -> dict[tuple[str, str], tuple[int, int]]:
    pairs: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for answers in firsts.values():
        names = sorted(answers)
        for place, first in enumerate(names):
            for second in names[place + 1 :]:
                (answer, kind), (other, _) = answers[first], answers[second]
                counted = pairs[first, second]
                counted[0] += 1
                counted[1] += agrees(answer, other, kind=kind)
    return {names: (both, alike) for names, (both, alike) in sorted(pairs.items())}


def yield_table(summary: Summary) -> str:
    """Return how many traces each teacher made, how many are kept, and how many each rule rejected."""
    used = [rule for rule in ALL_RULES if any(teacher.rules[rule] for teacher in summary.teachers.values())]
    lines = [["teacher", "traces", "kept", "kept %", *used]]
    for name, teacher in sorted(summary.teachers.items()):
        share = f"{100 * teacher.kept / teacher.made:.1f}"
        lines.append([name, str(teacher.made), str(teacher.kept), share, *(str(teacher.rules[rule]) for rule in used)])
    return markdown(lines)


def agreement_table(summary: Summary) -> str:
    """Return how often two teachers gave the same answer to a question that both answered."""
    lines = [["teachers", "questions", "same answer %"]]
    lines += [
        [f"{first} and {second}", str(both), f"{100 * alike / both:.1f}"]
        for (first, second), (both, alike) in summary.pairs.items()
    ]
    return markdown(lines)


def cost_table(summary: Summary) -> str:
    """Return what each teacher read and wrote, and how long it took."""
    lines = [["teacher", "tokens read", "tokens written", "written a trace", "seconds a trace"]]
    for name, teacher in sorted(summary.teachers.items()):
        lines.append(
            [name, str(teacher.read), str(teacher.written), f"{teacher.written / teacher.made:.0f}", f"{teacher.seconds / teacher.made:.2f}"]
        )  # fmt: skip
    return markdown(lines)


def precision_and_recall(summary: Summary) -> tuple[float, float] | None:
    """Return verification's precision and recall against the oracle's own record; None without a faulty trace.

    Precision: of the traces that were rejected, the share with a fault put in. Recall: of the traces with a fault, the
    share that was rejected. Near-duplicates and samples that were not the best do not count as rejected here.
    """
    faulty = [counts for kind, counts in summary.truth.items() if kind]
    caught = sum(rejected for _, rejected in faulty)
    rejected = caught + summary.truth.get("", (0, 0))[1]
    made = sum(made for made, _ in faulty)
    return (caught / rejected if rejected else 1.0, caught / made) if made else None


def truth_table(summary: Summary) -> str:
    """Return, by the kind of fault that the scripted oracle put in, how many traces had it and how many were rejected."""
    lines = [["fault put in by the oracle", "traces", "rejected", "rejected %", "95% interval"]]
    for kind, (made, caught) in summary.truth.items():
        low, high = wilson(caught, made)
        lines.append(
            [
                kind or "none",
                str(made),
                str(caught),
                f"{100 * caught / made:.1f}",
                f"{100 * low:.1f} to {100 * high:.1f}",
            ]
        )
    return markdown(lines)


def tables(summary: Summary) -> dict[str, str]:
    """Return every table that has something to say, by its heading."""
    made = {"Yield, and traces rejected by rule (a trace can be rejected by several)": yield_table(summary)}
    if summary.pairs:
        made["Agreement between teachers"] = agreement_table(summary)
    if scores := precision_and_recall(summary):
        precision, recall = scores
        made["Verification against the oracle's own record"] = (
            truth_table(summary) + f"\n\nprecision {100 * precision:.1f}%, recall {100 * recall:.1f}%"
        )
    made["Cost"] = cost_table(summary)
    return made

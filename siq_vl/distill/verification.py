"""Verification: named rules, each of which accepts or rejects one trace by what it says.

A rule sees the question, its gold answers and the output; never which teacher spoke, nor what the scripted oracle put in.
Rules that compare traces with one another (`duplicate`, `not_best`, `agreement`) are in `selection`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from siq_vl.parsing.answers import MATCHES, Parsed, agrees, final_answer, number_in, parse_trace
from siq_vl.parsing.arithmetic import agrees_with_result, false_statements, results_of
from siq_vl.parsing.texts import languages, loops, other_language, pieces

_TAG = re.compile(r"</?(?:think|answer)>")
_REFUSAL = re.compile(
    r"\b(?:i(?:'|’)?m|i am) (?:sorry\b|(?:unable|not able) to)|\bas an ai\b|"
    r"\b(?:i|we) (?:can(?:no|'|’)?t|can ?not|could not|do not have the ability to) "
    r"(?:(?:\w+ )?(?:determine|answer|help|assist|process|identify|provide|comply|fulfil)|"
    r"(?:\w+ )?(?:see|view|read|open|access) (?:the|any|this|that|your|an|a) (?:\w+ )?(?:image|picture|photo|chart|document|figure|file))|"
    r"\bno (?:image|picture) (?:is|was|has been) (?:provided|attached|given|visible)|"
    r"\bplease (?:provide|upload|attach) (?:the|an|a) (?:image|picture)|"
    r"\b(?:can ?not|can(?:'|’)t) be (?:determined|answered)|\bunable to (?:determine|answer|see|view)",
    re.IGNORECASE,
)
_HINTED = re.compile(
    r"\b(?:the )?(?:hint|(?:given|provided|known|stated|correct) answer)\b|\b(?:was|were|am|been) told\b|\baccording to the (?:hint|answer)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Trace:
    """What the rules see of a trace."""

    question: str
    golds: tuple[str, ...]
    kind: str
    choices: tuple[str, ...]
    output: str
    finish_reason: str
    hinted: bool
    error: str
    parsed: Parsed
    tokens: int


@dataclass(frozen=True)
class Verification:
    """The rules and their bounds.

    Attributes:
        skip: rules that are left out, of `RULES`.
        match: how answers and golds are compared: `"exact"`, `"number"` (numbers by value) or `"relaxed"` (within 5%).
        min_tokens: fewest pieces of rationale: words, numbers and punctuation marks.
        max_tokens: most pieces of rationale.
        language: code of the language that rationales are written in, or `""` for any.
    """

    skip: tuple[str, ...] = ()
    match: str = "number"
    min_tokens: int = 1
    max_tokens: int = 2048
    language: str = "en"

    def __post_init__(self) -> None:
        for rule in self.skip:
            if rule not in RULES:
                raise ValueError(f"{rule!r} is no rule; the rules are {', '.join(RULES)}")
        if self.match not in MATCHES:
            raise ValueError(f"match is {self.match!r}; it must be one of {', '.join(MATCHES)}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"rationales of {self.min_tokens} to {self.max_tokens} tokens: the bounds must rise from 0"
            )
        if self.language and self.language not in languages():
            raise ValueError(f"language is {self.language!r}; it must be a code such as en, or empty for any")

    def settings(self) -> dict:
        return {**asdict(self), "skip": sorted(self.skip)}

    def judge(self, trace: Trace) -> list[str]:
        """Return the names of the rules that reject the trace, in the rules' order; an accepted trace has none."""
        if trace.error:
            return ["teacher_error"]
        return [name for name, rejects in RULES.items() if name not in self.skip and rejects(trace, self)]


def read(output: str) -> tuple[Parsed, int]:
    """Return an output taken apart, and the number of pieces of its rationale."""
    parsed = parse_trace(output)
    return parsed, len(pieces(parsed.rationale))


def _unparsed(trace: Trace, rules: Verification) -> bool:
    return not trace.parsed.rationale or not trace.parsed.answer


def _truncated(trace: Trace, rules: Verification) -> bool:
    return trace.finish_reason == "length"


def _refused(trace: Trace, rules: Verification) -> bool:
    # A refusal opens the reasoning or is the answer; deep inside, "I cannot see a third bar" may be sound reasoning.
    if any(_REFUSAL.search(gold) for gold in trace.golds):
        return False
    opening = (trace.parsed.rationale or trace.output)[:160]
    return bool(_REFUSAL.search(opening) or _REFUSAL.search(trace.parsed.answer))


def _repeats(trace: Trace, rules: Verification) -> bool:
    return loops(pieces(_TAG.sub(" ", trace.output)))


def _wrong_answer(trace: Trace, rules: Verification) -> bool:
    if not trace.golds or not trace.parsed.answer:
        return False
    return not agrees(trace.parsed.answer, trace.golds, kind=trace.kind, choices=trace.choices, match=rules.match)


def _wrong_arithmetic(trace: Trace, rules: Verification) -> bool:
    return bool(false_statements(trace.parsed.rationale))


def _contradicts(trace: Trace, rules: Verification) -> bool:
    """Whether the rationale concludes something other than the answer.

    A conclusion is what it calls the answer, or the result of an equation in its last sentence when the answer is a
    number.
    """
    answer = trace.parsed.answer
    if not answer:
        return False
    if named := final_answer(trace.parsed.rationale):
        return len(named.split()) <= 6 and not agrees(named, answer, kind=trace.kind, choices=trace.choices)
    stated = number_in(answer)
    last = re.split(r"(?<=[.!?])\s+|\n", trace.parsed.rationale.strip())[-1]
    results = results_of(last)
    if trace.kind == "choice" or stated is None or not results:
        return False
    return not any(agrees_with_result(stated[0], value, shown) for value, shown in results)


def _wrong_length(trace: Trace, rules: Verification) -> bool:
    return bool(trace.parsed.rationale) and not rules.min_tokens <= trace.tokens <= rules.max_tokens


def _other_language(trace: Trace, rules: Verification) -> bool:
    known = trace.question + " ".join(trace.golds)
    return bool(rules.language) and other_language(trace.parsed.rationale, rules.language, known=known)


def _leaks_hint(trace: Trace, rules: Verification) -> bool:
    return trace.hinted and bool(_HINTED.search(trace.parsed.rationale))


RULES: Mapping[str, Callable[[Trace, Verification], bool]] = {
    "parse": _unparsed,
    "truncated": _truncated,
    "refusal": _refused,
    "repetition": _repeats,
    "answer": _wrong_answer,
    "arithmetic": _wrong_arithmetic,
    "contradiction": _contradicts,
    "length": _wrong_length,
    "language": _other_language,
    "hint": _leaks_hint,
}

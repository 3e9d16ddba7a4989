"""Verification: named rules, each of which accepts or rejects one trace by what it says.

A rule sees the question, its gold answers and the output; never which teacher spoke, nor what the scripted oracle put in.
Rules that compare traces with one another (`duplicate`, `not_best`, `agreement`) are in `selection`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

from siq_vl.distill.schema import DESCRIPTION_TASKS, Verdict
from siq_vl.parsing.answers import MATCHES, TAGS, Parsed, agrees, final_answer, number_in, parse_trace
from siq_vl.parsing.arithmetic import agrees_with_result, false_statements, results_of
from siq_vl.parsing.texts import languages, loops, other_language, pieces

TEACHER_ERROR = "teacher_error"  # rejects a trace for which the teacher had no answer; it cannot be skipped
_OPENING = 160  # characters of an output in which a refusal is looked for
_LONGEST_CONCLUSION = 6  # words; what is longer is a sentence about the answer, not the answer
_TAG = re.compile(r"</?(?:think|answer)>")
_SPECIAL_TOKEN = re.compile(r"<\|[\w-]{1,40}\|>")  # as chat templates of the Qwen family and others write them
_DESCRIPTION = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
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
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")


@dataclass(frozen=True)
class RuleInput:
    """What the rules see of a trace: columns of `schema.TeacherTrace`, and the output taken apart."""

    question: str
    golds: Sequence[str]
    kind: str
    choices: Sequence[str]
    output: str
    finish_reason: str
    hinted: bool
    error: str
    task: str = "general"

    @classmethod
    def of(cls, row: Mapping) -> "RuleInput":
        """Return what the rules see of a row with at least `RULE_COLUMNS`."""
        return cls(**{name: row[name] for name in RULE_COLUMNS})

    @cached_property
    def parsed(self) -> Parsed:
        """The output's rationale and answer; of a description all of its text is the answer."""
        if self.is_description:
            return Parsed("", _description(self.output), True)
        return parse_trace(self.output)

    @property
    def is_description(self) -> bool:
        """Whether a picture was to be described, rather than a question answered."""
        return self.task in DESCRIPTION_TASKS

    @cached_property
    def tokens(self) -> int:
        """The rationale's length in words, numbers and punctuation marks."""
        return len(pieces(self.parsed.rationale))


RULE_COLUMNS = tuple(column.name for column in fields(RuleInput))


def _description(output: str) -> str:
    """Return what a teacher says of a picture, without what it thought before; nothing where it only thought."""
    _, closed, said = output.rpartition("</think>")
    if not closed and "<think>" in output:
        return ""
    # Prompts for descriptions ask for no tags; a model that was trained on them may write them all the same.
    tagged = _DESCRIPTION.search(said)
    if tagged:
        said = tagged.group(1)
    return said.strip()


def _unparsed(trace: RuleInput, rules: "Verification") -> bool:
    if trace.is_description:
        return not trace.parsed.answer
    return not trace.parsed.rationale or not trace.parsed.answer


def _truncated(trace: RuleInput, rules: "Verification") -> bool:
    return trace.finish_reason == "length"


def _refused(trace: RuleInput, rules: "Verification") -> bool:
    # Where a gold answer itself reads like a refusal ("cannot be determined"), saying so is no refusal.
    for gold in trace.golds:
        if _REFUSAL.search(gold):
            return False
    # A refusal opens the reasoning or is the answer; deep inside, "I cannot see a third bar" may be sound reasoning.
    opening = (trace.parsed.rationale or trace.output)[:_OPENING]
    return bool(_REFUSAL.search(opening) or _REFUSAL.search(trace.parsed.answer))


def _repeats(trace: RuleInput, rules: "Verification") -> bool:
    # The whole output is looked at, since a loop can keep the rationale from ever being closed.
    return loops(pieces(_TAG.sub(" ", trace.output)))


def _wrong_answer(trace: RuleInput, rules: "Verification") -> bool:
    # Without a gold answer nothing can be said; without an answer the rule `parse` has spoken.
    if not trace.golds or not trace.parsed.answer:
        return False
    return not agrees(trace.parsed.answer, trace.golds, kind=trace.kind, choices=trace.choices, match=rules.match)


def _wrong_arithmetic(trace: RuleInput, rules: "Verification") -> bool:
    return bool(false_statements(trace.parsed.rationale))


def _contradicts(trace: RuleInput, rules: "Verification") -> bool:
    """Whether the rationale concludes something other than the answer.

    A conclusion is what it calls the answer, or the result of an equation in its last sentence when the answer is a
    number.
    """
    answer = trace.parsed.answer
    if not answer:
        return False
    if conclusion := final_answer(trace.parsed.rationale):
        if len(conclusion.split()) > _LONGEST_CONCLUSION:
            return False
        return not agrees(conclusion, answer, kind=trace.kind, choices=trace.choices)
    number = number_in(answer)
    # The answer of a multiple choice is a letter or one of its texts: a number in it need not be what was calculated.
    if number is None or trace.kind == "choice":
        return False
    value, _unit = number
    last_sentence = _SENTENCE_END.split(trace.parsed.rationale.strip())[-1]
    results = results_of(last_sentence)
    for result, shown in results:
        if agrees_with_result(value, result, shown):
            return False
    return bool(results)


def _wrong_length(trace: RuleInput, rules: "Verification") -> bool:
    # A missing rationale is a matter of the rule `parse`.
    return bool(trace.parsed.rationale) and not rules.min_words <= trace.tokens <= rules.max_words


def _other_language(trace: RuleInput, rules: "Verification") -> bool:
    if not rules.language:
        return False
    # Words of the question and of its answers may be quoted in whatever language they are.
    known = trace.question + " ".join(trace.golds)
    return other_language(trace.parsed.rationale, rules.language, known=known)


def _leaks_hint(trace: RuleInput, rules: "Verification") -> bool:
    return trace.hinted and bool(_HINTED.search(trace.parsed.rationale))


def _spells_markup(trace: RuleInput, rules: "Verification") -> bool:
    """Whether the rationale or the answer spells out a tag or a special token, or another answer stands behind the answer.

    A student would learn to close its reasoning or its turn early; and of two answers nobody knows which one is meant.
    """
    for text in (trace.parsed.rationale, trace.parsed.answer):
        if _SPECIAL_TOKEN.search(text) or any(tag in text for tag in TAGS):
            return True
    _, _, behind = trace.output.partition("</answer>")
    return "<answer>" in behind or "<think>" in behind


RULES: Mapping[str, Callable[[RuleInput, "Verification"], bool]] = {
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
    "markup": _spells_markup,
}
# A description has neither rationale nor gold answer, and may quote whatever language is in the picture.
_RULES_OF_DESCRIPTIONS = ("parse", "truncated", "refusal", "repetition", "markup")


@dataclass(frozen=True)
class Verification:
    """Which rules are applied to each trace, and with which bounds; the field's help says what each of them is."""

    _argument_group_name = "verification, of each trace by itself"

    skip_rules: list[str] = field(
        default_factory=list,
        metadata={"choices": tuple(RULES), "metavar": "RULE", "help": f"rules to leave out: {', '.join(RULES)}"},
    )
    match: str = field(
        default="number",
        metadata={
            "choices": MATCHES,
            "help": "how answers are compared with gold ones: as words, numbers by value, or numbers within 5%%",
        },
    )
    min_words: int = field(
        default=1,
        metadata={"aliases": ["--min_length"], "help": "of a rationale; numbers and punctuation marks count as words"},
    )
    max_words: int = field(default=2048, metadata={"aliases": ["--max_length"], "help": "of a rationale, likewise"})
    language: str = field(default="en", metadata={"help": "code of the rationales' language; '' for any"})

    def __post_init__(self) -> None:
        for rule in self.skip_rules:
            if rule not in RULES:
                raise ValueError(f"{rule!r} is no rule; the rules are {', '.join(RULES)}")
        if self.match not in MATCHES:
            raise ValueError(f"match is {self.match!r}; it must be one of {', '.join(MATCHES)}")
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(f"rationales of {self.min_words} to {self.max_words} words: the bounds must rise from 0")
        if self.language and self.language not in languages():
            raise ValueError(f"language is {self.language!r}; it must be a code such as en, or empty for any")

    def settings(self) -> dict:
        """Return what a store's settings.json keeps; most keys are those of the first stores.

        The rules are among it, so that a store is judged again when there are new ones.
        """
        return {
            "rules": list(RULES),
            "skip": sorted(self.skip_rules),
            "match": self.match,
            "min_tokens": self.min_words,
            "max_tokens": self.max_words,
            "language": self.language,
        }

    def judge(self, trace: RuleInput) -> list[str]:
        """Return the names of the rules that reject the trace, in the rules' order; an accepted trace has none."""
        if trace.error:
            return [TEACHER_ERROR]
        rejected_by = []
        for name, rejects in RULES.items():
            if trace.is_description and name not in _RULES_OF_DESCRIPTIONS:
                continue
            if name not in self.skip_rules and rejects(trace, self):
                rejected_by.append(name)
        return rejected_by

    def verdict(self, trace: RuleInput) -> Verdict:
        """Return the verdict on one trace, before it is held against others."""
        rejected_by = self.judge(trace)
        return {
            "rationale": trace.parsed.rationale,
            "answer": trace.parsed.answer,
            "rationale_tokens": trace.tokens,
            "rejected_by": rejected_by,
            "agreement": None,
            "verdict": verdict_of(rejected_by),
        }


def verdict_of(rejected_by: Sequence[str]) -> str:
    """Return the verdict on a trace that these rules reject."""
    if rejected_by:
        return "rejected"
    return "kept"

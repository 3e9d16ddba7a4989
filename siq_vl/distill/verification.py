"""Verification: named rules, each of which accepts or rejects one trace by what it says.

A rule sees the question, its gold answers and the output; never which teacher spoke, nor what the scripted oracle put in.
Rules that compare traces with one another (`duplicate`, `not_best`, `agreement`) are in `selection`.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from siq_vl.evaluation.answers import MATCHES, Parsed, agrees, final_answer, number_in, parse_trace
from siq_vl.evaluation.texts import languages, loops, other_language, pieces

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
_VALUE = r"[-\u2212]?[$€£]?\s?(?<!\d)(?<!\d[.,])(?:\d{1,3}(?:,\d{3}){1,5}|\d{1,18})(?:\.\d{1,18})?(?: ?%)?"
_UNIT = r"(?: ?(?!(?:plus|minus|times|divided|over|is|equals|makes|gives|and|to|vs|x)\b)[A-Za-z°]{1,12}\b)?"
_TERM = rf"(?>\({{0,3}} ?{_VALUE}{_UNIT} ?\){{0,3}})"
_OPERATION = r"(?> ?(?:[-+*/×·÷\u2212]|\bx\b|\bplus\b|\bminus\b|\btimes\b|\bdivided by\b) ?)"
# Atomic groups, and a result that may be missing: a text that is all numbers is read through once.
_EQUATION = re.compile(
    rf"({_TERM}(?:{_OPERATION}{_TERM})++)(?: ?(=|≈|\bequals\b|\bis\b|\bmakes\b|\bgives\b) ?(?=({_VALUE})((?:{_OPERATION}{_TERM})*+)))?"
)
_COMPARISON = re.compile(rf"(?<![\w<>=.])({_VALUE})\s*(<=|>=|≤|≥|<|>)\s*({_VALUE})(?![\w<>=])")
_LATEX = {
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "\\approx": "≈",
    "\\%": "%",
    "\\$": "$",
    "\\left": "",
    "\\right": "",
}
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_COMPARE = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "≤": operator.le,
    "≥": operator.ge,
}


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
    results = [value for _, value in _equations(last)]
    if trace.kind == "choice" or stated is None or not results:
        return False
    return not any(_close(stated[0], value, shown) for value, shown in results)


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


def false_statements(text: str) -> list[str]:
    """Return the equations and comparisons of numbers in a text that do not hold.

    A result may be rounded to the digits it shows; `≈` may be off by 5%; a percentage may stand for its fraction.
    """
    wrong = []
    for found, (value, shown) in _equations(text):
        left = _evaluate(found.group(1))
        if left is None or _close(left, value, shown) or (found.group(2) == "≈" and _near(left, value)):
            continue
        if found.group(4) and _evaluate(shown + found.group(4)) == left:  # 2 + 2 = 2 * 2
            continue
        if shown.strip().endswith("%") and _close(100 * left, value, shown):
            continue
        wrong.append(found.group())
    for found in _COMPARISON.finditer(_plain(text)):
        a, sign, b = found.groups()
        if not _COMPARE[sign](_number(a), _number(b)):
            wrong.append(found.group())
    return wrong


def _equations(text: str) -> list[tuple[re.Match, tuple[float, str]]]:
    found = [match for match in _EQUATION.finditer(_plain(text)) if match.group(2) and not _is_range(match)]
    return [(match, (_number(match.group(3)), match.group(3))) for match in found]


def _is_range(match: re.Match) -> bool:
    """Whether it is no subtraction but a range: in "2019-2020 is", not in "7 - 4 is"."""
    return match.group(2).isalpha() and bool(re.search(r"\d-\d", match.group(1)))


def _plain(text: str) -> str:
    for latex, plain in _LATEX.items():
        text = text.replace(latex, plain)
    text = re.sub(r"\\d?frac\{([\d.]+)\}\{([\d.]+)\}", r"(\1/\2)", text).replace("**", "")
    return re.sub(r"[^\S\n]+", " ", text).replace("\n", " ; ")


def _number(text: str) -> float:
    return float(re.sub(r"[$€£,%\s]", "", text).replace("\u2212", "-"))


def _evaluate(expression: str) -> float | None:
    """Return the value of an expression of numbers, units dropped; None where it has none."""
    for word, sign in (("divided by", "/"), ("plus", "+"), ("minus", "-"), ("times", "*")):
        expression = re.sub(rf"\b{word}\b", sign, expression)
    expression = re.sub(r"(?<=[\d\s)])x(?=[\s\d(])", "*", expression)
    for mark, sign in (("×", "*"), ("·", "*"), ("÷", "/"), ("\u2212", "-")):
        expression = expression.replace(mark, sign)
    expression = re.sub(r"([\d.]+)\s?%", r"(\1/100)", expression)
    expression = re.sub(r"[$€£,]|[A-Za-z°]+", "", expression)
    missing = expression.count("(") - expression.count(")")
    expression = "(" * max(0, -missing) + expression + ")" * max(0, missing)
    if len(expression) > 200:
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, KeyError, ValueError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _close(a: float, b: float, shown: str) -> bool:
    """Return whether `a` rounds to `b` at the digits that `shown` has."""
    digits = len(re.sub(r"[^\d.]", "", shown).partition(".")[2])
    return abs(a - b) <= 0.5 * 10**-digits * (1 + 1e-9) if digits or a != int(a) else abs(a - b) < 1e-9


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 0.05 * abs(b)

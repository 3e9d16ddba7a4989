"""Arithmetic that a text states: its equations and comparisons of numbers, and whether they hold."""

import ast
import operator
import re
from collections.abc import Callable

_VALUE = r"[-\u2212]?[$€£]?\s?(?<!\d)(?<!\d[.,])(?:\d{1,3}(?:,\d{3}){1,5}|\d{1,18})(?:\.\d{1,18})?(?: ?%)?"
_UNIT = r"(?: ?(?!(?:plus|minus|times|divided|over|is|equals|makes|gives|and|to|vs|x)\b)[A-Za-z°]{1,12}\b)?"
_TERM = rf"(?>\({{0,3}} ?{_VALUE}{_UNIT} ?\){{0,3}})"
_OPERATION = r"(?> ?(?:[-+*/×·÷\u2212]|\bx\b|\bplus\b|\bminus\b|\btimes\b|\bdivided by\b) ?)"
# Atomic groups, and a result that may be missing: a text that is all numbers is read through once.
_EQUATION = re.compile(
    rf"({_TERM}(?:{_OPERATION}{_TERM})++)"
    r"(?: ?(=|≈|\bequals\b|\bis\b|\bmakes\b|\bgives\b) ?"
    rf"(?=({_VALUE})((?:{_OPERATION}{_TERM})*+)))?"
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
_OPERATORS: dict[type, Callable[..., float]] = {
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


def false_statements(text: str) -> list[str]:
    """Return the equations and comparisons of numbers in a text that do not hold.

    A result may be rounded to the digits it shows; `≈` may be off by 5%; a percentage may stand for its fraction.
    """
    wrong = []
    for found, (value, shown) in _equations(text):
        sign, goes_on = found.group(2), found.group(4)
        left = _evaluate(found.group(1))
        if left is None or _close(left, value, shown):
            continue
        if sign == "≈" and _near(left, value):
            continue
        if goes_on and _evaluate(shown + goes_on) == left:  # 2 + 2 = 2 * 2
            continue
        if shown.strip().endswith("%") and _close(100 * left, value, shown):
            continue
        wrong.append(found.group())
    for found in _COMPARISON.finditer(_plain(text)):
        left_side, sign, right_side = found.groups()
        if not _COMPARE[sign](_number(left_side), _number(right_side)):
            wrong.append(found.group())
    return wrong


def count_statements(text: str) -> int:
    """Return how many equations and comparisons of numbers a text has, right or wrong."""
    return len(_equations(text)) + len(_COMPARISON.findall(_plain(text)))


def results_of(text: str) -> list[tuple[float, str]]:
    """Return the results of a text's equations: the value of each, and how it is written."""
    return [result for _, result in _equations(text)]


def agrees_with_result(value: float, result: float, shown: str) -> bool:
    """Return whether a value, rounded to the digits that `shown` has, is the result."""
    return _close(value, result, shown)


def _equations(text: str) -> list[tuple[re.Match, tuple[float, str]]]:
    """Return the equations of a text, each with its result's value and how that is written."""
    equations = []
    for match in _EQUATION.finditer(_plain(text)):
        sign, shown = match.group(2), match.group(3)
        if sign and not _is_range(match):
            equations.append((match, (_number(shown), shown)))
    return equations


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
    # The pattern may cut an expression out of its brackets: what is missing on either side is put back.
    missing = expression.count("(") - expression.count(")")
    expression = "(" * max(0, -missing) + expression + ")" * max(0, missing)
    if len(expression) > 200:  # the parser's depth is bounded
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, KeyError, ValueError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _close(a: float, b: float, shown: str) -> bool:
    """Return whether `a` rounds to `b` at the digits that `shown` has."""
    digits = len(re.sub(r"[^\d.]", "", shown).partition(".")[2])
    if digits == 0 and a == int(a):  # nothing to round
        return abs(a - b) < 1e-9
    return abs(a - b) <= 0.5 * 10**-digits * (1 + 1e-9)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 0.05 * abs(b)

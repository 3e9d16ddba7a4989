"""Reading a model's output: its rationale, its answer, and the facts that it states."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_THINK = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_WELL_FORMED = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
# A phrase that names an answer. Runs of white space and marks are bounded here, or begin where no such run does: a text of
# them is read through once.
_MARKER = re.compile(
    r"""
    # Where a phrase begins: a line, a sentence, a clause, or what follows "so" and the like.
    (?: ^ | (?<=[.!?:;,\n*]) | (?<=\bso) | (?<=\bthus) | (?<=\bhence) | (?<=\btherefore) )
    [\s*#_]{0,40}+
    (?:
        # "the final answer is", "Answer:", "the correct option to the question is"
        (?: the\s+ )?
        (?:
            (?: final\s+ | correct\s+ | short\s+ | right\s+ | best\s+ )? answer
            | (?: correct | right | best )\s+(?: option | choice )
        )
        (?: \s+to\s+[^.:\n]{1,60} )?
        [\s*_]{0,40}+
        (?: \bis\b | : | = )
        # "Answer" as a heading
        | answer\s*[*_]*\n
    )
    [\s*:_]*
    """,
    re.IGNORECASE | re.VERBOSE,
)
# What is no part of an answer any more: the next sentence (a decimal point ends none), or the reason for it.
_END_OF_ANSWER = re.compile(
    r"""
    [.!?] (?: \s+(?=[A-Z]) | \s*$ )
    | (?: , | (?<![\s,]) )\s+(?: because | since | as )\s
    """,
    re.VERBOSE,
)
# "so" and the like before a named answer, which is no part of the rationale.
_CONJUNCTION = re.compile(r"(?:^|(?<=[.\n]))\s{0,40}+(?:so|thus|hence|therefore)[\s,:]*$", re.IGNORECASE)

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_NUMBER_WORDS = {word: value for value, word in enumerate(_WORDS.split())} | {"none": 0, "dozen": 12}
_SCALES = {"k": 1e3, "thousand": 1e3, "million": 1e6, "mn": 1e6, "billion": 1e9, "bn": 1e9, "trillion": 1e12}
_NUMBER = re.compile(
    r"""
    (?P<sign>[-\u2212]?) \s* (?P<currency>[$€£¥])? \s* (?P<sign2>[-\u2212]?)
    (?P<digits>
        \d{1,3} (?:[,\u00a0\u2009\u202f'’]\d{3})+ (?:\.\d+)? (?!\d)  # 1,234,567.8
        | \d{1,2} (?:,\d{2})+ ,\d{3} (?:\.\d+)? (?!\d)               # 12,34,567
        | \d+ (?:\.\d+)?
        | \.\d+
    )
    (?: \s*/\s* (?P<over>\d+(?:\.\d+)?) )?
    (?: \s* (?P<percent> % | percent\b | per\ cent\b ) )?
    (?: \s* (?P<scale> k | thousand | million | mn | billion | bn | trillion )\b )?
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SEPARATORS = re.compile("[,\u00a0\u2009\u202f'’]")
_APPROXIMATELY = re.compile(
    r"^(?:about|approximately|around|roughly|nearly|almost|exactly|≈|~|is|are|equals|=)\s*", re.IGNORECASE
)
_CHOICE = re.compile(
    r"^(?:option|choice|answer)?\s*[(\[]?([a-h])(?:[)\].:]|\s*$)\s*[-:.)]*\s*(.*)$", re.IGNORECASE | re.DOTALL
)
_ALTERNATIVE = re.compile(r"(?:or|and|/|,)\s*(?:[(\[][a-h][)\]]|[a-h]\b(?!\s+\w))", re.IGNORECASE)
_YES, _NO = frozenset({"yes", "true", "correct"}), frozenset({"no", "false", "incorrect"})
KINDS = ("open", "number", "choice", "yes_no")
MATCHES = ("exact", "number", "relaxed")


@dataclass(frozen=True)
class Parsed:
    """A model's output taken apart; `well_formed` says whether it ran `<think>…</think><answer>…</answer>`, and no more."""

    rationale: str
    answer: str
    well_formed: bool


def parse(text: str) -> Parsed:
    """Take an output apart.

    Without tags the whole text is the answer. An output that began to reason and never answered has the empty answer.
    """
    text = text.strip()
    rationale = ""
    think = _THINK.search(text)
    if think:
        rationale = think.group(1).strip()
    answer = _ANSWER.search(text)
    if answer:
        return Parsed(rationale, answer.group(1).strip(), is_well_formed(text))
    if think:
        return Parsed(rationale, "", False)
    return Parsed("", text, False)


def is_well_formed(text: str) -> bool:
    """Return whether a text is `<think>…</think><answer>…</answer>`: each tag once, white space alone around them."""
    once = all(text.count(tag) == 1 for tag in TAGS)
    return once and bool(_WELL_FORMED.fullmatch(text.strip()))


def matches(answer: str, gold: str) -> bool:
    """Return whether an answer is the gold one, up to case, outer white space and a final full stop."""
    return _plain(answer) == _plain(gold)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def stated_facts(caption: str) -> Counter[str]:
    """Return the facts of a caption `"kind: fact, fact"`, the kind counted as one of them."""
    kind, _, listed = caption.strip().partition(":")
    facts = Counter([f"{kind.strip()}:"])
    for fact in listed.split(","):
        if fact.strip():
            facts[fact.strip()] += 1
    return facts


def fact_score(caption: str, gold: str) -> float:
    """Return the share of facts that a caption gets right, the kind of picture left out.

    Right facts over the larger of the stated and the true number of facts, so that neither a missing fact nor an
    invented one is free.
    """
    stated, true = stated_facts(caption), stated_facts(gold)
    kind = f"{gold.partition(':')[0]}:"
    right = sum(((stated & true) - Counter([kind])).values())
    return right / max(sum(stated.values()) - 1, sum(true.values()) - 1)


def parse_trace(text: str) -> Parsed:
    r"""Take a teacher's output apart: our tags, a native thinking format, or plain step-by-step prose.

    - `<think>…</think><answer>…</answer>`, as `parse` reads it;
    - `…</think>` and then the answer, with or without the opening tag (some chat templates put it into the prompt);
    - prose that ends in `\boxed{…}`, "the answer is …" or "Answer: …": what stands before is the rationale.

    What was begun and not finished, and prose that names no answer, have the empty answer.
    """
    text = text.strip()
    before, closed, after = text.partition("</think>")
    if "<answer>" in text:
        tagged = parse(text)
        rationale = tagged.rationale
        if not rationale:
            before_answer = text.partition("<answer>")[0]
            rationale = before_answer.replace("<think>", "").replace("</think>", "").strip()
        return Parsed(rationale, plain_answer(tagged.answer), tagged.well_formed)
    if closed:
        _, answer = _final(after)
        if not answer and after.strip():
            # Prose that names no answer: its last line is it.
            answer = plain_answer(after.strip().splitlines()[-1])
        return Parsed(before.replace("<think>", "").strip(), answer, False)
    if "<think>" in text:
        return Parsed(text.replace("<think>", "").strip(), "", False)
    rationale, answer = _final(text)
    return Parsed(rationale, answer, False)


def final_answer(text: str) -> str:
    r"""Return the answer that prose names last (`\boxed{…}`, "the answer is …", "Answer: …"), or the empty string."""
    return _final(text)[1]


def _final(text: str) -> tuple[str, str]:
    """Return what stands before the last named answer, and the answer."""
    boxed = _last_boxed(text)
    markers = list(_MARKER.finditer(text))
    if not markers:
        if boxed is None:
            return text, ""
        place, content = boxed
        return text[:place].strip(), plain_answer(content)
    marked = markers[-1]
    said, _, below = text[marked.end() :].partition("\n")
    if boxed is not None and boxed[0] >= marked.start():
        place, content = boxed
        if not below.strip():
            place = marked.start()  # "the answer is \boxed{7}": the phrase goes with the answer
        return text[:place].strip(), plain_answer(content)
    answer = _END_OF_ANSWER.split(said, maxsplit=1)[0]
    before = _CONJUNCTION.sub("", text[: marked.start()])
    return before.strip(), plain_answer(answer)


def _last_boxed(text: str) -> tuple[int, str] | None:
    r"""Return position and content of the last `\boxed{…}`, braces inside it balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    brace = start + len("\\boxed")
    depth = 0
    for position in range(brace, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
        if depth == 0:
            return start, text[brace + 1 : position]
    return None


def plain_answer(text: str) -> str:
    """Return an answer without mark-up: boxes, dollar signs around mathematics, bold, quotes, a final full stop."""
    boxed = _last_boxed(text)
    if boxed is not None:
        _, text = boxed
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text).replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"^\$([^$]*)\$$", r"\1", text.strip())
    text = re.sub(r"^[\s*_`\"'“”‘’]+|(?<![\s*_`\"'“”‘’])[\s*_`\"'“”‘’]+$", "", text)
    text = re.sub(r"(?<!\s)\s*\\[)\]]$", "", re.sub(r"^\\[(\[]\s*", "", text))
    return re.sub(r"^[*_`\"'“”]+|(?<![*_`\"'“”])[*_`\"'“”]+$", "", text.removesuffix(".").strip()).strip()


def number_in(text: str) -> tuple[float, str] | None:
    """Return the number that an answer states and its unit, or None where it states none, or several.

    Thousands separators, currency, percent, simple fractions, scales ("1.2 million"), small number words and units are
    understood: `"about $1,200"` is `(1200.0, "")`, `"12 cm"` is `(12.0, "cm")`, `"45%"` is `(45.0, "%")`.
    """
    text = _APPROXIMATELY.sub("", plain_answer(text))
    first, _, rest = text.casefold().partition(" ")
    words = rest.split()
    if first in _NUMBER_WORDS and len(words) <= 2 and not any(word in _NUMBER_WORDS for word in words):
        return float(_NUMBER_WORDS[first]), rest.strip(" .")
    found = _NUMBER.match(text)
    if not found:
        return None
    unit = text[found.end() :].strip(" .").casefold()
    # What follows has to be a unit: no further number, no sentence, no rest of a date or of an expression.
    if any(character.isdecimal() for character in unit) or len(unit.split()) > 3 or re.match(r"[-/:.,+*=]", unit):
        return None
    value = float(_SEPARATORS.sub("", found["digits"]))
    if found["over"]:
        if float(found["over"]) == 0:
            return None
        value /= float(found["over"])
    if found["sign"] or found["sign2"]:
        value = -value
    value *= _SCALES.get((found["scale"] or "").casefold(), 1.0)
    if not math.isfinite(value):
        return None
    if found["percent"]:
        unit = "%"
    return value, unit


def agrees(
    answer: str, golds: str | Sequence[str], *, kind: str = "open", choices: Sequence[str] = (), match: str = "number"
) -> bool:
    """Return whether an answer agrees with a gold answer, or with any of several.

    Args:
        answer: what was answered, mark-up and all.
        golds: the gold answer or answers.
        kind: `"choice"` reads letters, `"yes_no"` the first word, `"number"` and `"open"` whatever is there.
        choices: the texts of a multiple choice, in the order of its letters.
        match: `"exact"` compares words; `"number"` also numbers of equal value, however written; `"relaxed"` accepts
            numbers within 5% (ChartQA's relaxed accuracy).

    Raises:
        ValueError: unknown kind or match.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if match not in MATCHES:
        raise ValueError(f"match is {match!r}; it must be one of {', '.join(MATCHES)}")
    answer = plain_answer(answer)
    if not answer:
        return False
    if isinstance(golds, str):
        golds = [golds]
    return any(_agrees(answer, plain_answer(gold), kind, choices, match) for gold in golds)


def _agrees(answer: str, gold: str, kind: str, choices: Sequence[str], match: str) -> bool:
    if _bare(answer) == _bare(gold):
        return True
    if kind == "choice":
        return _choice(answer, choices) == _choice(gold, choices) is not None
    if kind == "yes_no" or _bare(gold) in ("yes", "no"):
        return _truth(answer) == _truth(gold) is not None
    if match == "exact":
        return False
    stated = number_in(answer)
    true = number_in(gold)
    if not stated or not true:
        return False
    tolerance = 0.05 if match == "relaxed" else 0.0
    return _same_number(*stated, *true, tolerance)


def _same_number(value: float, unit: str, gold: float, gold_unit: str, tolerance: float) -> bool:
    if unit and gold_unit and unit.rstrip("s") != gold_unit.rstrip("s"):
        return False
    # Equal numbers may differ by a rounding of floating point.
    margin = max(tolerance * abs(gold), 1e-12 * max(1.0, abs(gold)))
    if abs(value - gold) <= margin:
        return True
    # 45% is given as 45 here and as 0.45 there.
    if unit == "%" and gold_unit != "%":
        return abs(value / 100 - gold) <= margin
    if gold_unit == "%" and unit != "%":
        return abs(value * 100 - gold) <= margin
    return False


def _bare(text: str) -> str:
    text = " ".join(_plain(text).split())
    return re.sub(r"^(?:the|a|an)\s+(?=\S)", "", text)


def _choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter that an answer picks: by itself, before its text, or by the text alone."""
    texts = [_bare(choice) for choice in choices]
    if _bare(text) in texts:
        return chr(ord("a") + texts.index(_bare(text)))
    found = _CHOICE.match(text)
    if not found or _ALTERNATIVE.match(found.group(2)):
        return None
    letter = found.group(1).casefold()
    if choices and ord(letter) - ord("a") >= len(choices):
        return None
    return letter


def _truth(text: str) -> bool | None:
    words = re.findall(r"[a-z]+", text.casefold())
    if not words or words[1:2] == ["or"]:  # "yes or no" says neither
        return None
    if words[0] in _YES:
        return True
    if words[0] in _NO:
        return False
    return None


@dataclass(frozen=True)
class Reading:
    """What was read of an output.

    Attributes:
        rationale: the reasoning before the answer.
        answer: the answer's words, mark-up left out; for a number, a letter or a yes or no in a sentence, these alone.
        well_formed: whether the output ran `<think>…</think><answer>…</answer>`, and no more.
        value: what the answer says: a number for `"number"`, a lower-case letter for `"choice"`, a truth value for
            `"yes_no"`, the answer itself for `"open"`; None where it says none.
    """

    rationale: str
    answer: str
    well_formed: bool
    value: str | float | bool | None

    @property
    def parseable(self) -> bool:
        return self.value is not None


def read(output: str | None, *, kind: str = "open", choices: Sequence[str] = ()) -> Reading:
    """Read any model's output: ours with tags, a native thinking format, prose that names its answer, or an answer alone.

    What began to reason and never answered is unparseable; so is a text that says no number, letter, yes or no where
    `kind` asks for one. Of several candidates in prose none is picked.

    Args:
        output: the model's whole text; None counts as empty.
        kind: one of `KINDS`.
        choices: the texts of a multiple choice, in the order of its letters.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    text = (output or "").strip()
    parsed = parse_trace(text)
    rationale, answer = parsed.rationale, parsed.answer
    if not answer and not any(tag in text for tag in TAGS):
        rationale, answer = "", plain_answer(text)
    if any(tag in answer for tag in TAGS):  # stray ones, of an output that went wrong
        answer = plain_answer(re.sub("|".join(TAGS), " ", answer))
    answer, value = _EXTRACT[kind](answer, choices)
    return Reading(rationale, answer, parsed.well_formed, value)


def is_correct(
    output: str | None,
    golds: str | Sequence[str],
    *,
    kind: str = "open",
    choices: Sequence[str] = (),
    match: str = "number",
) -> bool:
    """Return whether an output answers right; what is unparseable is wrong. Arguments and errors as of `read` and `agrees`."""
    reading = read(output, kind=kind, choices=choices)
    return reading.parseable and agrees(reading.answer, golds, kind=kind, choices=choices, match=match)


def _extract_open(answer: str, choices: Sequence[str]) -> tuple[str, str | None]:
    return answer, answer or None


def _extract_number(answer: str, choices: Sequence[str]) -> tuple[str, float | None]:
    stated = number_in(answer)
    if stated:
        return answer, stated[0]
    # Prose: the number in it, if there is exactly one.
    found = [match.group().strip() for match in _NUMBER.finditer(answer) if not _is_part(answer, match)]
    if len(found) == 1:
        stated = number_in(found[0])
        if stated:
            return found[0], stated[0]
    return answer, None


def _is_part(text: str, match: re.Match) -> bool:
    """Return whether a number is part of a word, a date or a code: "B12", "3-4", "1.2.3"."""
    before = text[: match.start("digits")][-1:]
    after = text[match.end() : match.end() + 2]
    # A minus sign after a letter or digit is a hyphen: "3-4".
    if before in tuple("-\u2212") and text[: match.start()][-1:].isalnum():
        return True
    return before.isalnum() or before in tuple("_.,:/#") or bool(re.match(r"[\w#]|[-:/.,]\d", after))


def _extract_choice(answer: str, choices: Sequence[str]) -> tuple[str, str | None]:
    letter = _choice(answer, choices)
    if letter is None:
        letter = _only_choice_named(answer, choices)
    if letter is None:
        return answer, None
    return letter.upper(), letter


def _only_choice_named(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter that prose names in brackets, or whose text it has; None where there are several or none."""
    letters = {letter.casefold() for letter in re.findall(r"\(([A-Ha-h])\)", answer)}
    if not letters:
        letters = {chr(ord("a") + place) for place, text in enumerate(choices) if _holds(answer, text)}
    if len(letters) != 1:
        return None
    (letter,) = letters
    if choices and ord(letter) - ord("a") >= len(choices):
        return None
    return letter


def _holds(text: str, words: str) -> bool:
    """Return whether a text has these words, whole, case and articles aside."""
    if not _bare(words):
        return False
    return bool(re.search(rf"(?<!\w){re.escape(_bare(words))}(?!\w)", _bare(text)))


def _extract_yes_no(answer: str, choices: Sequence[str]) -> tuple[str, bool | None]:
    said = _truth(answer)
    if said is None:
        words = set(re.findall(r"\w+", answer.casefold())) & {"yes", "no"}
        if len(words) != 1:
            return answer, None
        said = words == {"yes"}
    return ("yes" if said else "no"), said


_EXTRACT = {
    "open": _extract_open,
    "number": _extract_number,
    "choice": _extract_choice,
    "yes_no": _extract_yes_no,
}

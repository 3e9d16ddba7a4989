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
# Runs of white space and marks are bounded here, or begin where no such run does: a text of them is read through once.
_MARKER = re.compile(
    r"(?:^|(?<=[.!?:;,\n*])|(?<=\bso)|(?<=\bthus)|(?<=\bhence)|(?<=\btherefore))[\s*#_]{0,40}+"
    r"(?:(?:the\s+)?(?:(?:final\s+|correct\s+|short\s+|right\s+|best\s+)?answer|(?:correct|right|best)\s+(?:option|choice))(?:\s+to\s+[^.:\n]{1,60})?[\s*_]{0,40}+(?:\bis\b|:|=)|answer\s*[*_]*\n)"
    r"[\s*:_]*",
    re.IGNORECASE,
)
_WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
_NUMBER_WORDS = {word: value for value, word in enumerate(_WORDS.split())} | {"none": 0, "dozen": 12}
_SCALES = {"k": 1e3, "thousand": 1e3, "million": 1e6, "mn": 1e6, "billion": 1e9, "bn": 1e9, "trillion": 1e12}
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212]?)\s*(?P<currency>[$€£¥])?\s*(?P<sign2>[-\u2212]?)"
    r"(?P<digits>\d{1,3}(?:[,\u00a0\u2009\u202f'’]\d{3})+(?:\.\d+)?(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+)(?:\s*/\s*(?P<over>\d+(?:\.\d+)?))?"
    r"(?:\s*(?P<percent>%|percent\b|per cent\b))?(?:\s*(?P<scale>k|thousand|million|mn|billion|bn|trillion)\b)?",
    re.IGNORECASE,
)
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
    think, answer = _THINK.search(text), _ANSWER.search(text)
    rationale = think.group(1).strip() if think else ""
    if answer:
        return Parsed(rationale, answer.group(1).strip(), is_well_formed(text))
    return Parsed(rationale, "" if think else text, False)


def is_well_formed(text: str) -> bool:
    """Return whether a text is `<think>…</think><answer>…</answer>`: each tag once, white space alone around them."""
    return all(text.count(tag) == 1 for tag in TAGS) and bool(_WELL_FORMED.fullmatch(text.strip()))


def matches(answer: str, gold: str) -> bool:
    """Return whether an answer is the gold one, up to case, outer white space and a final full stop."""
    return _plain(answer) == _plain(gold)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def stated_facts(caption: str) -> Counter[str]:
    """Return the facts of a caption `"kind: fact, fact"`, the kind counted as one of them."""
    kind, _, listed = caption.strip().partition(":")
    return Counter([f"{kind.strip()}:", *(fact.strip() for fact in listed.split(",") if fact.strip())])


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
        lead = text.partition("<answer>")[0] if not tagged.rationale else ""
        rationale = tagged.rationale or lead.replace("<think>", "").replace("</think>", "").strip()
        return Parsed(rationale, plain_answer(tagged.answer), tagged.well_formed)
    if closed:
        rationale = before.replace("<think>", "").strip()
        _, answer = _final(after)
        lines = [line for line in after.strip().splitlines() if line.strip()]
        return Parsed(rationale, answer or (plain_answer(lines[-1]) if lines else ""), False)
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
    marked = max(_MARKER.finditer(text), key=lambda found: found.start(), default=None)
    said, _, below = text[marked.end() :].partition("\n") if marked else ("", "", "")
    if boxed and (marked is None or boxed[0] >= marked.start()):
        start = marked.start() if marked and not below.strip() else boxed[0]
        return text[:start].strip(), plain_answer(boxed[1])
    if marked is None:
        return text, ""
    # A sentence ends the answer, a decimal point does not.
    said = re.split(r"[.!?](?:\s+(?=[A-Z])|\s*$)|(?:,|(?<![\s,]))\s+(?:because|since|as)\s", said, maxsplit=1)[0]
    before = re.sub(
        r"(?:^|(?<=[.\n]))\s{0,40}+(?:so|thus|hence|therefore)[\s,:]*$", "", text[: marked.start()], flags=re.IGNORECASE
    )
    return before.strip(), plain_answer(said)


def _last_boxed(text: str) -> tuple[int, str] | None:
    r"""Return position and content of the last `\boxed{…}`, braces inside it balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return start, text[begin + 1 : position]
    return None


def plain_answer(text: str) -> str:
    """Return an answer without mark-up: boxes, dollar signs around mathematics, bold, quotes, a final full stop."""
    boxed = _last_boxed(text)
    text = boxed[1] if boxed else text
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
    if first in _NUMBER_WORDS and len(rest.split()) <= 2 and not any(word in _NUMBER_WORDS for word in rest.split()):
        return float(_NUMBER_WORDS[first]), rest.strip(" .")
    found = _NUMBER.match(text)
    if not found:
        return None
    unit = text[found.end() :].strip(" .").casefold()
    if any(character.isdecimal() for character in unit) or len(unit.split()) > 3 or re.match(r"[-/:.,+*=]", unit):
        return None
    value = float(re.sub("[,\u00a0\u2009\u202f'’]", "", found["digits"]))
    if found["over"]:
        if float(found["over"]) == 0:
            return None
        value /= float(found["over"])
    if found["sign"] or found["sign2"]:
        value = -value
    value *= _SCALES.get((found["scale"] or "").casefold(), 1.0)
    return (value, "%" if found["percent"] else unit) if math.isfinite(value) else None


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
    return any(
        _agrees(answer, plain_answer(gold), kind, choices, match)
        for gold in ([golds] if isinstance(golds, str) else golds)
    )


def _agrees(answer: str, gold: str, kind: str, choices: Sequence[str], match: str) -> bool:
    if _bare(answer) == _bare(gold):
        return True
    if kind == "choice":
        return _choice(answer, choices) == _choice(gold, choices) is not None
    if kind == "yes_no" or _bare(gold) in ("yes", "no"):
        return _truth(answer) == _truth(gold) is not None
    if match == "exact":
        return False
    stated, true = number_in(answer), number_in(gold)
    if not stated or not true:
        return False
    return _same_number(*stated, *true, tolerance=0.05 if match == "relaxed" else 0.0)


def _same_number(value: float, unit: str, gold: float, gold_unit: str, tolerance: float) -> bool:
    if unit and gold_unit and unit.rstrip("s") != gold_unit.rstrip("s"):
        return False
    values = [value]
    if "%" in (unit, gold_unit) and unit != gold_unit:  # 45% is given as 45 here and as 0.45 there
        values.append(value / 100 if unit == "%" else value * 100)
    return any(abs(value - gold) <= max(tolerance * abs(gold), 1e-12 * max(1.0, abs(gold))) for value in values)


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
    return letter if not choices or ord(letter) - ord("a") < len(choices) else None


def _truth(text: str) -> bool | None:
    words = re.findall(r"[a-z]+", text.casefold())
    if not words or words[0] not in _YES | _NO or words[1:2] == ["or"]:
        return None
    return words[0] in _YES


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
    if stated := number_in(answer):
        return answer, stated[0]
    found = [match.group().strip() for match in _NUMBER.finditer(answer) if not _is_part(answer, match)]
    stated = number_in(found[0]) if len(found) == 1 else None
    return (found[0], stated[0]) if stated else (answer, None)


def _is_part(text: str, match: re.Match) -> bool:
    """Return whether a number is part of a word, a date or a code: "B12", "3-4", "1.2.3"."""
    first = match.start("digits")
    before, after = text[:first][-1:], text[match.end() : match.end() + 2]
    if before in tuple("-\u2212") and text[: match.start()][-1:].isalnum():
        return True
    return before.isalnum() or before in tuple("_.,:/#") or bool(re.match(r"[\w#]|[-:/.,]\d", after))


def _extract_choice(answer: str, choices: Sequence[str]) -> tuple[str, str | None]:
    letter = _choice(answer, choices)
    if letter is None:
        bracketed = set(re.findall(r"\(([A-Ha-h])\)", answer))
        named = {chr(ord("a") + place) for place, text in enumerate(choices) if _holds(answer, text)}
        candidates = {found.casefold() for found in bracketed} or named
        letter = candidates.pop() if len(candidates) == 1 else None
        if letter and choices and ord(letter) - ord("a") >= len(choices):
            letter = None
    return (answer, None) if letter is None else (letter.upper(), letter)


def _holds(text: str, words: str) -> bool:
    return bool(_bare(words)) and bool(re.search(rf"(?<!\w){re.escape(_bare(words))}(?!\w)", _bare(text)))


def _extract_yes_no(answer: str, choices: Sequence[str]) -> tuple[str, bool | None]:
    said = _truth(answer)
    if said is None:
        words = set(re.findall(r"\w+", answer.casefold())) & {"yes", "no"}
        said = words == {"yes"} if len(words) == 1 else None
    return (answer, None) if said is None else ("yes" if said else "no", said)


_EXTRACT = {
    "open": _extract_open,
    "number": _extract_number,
    "choice": _extract_choice,
    "yes_no": _extract_yes_no,
}

"""Metrics of reasoning: how much of it there is, in what form, and what is wrong with it. They take whole outputs.

The report asked for better measures than its own; where a definition is published its source is named, and what is this
project's own says so.
"""

import math
import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from siq_vl.evaluation.metrics.matching import Row
from siq_vl.parsing.answers import TAGS, is_well_formed, plain_answer, read
from siq_vl.parsing.arithmetic import count_statements, false_statements
from siq_vl.parsing.texts import loops, other_language, pieces

UNITS = ("pieces", "words", "characters")
_QUANTILES = {"min": 0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1}
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_CLAUSE_END = re.compile(r"(?<=[.!?;,])\s+|\n+")
# What a question asks for.
_LETTER_ASKED = re.compile(
    r"\b(?:option's letter|letter (?:of|from) the|(?:answer|reply|respond) with (?:the|a) letter)", re.I
)
_YES_NO_ASKED = re.compile(r"\b(?:answer|reply|respond)\b[^.?!\n]{0,30}\byes\b['\"]? or ['\"]?no\b", re.I)
_YES_NO_QUESTION = re.compile(
    r"(?:is|are|was|were|do|does|did|has|have|had|should|(?:can|could|will|would)(?! you))\b", re.I
)
_OPTION = re.compile(r"(?:^|\s)\(?[A-Ha-h][).:]\s")
_NUMBER_ASKED = re.compile(r"\bhow many\b|\bwhat is the (?:sum|difference|total|product|average|number of)\b", re.I)
_SHORT_ASKED = re.compile(r"\b(?:single|one) word\b|\b(?:word|short) (?:or short )?phrase\b|\bword or phrase\b", re.I)
_DESCRIPTION_ASKED = re.compile(
    r"\b(?:describe|description|caption|summari[sz]e|explain|what (?:do you see|can be seen|is (?:shown|in|on)\b|does .{1,30} show))",
    re.I,
)
# How a caption begins, in English at large and of drawn figures.
_DESCRIPTION = re.compile(
    r"(?:in )?(?:the|this|an?) (?:image|picture|photo|photograph|figure|chart|scene|drawing|plot)s?,? "
    r"(?:shows?|depicts?|features?|contains?|presents?|displays?|captures?|illustrates?|is of|of|we see|you see|there (?:is|are))"
    r"\b|(?:scene|columns|rows|axis|receipt|sign|plate):",
    re.I,
)
# What a step says that concludes in a yes or no: it compares, or denies.
_VERDICT = re.compile(
    r"[<>≤≥=]|\b(?:same|different|odd|even|more|less|fewer|higher|lower|yes|no|not|is|are|does)\b", re.IGNORECASE
)


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(text: str, reference: str) -> Row:
    """ROUGE-L: precision, recall and F1 (`score`) of the longest common subsequence of words, by Google's `rouge_score`.

    Words are runs of ASCII letters and digits, in lower case, not stemmed: text in other scripts has none of them and
    scores 0.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; the library `rouge_score`.
    """
    found = _rouge_scorer().score(target=reference, prediction=text)["rougeL"]
    return {"score": float(found.fmeasure), "precision": float(found.precision), "recall": float(found.recall)}


def cot_length(output: str, unit: str = "pieces") -> Row:
    """Length of the rationale (the report's CoT length), 0 where there is none: an answer alone, or prose that names none.

    Args:
        output: the whole output.
        unit: `"pieces"` (words, numbers and punctuation marks: the same for every tokenizer), `"words"` (by white space)
            or `"characters"`.
    """
    if unit not in UNITS:
        raise ValueError(f"unit is {unit!r}; it must be one of {', '.join(UNITS)}")
    rationale = read(output).rationale
    if unit == "pieces":
        length = len(pieces(rationale))
    elif unit == "words":
        length = len(rationale.split())
    else:
        length = len(rationale)
    return {"length": float(length)}


def length_distribution(rows: Sequence[Row]) -> Row:
    """Return mean, standard deviation and quantiles of lengths, and the share of outputs without any rationale."""
    lengths = np.array([row["length"] for row in rows])
    distribution = {"mean": float(lengths.mean()), "std": float(lengths.std())}
    for name, share in _QUANTILES.items():
        distribution[name] = float(np.quantile(lengths, share))
    distribution["without"] = float((lengths == 0).mean())
    return distribution


def format_rate(output: str) -> Row:
    """Whether an output is `<think>…</think><answer>…</answer>`, each tag once and nothing but white space around them.

    Source: the format reward of DeepSeek-AI, "DeepSeek-R1", 2025.
    """
    return {"score": float(is_well_formed(output))}


def structure_score(output: str) -> Row:
    """How far an output has the structure of reasoning: the share of five properties that hold. This project's own.

    `tags`: every tag once, in order, nothing outside. `rationale`: there is one. `answer`: there is one.
    `steps`: the rationale has two steps or more: sentences, lines or clauses set off by semicolons. `conclusion`: the
    last step names the answer, or, for a yes or no, compares or denies something.
    """
    parsed = read(output)
    steps = [step for step in _SENTENCE_END.split(parsed.rationale) if pieces(step)]
    row = {
        "tags": float(is_well_formed(output)),
        "rationale": float(bool(parsed.rationale)),
        "answer": float(bool(parsed.answer)),
        "steps": float(len(steps) > 1),
        "conclusion": float(bool(steps) and _concludes(steps[-1], parsed.answer)),
    }
    return {"score": sum(row.values()) / len(row), **row}


def _concludes(step: str, answer: str) -> bool:
    """Return whether a step names the answer, or, for a yes or no, compares or denies something."""
    words = pieces(plain_answer(answer).casefold())
    if words in (["yes"], ["no"]):
        return bool(_VERDICT.search(step))
    if not words:
        return False
    said = pieces(step.casefold())
    return any(said[start : start + len(words)] == words for start in range(len(said)))


def step_score(output: str, reference: str) -> Row:
    """How far a rationale takes the steps of a reference rationale: the mean of three shares. This project's own.

    `found`: of the reference's steps, those that the rationale takes too, each counted once. `in_order`: of these, the
    most that come in the reference's order. `arithmetic`: of the equations and comparisons of numbers that the rationale
    states, those that hold; where it states none, 1 if the reference has none either, else 0. Without a rationale all
    are 0. A step is a sentence, a line, or a clause set off by a comma or semicolon. It is the reference's step if both
    have the same numbers and four fifths of their words in common, in order (F1).

    Args:
        output: the whole output.
        reference: the reference rationale, with its tags or without.
    """
    rationale = read(output).rationale
    wanted = read(reference).rationale or reference
    steps = _steps(rationale)
    others = _steps(wanted)
    # A row for each step of the reference, in it a truth value for each step of the rationale.
    same = []
    for other in others:
        same.append([_same_step(step, other) for step in steps])
    found = _matched(same)
    row = {"found": 0.0, "in_order": 0.0, "arithmetic": 0.0}
    if others:
        row["found"] = found / len(others)
    if found:
        row["in_order"] = min(1.0, _longest_common_subsequence(same) / found)
    stated = count_statements(rationale)
    if stated:
        row["arithmetic"] = max(0.0, 1 - len(false_statements(rationale)) / stated)
    elif rationale and not count_statements(wanted):
        row["arithmetic"] = 1.0
    return {"score": sum(row.values()) / len(row), **row}


def _steps(text: str) -> list[str]:
    return [step for step in _CLAUSE_END.split(text.casefold()) if re.search(r"\w", step)]


def _same_step(step: str, other: str) -> bool:
    """Return whether two steps have the same numbers, and four fifths of their words in common and in order (F1)."""
    if _NUMBER.findall(step) != _NUMBER.findall(other):
        return False
    words = re.findall(r"\w+|[-+*/<>=]", step)
    other_words = re.findall(r"\w+|[-+*/<>=]", other)
    equal = []
    for word in words:
        equal.append([word == other_word for other_word in other_words])
    return 2 * _longest_common_subsequence(equal) / (len(words) + len(other_words)) >= 0.8


def _matched(same: Sequence[Sequence[bool]]) -> int:
    """Return how many rows get a column of their own, each the first free one that it may have."""
    taken: set[int] = set()
    for row in same:
        for place, may in enumerate(row):
            if may and place not in taken:
                taken.add(place)
                break
    return len(taken)


def _longest_common_subsequence(same: Sequence[Sequence[bool]]) -> int:
    """Return the length of the longest common subsequence of two sequences.

    Args:
        same: whether an element of the first, the row, equals one of the second, the column.
    """
    if not same:
        return 0
    # The length for the rows so far and the first columns, none of them at the beginning.
    lengths = [0] * (len(same[0]) + 1)
    for row in same:
        before = list(lengths)
        for place, equal in enumerate(row):
            if equal:
                lengths[place + 1] = before[place] + 1
            else:
                lengths[place + 1] = max(before[place + 1], lengths[place])
    return lengths[-1]


def repetition(output: str) -> Row:
    """Repetition loops: whether an output repeats some stretch over and over (`score`), and how repetitive it is.

    A loop is the same one to sixty pieces four times or more in a row (at least eighteen pieces), or a long text of which
    fewer than three in ten runs of four pieces are new: this project's own, the rule that traces are filtered by.
    `rep_4` is the share of runs of four pieces that occurred before, 0 for shorter texts.

    Source of `rep_4` (seq-rep-4): Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020.
    """
    said = pieces(output)
    runs = [tuple(said[start : start + 4]) for start in range(len(said) - 3)]
    repeated = 0.0
    if runs:
        repeated = 1 - len(set(runs)) / len(runs)
    return {"score": float(loops(said)), "rep_4": repeated}


def mixed_language(output: str, language: str = "en", known: str = "") -> Row:
    """Say whether an output is in another language, wholly or in part.

    That is, a tenth of its letters in other scripts, or all of it recognised as another language. This project's own,
    the rule that traces are filtered by.

    Args:
        output: the whole output.
        language: code of the language that is wanted.
        known: text that may be quoted, such as the question; its scripts are the output's own.
    """
    text = output
    for tag in TAGS:
        text = text.replace(tag, " ")
    return {"score": float(other_language(text, language, known))}


def ignored_instruction(output: str, question: str) -> Row:
    """Whether an output ignores what the question asks for. This project's own; it reads English.

    `kind`: a yes or no, a number or an option's letter is asked for, and the answer says none. `long`: a word or a short
    phrase is asked for in so many words, and the answer has more than five words. `described`: the answer describes the
    picture, as a model does that was taught captions alone, and no description is asked for. The score is 1 if any of
    them holds. An output without an answer ignores nothing here: it is unparseable, which is counted apart.

    Args:
        output: the whole output.
        question: what was asked, with its instruction.
    """
    answer = read(output).answer
    row = dict.fromkeys(("kind", "long", "described"), 0.0)
    if answer:
        kind = _kind_asked_for(question)
        row["kind"] = float(not read(answer, kind=kind).parseable)
        row["long"] = float(bool(_SHORT_ASKED.search(question)) and len(answer.split()) > 5)
        row["described"] = float(bool(_DESCRIPTION.match(answer)) and not _DESCRIPTION_ASKED.search(question))
    return {"score": max(row.values()), **row}


def _kind_asked_for(question: str) -> str:
    """Return the kind of answer, one of `answers.KINDS`, that a question asks for; "open" where it does not say."""
    if _LETTER_ASKED.search(question):
        return "choice"
    if _YES_NO_ASKED.search(question):
        return "yes_no"
    if len(_OPTION.findall(question)) > 1:  # a letter or its text
        return "open"
    # Which of two, "Is it red or blue?", is no question of yes or no.
    sentence = re.split(r"(?<=[.!?])\s+|\n", question.strip().partition("?")[0])[-1]
    if "?" in question and _YES_NO_QUESTION.match(sentence) and not re.search(r"\bor\b", sentence):
        return "yes_no"
    if _NUMBER_ASKED.search(question):
        return "number"
    return "open"


def correctness(score: float) -> Row:
    """Return the row of a sample that was answered with a score, 0 to 1, in the order of evaluation."""
    score = float(score)
    if not 0 <= score <= 1:
        raise ValueError(f"score is {score}; running accuracy takes what each sample scored, from 0 to 1")
    return {"score": score}


def running_accuracy(rows: Sequence[Row]) -> dict:
    """The report's running accuracy, and its stability as a number. This project's own.

    The curve is the mean score of the first n samples, for every n. `volatility` is the root mean square of its distance
    from the final value over the second half; `stability` is 1 - volatility. `volatility_by_chance` is the volatility to
    be expected of the very same scores in random order (samples drawn without replacement: the variance of the first n
    of N is s²(N - n) / (nN)): a curve is unstable where its volatility is well above it, which samples of drifting
    difficulty do, and not where the scores are merely few or mixed.

    Returns:
        `accuracy`, `stability`, `volatility`, `volatility_by_chance`, and `curve`, a list.
    """
    scores = np.array([row["score"] for row in rows])
    count = len(scores)
    counts = np.arange(1, count + 1)
    curve = np.cumsum(scores) / counts
    # The first half of the curve jumps, however good the model is: few samples are in its means.
    half = counts >= max(1, count / 2)
    volatility = math.sqrt(float(((curve[half] - curve[-1]) ** 2).mean()))
    variance = 0.0
    if count > 1:
        variance = float(scores.var(ddof=1))
    expected = math.sqrt(float((variance * (count - counts[half]) / (counts[half] * count)).mean()))
    return {
        "accuracy": float(curve[-1]),
        "stability": 1 - volatility,
        "volatility": volatility,
        "volatility_by_chance": expected,
        "curve": [float(value) for value in curve],
    }

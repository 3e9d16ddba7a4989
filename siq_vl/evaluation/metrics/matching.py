"""Metrics of answers against gold answers, each by its published definition, a sample at a time.

All take the parsed answer. An empty one scores 0 and is unparseable; nothing else is, unless a metric says so.
"""

import math
import re
import string
from collections.abc import Sequence

from siq_vl.parsing.answers import read

Row = dict[str, float]
Golds = str | Sequence[str]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA = re.compile(r"\d,\d")
_WORDS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(value) for value, word in enumerate(_WORDS.split())} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
# What lost one apostrophe gets it back.
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've "
    "he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've "
    "o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
    "someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've "
    "wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}  # as published


def vqa_accuracy(answer: str, golds: Golds, always_normalize: bool = False) -> Row:
    """VQA accuracy: how well an answer agrees with (ten) annotators.

    For each annotator in turn, `min(1, others who gave this answer / 3)`; the mean over annotators. Answers are compared
    after the official normalization (lower case, punctuation, number words, articles, contractions), which is left out
    where all annotators gave the very same answer, unless `always_normalize` (as EvalAI's server and lmms-eval do).

    With a single gold answer there are no others to agree with, and the score is whether the normalized answers are equal.

    Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015; Goyal et al., CVPR 2017; `vqaEval.py` of
    GT-Vision-Lab/VQA.
    """
    said, given = _flat(answer), [_flat(gold) for gold in given_golds(golds)]
    if not said:
        return _unparseable()
    if always_normalize or len(set(given)) > 1 or len(given) == 1:
        said, given = vqa_normalized(said), [vqa_normalized(gold) for gold in given]
    agreeing = [gold == said for gold in given]
    if len(given) == 1:
        return _row(float(agreeing[0]))
    return _row(sum(min(1.0, (sum(agreeing) - own) / 3) for own in agreeing) / len(given))


def vqa_normalized(text: str) -> str:
    """Return an answer as VQA's evaluation compares it."""
    commas, bare = bool(_DIGIT_COMMA.search(text)), text
    for mark in _PUNCTUATION:
        dropped = commas or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if dropped else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", bare).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(answer: str, golds: Golds) -> Row:
    """Exact match with any gold answer: of the strings themselves (`score`), and normalized as in SQuAD (`normalized`).

    SQuAD's normalization: lower case, no ASCII punctuation, no articles, white space collapsed.

    Source: Rajpurkar et al., "SQuAD", EMNLP 2016 (normalized); `exact_match` of pix2struct's metrics (as is).
    """
    golds = given_golds(golds)
    if not answer.strip():
        return {**_unparseable(), "normalized": 0.0}
    plain = _squad_normalized(answer)
    return {
        **_row(float(answer in golds)),
        "normalized": float(any(plain == _squad_normalized(gold) for gold in golds)),
    }


def _squad_normalized(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def relaxed_accuracy(answer: str, golds: Golds, tolerance: float = 0.05) -> Row:
    """ChartQA's relaxed accuracy: a number within 5% of a gold number, any other answer equal to it, case aside.

    A number is what Python reads as one, a percentage (`"96%"`) being its fraction. A gold answer of zero, having no
    relative error, must be met as a string. Thousands separators and units are no part of the definition: the parsed
    answer goes through `siq_vl.parsing.answers.agrees(match="relaxed")` where they are to be understood.

    Source: Masry et al., "ChartQA", ACL Findings 2022, section 5.1, after Methani et al., "PlotQA", WACV 2020;
    `relaxed_correctness` of pix2struct's metrics.
    """
    golds = given_golds(golds)
    if not answer.strip():
        return _unparseable()
    return _row(float(any(_relaxed(answer, gold, tolerance) for gold in golds)))


def _relaxed(answer: str, gold: str, tolerance: float) -> bool:
    said, true = _number(answer), _number(gold)
    if said is None or not true:
        return answer.lower() == gold.lower()
    return abs(said - true) / abs(true) <= tolerance


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def anls(answer: str, golds: Golds, threshold: float = 0.5) -> Row:
    """Average normalized Levenshtein similarity: 1 - edit distance / longer length, 0 below the threshold; best gold.

    Case and runs of white space are left out of account. A similarity of exactly the threshold counts, as in the
    official script.

    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019; Mathew et al., "DocVQA", WACV 2021, and the
    evaluation script of the Robust Reading Competition's DocVQA challenge.
    """
    said, given = " ".join(answer.lower().split()), [" ".join(gold.lower().split()) for gold in given_golds(golds)]
    if not said:
        return _unparseable()
    best = max(_similarity(said, gold, threshold) for gold in given)
    return _row(best if best >= threshold else 0.0)


def _similarity(a: str, b: str, threshold: float) -> float:
    shorter, longer = sorted((len(a), len(b)))
    if shorter / longer < threshold:  # no distance could be small enough
        return 0.0
    return 1 - edit_distance(a, b) / longer


def edit_distance(a: str, b: str) -> int:
    """Return Levenshtein's distance: insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def multiple_choice(answer: str, golds: Golds, choices: Sequence[str] = ()) -> Row:
    """Multiple-choice accuracy, as of ScienceQA: the letter picked is the gold one.

    The answer is a letter, a letter with its text, or a text of the choices; gold is a letter, a text, or an index from 0
    written as a number. ScienceQA's own script guesses where it finds no letter; here that is unparseable, and wrong.

    Source: Lu et al., "Learn to Explain", NeurIPS 2022 (ScienceQA).
    """
    right = {_gold_letter(gold, choices) for gold in given_golds(golds)}
    picked = read(answer, kind="choice", choices=choices).value
    return _unparseable() if picked is None else _row(float(picked in right))


def _gold_letter(gold: str, choices: Sequence[str]) -> str:
    value = read(gold, kind="choice", choices=choices).value
    if value is None and gold.strip().isdecimal():
        value = chr(ord("a") + int(gold))
    places = ord(value) - ord("a") if isinstance(value, str) else -1
    if places < 0 or (choices and places >= len(choices)):
        raise ValueError(
            f"gold answer is {gold!r}; give a letter, an index from 0 or a text of the choices {list(choices)}"
        )
    return str(value)


def pope(answer: str, golds: Golds) -> Row:
    """POPE: whether a yes-or-no answer about an object's presence is right, as a row of the table of confusion.

    As POPE's script reads it: of the first sentence, commas dropped, "no" or "not" among its words says no. It takes
    everything else for a yes; here a yes has to be said ("yes" or "there is"), and what says neither is unparseable: it
    counts as the wrong answer, and is not counted as a yes.

    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023; `evaluate.py` of
    RUCAIBox/POPE.

    Returns:
        `score` and, each 0 or 1, `tp`, `fp`, `tn`, `fn`, `yes`, `unparseable`.
    """
    golds = given_golds(golds)
    true = {"yes": True, "no": False}.get(golds[0].strip().casefold())
    if true is None or len(golds) != 1:
        raise ValueError(f"gold answers are {list(golds)}; POPE asks for one, 'yes' or 'no'")
    said = _said_yes(answer)
    counted = said if said is not None else not true
    cell = ("t" if counted == true else "f") + ("p" if counted else "n")
    row = {name: float(name == cell) for name in ("tp", "fp", "tn", "fn")}
    return {"score": float(counted == true), **row, "yes": float(said is True), "unparseable": float(said is None)}


def _said_yes(answer: str) -> bool | None:
    sentence = answer.strip().partition(".")[0].replace(",", "").casefold()
    words = re.findall(r"\w+", sentence)
    if "no" in words or "not" in words:
        return False
    return True if "yes" in words or " ".join(words).startswith(("there is", "there are")) else None


def confusion(rows: Sequence[Row]) -> Row:
    """Return accuracy, precision, recall, F1 and yes-rate of POPE's rows; a ratio without a denominator is 0."""
    tp, fp, tn, fn = (sum(row[cell] for row in rows) for cell in ("tp", "fp", "tn", "fn"))
    precision = tp / (tp + fp) if tp else 0.0
    recall = tp / (tp + fn) if tp else 0.0
    return {
        "accuracy": (tp + tn) / len(rows),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "yes_rate": sum(row["yes"] for row in rows) / len(rows),
        "unparseable": sum(row["unparseable"] for row in rows) / len(rows),
    }


def given_golds(golds: Golds | None) -> list[str]:
    """Return the gold answers of one sample as a list, blank ones left out.

    Raises:
        ValueError: there is none.
    """
    given = [golds] if isinstance(golds, str) else list(golds or ())
    kept = [gold for gold in given if gold is not None and gold.strip()]
    if not kept:
        raise ValueError(f"gold answers are {golds!r}; give at least one, or leave the sample out and report it apart")
    return kept


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _row(score: float) -> Row:
    return {"score": score, "unparseable": 0.0}


def _unparseable() -> Row:
    return {"score": 0.0, "unparseable": 1.0}

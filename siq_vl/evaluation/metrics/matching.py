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
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
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


def _by_lost_apostrophe() -> dict[str, str]:
    """Return the contractions by what is left of them where one apostrophe is missing."""
    found = {}
    for word in _CONTRACTED.split():
        for place, mark in enumerate(word):
            if mark == "'":
                found[word[:place] + word[place + 1 :]] = word
    return found | {"somebody'd": "somebodyd"}  # as published


_CONTRACTIONS = _by_lost_apostrophe()


def vqa_accuracy(answer: str, golds: Golds, always_normalize: bool = False) -> Row:
    """VQA accuracy: how well an answer agrees with (ten) annotators.

    For each annotator in turn, `min(1, others who gave this answer / 3)`; the mean over annotators. Answers are compared
    after the official normalization (lower case, punctuation, number words, articles, contractions), which is left out
    where all annotators gave the very same answer, unless `always_normalize` (as EvalAI's server and lmms-eval do).

    With a single gold answer there are no others to agree with, and the score is whether the normalized answers are equal.

    Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015; Goyal et al., CVPR 2017; `vqaEval.py` of
    GT-Vision-Lab/VQA.
    """
    said = _flat(answer)
    given = [_flat(gold) for gold in given_golds(golds)]
    if not said:
        return _unparseable()
    # The official script leaves unanimous answers as they are; a single gold answer is not the word of several.
    if always_normalize or len(set(given)) > 1 or len(given) == 1:
        said = vqa_normalized(said)
        given = [vqa_normalized(gold) for gold in given]
    agreeing = [gold == said for gold in given]
    if len(given) == 1:
        return _row(float(agreeing[0]))
    total = 0.0
    for own in agreeing:
        total += min(1.0, (sum(agreeing) - own) / 3)
    return _row(total / len(given))


def vqa_normalized(text: str) -> str:
    """Return an answer as VQA's evaluation compares it."""
    commas = bool(_DIGIT_COMMA.search(text))
    bare = text
    for mark in _PUNCTUATION:
        # A mark between two words parts them; one beside a space, or in a text with 1,000 in it, goes without a trace.
        dropped = commas or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if dropped else " ")
    words = []
    for word in _PERIOD.sub("", bare).lower().split():
        word = _DIGITS.get(word, word)
        if word not in _ARTICLES:
            words.append(_CONTRACTIONS.get(word, word))
    return " ".join(words)


def exact_match(answer: str, golds: Golds) -> Row:
    """Exact match with any gold answer: of the strings themselves (`score`), and normalized as in SQuAD (`normalized`).

    SQuAD's normalization: lower case, no ASCII punctuation, no articles, white space collapsed.

    Source: Rajpurkar et al., "SQuAD", EMNLP 2016 (normalized); `exact_match` of pix2struct's metrics (as is).
    """
    golds = given_golds(golds)
    if not answer.strip():
        return {**_unparseable(), "normalized": 0.0}
    normalized_golds = [_squad_normalized(gold) for gold in golds]
    return {
        **_row(float(answer in golds)),
        "normalized": float(_squad_normalized(answer) in normalized_golds),
    }


def _squad_normalized(text: str) -> str:
    text = text.lower().translate(_NO_PUNCTUATION)
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
    for gold in golds:
        if _relaxed(answer, gold, tolerance):
            return _row(1.0)
    return _row(0.0)


def _relaxed(answer: str, gold: str, tolerance: float) -> bool:
    said = _number(answer)
    true = _number(gold)
    if said is None or not true:
        return answer.lower() == gold.lower()
    return abs(said - true) / abs(true) <= tolerance


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%"))
    except ValueError:
        return None
    if text.endswith("%"):
        value /= 100
    if not math.isfinite(value):
        return None
    return value


def anls(answer: str, golds: Golds, threshold: float = 0.5) -> Row:
    """Average normalized Levenshtein similarity: 1 - edit distance / longer length, 0 below the threshold; best gold.

    Case and runs of white space are left out of account. A similarity of exactly the threshold counts, as in the
    official script.

    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019; Mathew et al., "DocVQA", WACV 2021, and the
    evaluation script of the Robust Reading Competition's DocVQA challenge.
    """
    golds = given_golds(golds)
    said = " ".join(answer.lower().split())
    if not said:
        return _unparseable()
    best = 0.0
    for gold in golds:
        best = max(best, _similarity(said, " ".join(gold.lower().split()), threshold))
    if best < threshold:
        return _row(0.0)
    return _row(best)


def _similarity(a: str, b: str, threshold: float) -> float:
    shorter, longer = sorted((len(a), len(b)))
    if shorter / longer < threshold:  # no distance could be small enough
        return 0.0
    return 1 - edit_distance(a, b) / longer


def edit_distance(a: str, b: str) -> int:
    """Return Levenshtein's distance: insertions, deletions and substitutions that turn `a` into `b`."""
    # Distances of the part of `a` read so far to every beginning of `b`.
    distances = list(range(len(b) + 1))
    for row, character in enumerate(a, 1):
        before = distances
        distances = [row]
        for column, other in enumerate(b, 1):
            substituted = before[column - 1] + (character != other)
            distances.append(min(before[column] + 1, distances[-1] + 1, substituted))
    return distances[-1]


def multiple_choice(answer: str, golds: Golds, choices: Sequence[str] = ()) -> Row:
    """Multiple-choice accuracy, as of ScienceQA: the letter picked is the gold one.

    The answer is a letter, a letter with its text, or a text of the choices; gold is a letter, a text, or an index from 0
    written as a number. ScienceQA's own script guesses where it finds no letter; here that is unparseable, and wrong.

    Source: Lu et al., "Learn to Explain", NeurIPS 2022 (ScienceQA).
    """
    right = {_gold_letter(gold, choices) for gold in given_golds(golds)}
    picked = read(answer, kind="choice", choices=choices).value
    if picked is None:
        return _unparseable()
    return _row(float(picked in right))


def _gold_letter(gold: str, choices: Sequence[str]) -> str:
    letter = read(gold, kind="choice", choices=choices).value
    if letter is None and gold.strip().isdecimal():
        letter = chr(ord("a") + int(gold))
    if not isinstance(letter, str) or (choices and ord(letter) - ord("a") >= len(choices)):
        raise ValueError(
            f"gold answer is {gold!r}; give a letter, an index from 0 or a text of the choices {list(choices)}"
        )
    return letter


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
    # What says neither counts as the wrong one of the two.
    counted = (not true) if said is None else said
    return {
        "score": float(counted == true),
        "tp": float(counted and true),
        "fp": float(counted and not true),
        "tn": float(not counted and not true),
        "fn": float(not counted and true),
        "yes": float(said is True),
        "unparseable": float(said is None),
    }


def _said_yes(answer: str) -> bool | None:
    # The rest of the output often explains, and denies what else could be there.
    sentence = answer.strip().partition(".")[0].replace(",", "").casefold()
    words = re.findall(r"\w+", sentence)
    if "no" in words or "not" in words:
        return False
    if "yes" in words or words[:2] in (["there", "is"], ["there", "are"]):
        return True
    return None


def confusion(rows: Sequence[Row]) -> Row:
    """Return accuracy, precision, recall, F1 and yes-rate of POPE's rows; a ratio without a denominator is 0."""
    totals = dict.fromkeys(("tp", "fp", "tn", "fn", "yes", "unparseable"), 0.0)
    for row in rows:
        for name in totals:
            totals[name] += row[name]
    tp = totals["tp"]
    precision = recall = f1 = 0.0
    if tp:  # else all three are 0, or have no denominator
        precision = tp / (tp + totals["fp"])
        recall = tp / (tp + totals["fn"])
        f1 = 2 * precision * recall / (precision + recall)
    return {
        "accuracy": (tp + totals["tn"]) / len(rows),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_rate": totals["yes"] / len(rows),
        "unparseable": totals["unparseable"] / len(rows),
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

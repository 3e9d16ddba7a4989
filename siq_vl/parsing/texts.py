"""What can be said of a text without understanding it: its length, whether it loops, what language it is in."""

import re
import unicodedata
from collections import Counter
from functools import cache

import numpy as np
from py3langid.langid import MODEL_FILE, LanguageIdentifier

_PIECE = re.compile(r"\w+|[^\w\s]")
_MIN_WORDS = 12  # fewer say too little about their language


def pieces(text: str) -> list[str]:
    """Return words, numbers and punctuation marks: what lengths count, the same for every model and teacher."""
    return _PIECE.findall(text)


def loops(tokens: list[str]) -> bool:
    """Return whether some stretch is repeated over and over.

    Either the same one to sixty pieces follow each other four times or more, over at least eighteen pieces; or, in a
    text of at least eighty words, fewer than three in ten of its runs of four words are new ones. A counter that goes on
    does not hide a loop, and a long list of numbers is none.
    """
    if len(tokens) - len(set(tokens)) < 14:  # the least that any period below has to repeat
        return False
    ids = np.array([hash(token) for token in tokens])
    for period in range(1, min(60, len(ids) // 4) + 1):
        # Where the text equals itself one period before, framed by zeros, so that every such stretch has two edges.
        same = np.concatenate(([0], (ids[period:] == ids[:-period]).astype(np.int8), [0]))
        edges = np.flatnonzero(np.diff(same))
        if len(edges) and (edges[1::2] - edges[::2]).max() >= max(3 * period, 18 - period):
            return True
    words = [token for token in tokens if token.isalpha()]
    if len(words) < 80:
        return False
    runs = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    return len(set(runs)) < 0.3 * len(runs)


def languages() -> list[str]:
    """Return the codes of the languages that are known."""
    return list(_identifier().labels)


def other_language(text: str, language: str = "en", known: str = "") -> bool:
    """Return whether a text is in another language, or in part: a tenth of its letters in scripts that are not its own.

    Args:
        text: any length; the words of fewer than twelve say too little, so only their script counts.
        language: code of the language that is wanted.
        known: text whose scripts count as the language's own, as of a question that quotes them.
    """
    scripts = _scripts(text)
    own = _scripts(known + _SAMPLES.get(language, "a"))
    foreign = sum(count for script, count in scripts.items() if script not in own)
    if foreign > 0.1 * sum(scripts.values()):
        return True
    words = re.findall(r"[^\W\d_]{2,}", text)
    if len(words) < _MIN_WORDS:
        return False
    found, confidence = _identifier().classify(" ".join(words))
    return found != language and confidence > 0.9


# A letter of the script for languages that are not written in Latin letters.
_SAMPLES = {
    "zh": "一", "ja": "一かカ", "ko": "가", "ru": "я", "uk": "я", "bg": "я", "sr": "яa", "el": "α", "ar": "ا", "fa": "ا",
    "he": "א", "hi": "अ", "th": "ก", "ta": "அ", "bn": "অ", "ka": "ა", "hy": "ա",
}  # fmt: skip

# First words of the names of letters that stand among Latin ones.
_LATIN_TOO = ("MATHEMATICAL", "FEMININE", "MASCULINE", "MICRO", "DOUBLE-STRUCK")


def _scripts(text: str) -> Counter[str]:
    """Count letters by script; Latin and Greek letters (of formulas) and the like by the first word of their names."""
    if text.isascii():
        return Counter({"LATIN": sum(map(str.isalpha, text))})
    scripts: Counter[str] = Counter()
    for letter, count in Counter(filter(str.isalpha, text)).items():
        script = unicodedata.name(letter, "UNKNOWN").split()[0]
        if script in _LATIN_TOO:
            script = "LATIN"
        scripts[script] += count
    return scripts


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

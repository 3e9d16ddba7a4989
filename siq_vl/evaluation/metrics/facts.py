"""Hallucination, counted: statements that the picture contradicts, not 1 - accuracy."""

import math
import re
from collections.abc import Mapping, Sequence

from siq_vl.data.figures.lexicon import COLORS, ITEMS, LETTERS, MONTHS, OBJECTS, PLACES, SIGNS
from siq_vl.evaluation.metrics.matching import Row
from siq_vl.parsing.answers import TAGS

_NUMBER = "number"
_CHART = {"month": MONTHS, _NUMBER: ()}
# The roles of the words of a fact, by kind of figure; a role that is a number takes any.
_ROLES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "scene": {"place": PLACES, "object": OBJECTS, "color": tuple(COLORS)},
    "columns": _CHART,
    "rows": _CHART,
    "axis": _CHART,
    "receipt": {"item": ITEMS, _NUMBER: ()},
    "sign": {"color": tuple(COLORS), "word": SIGNS},
    "plate": {"color": tuple(COLORS), "letter": LETTERS, _NUMBER: ()},
}
_CASED = frozenset({"word", "letter", "month"})  # "OPEN", not "open"; "May", not "may"
_FULL_NAMES = "January February March April May June July August September October November December"
_FULL_MONTHS = {name: name[:3] for name in _FULL_NAMES.split()}
_CLAUSE = re.compile(r"[,;\n]|[.!?](?=\s|$)|\b(?:and|but|while|whereas)\b")
_WORD = re.compile(r"(?:top|bottom)[- ](?:left|right)|\d+|[^\W\d_]+", re.IGNORECASE)
_DERIVED = re.compile(
    r"[-+*/×·÷\u2212]\s*\d|[<>=≈≤≥]|\b(?:same|different|odd|even|sum|total|difference|together|higher|lower|more|less|fewer"
    r"|most|least|highest|lowest|largest|smallest|plus|minus|equals|how many|which|what|if|or)\b|\d\s+is\s+\d|\?",
    re.IGNORECASE,
)
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "knives": "knife",
    "buses": "bus",
    "mice": "mouse",
    "geese": "goose",
}
_ENDINGS = {
    "emen": "eman",
    "lves": "lf",
    "ies": "y",
    "sses": "ss",
    "shes": "sh",
    "ches": "ch",
    "xes": "x",
}
_RUNNING = re.compile(r"\bso\s+\d+\s*$")  # the best so far, in a search for the largest or smallest
_DENIED = re.compile(r"\b(?:no|not|without|isn't|aren't|there's no)\b", re.IGNORECASE)


def hallucination(output: str, caption: str) -> Row:
    """Fact-level hallucination on drawn figures: of the facts that an output states, those that the picture contradicts.

    Exact, since the caption of a drawn figure lists everything that it shows. A statement is a clause that names at least
    one thing of the figure's kind (in a scene an object, colour or place; in a chart a month; and so on), bound to what it
    is said to have: "star red", "The star is red", "Jan 7", "the top-left ball". It is contradicted if no fact of the
    picture has all of these words; a denial ("no star") if one has. Reasoning from facts (equations, comparisons, "same",
    a running maximum) states none, nor does a bare number or yes. A clause that names two things of one sort ("the star
    is left of the house") is not read and is counted under `unread`; words that no figure of the kind can have are not seen.

    The second view is CHAIR's (Rohrbach et al., 2018): of the *mentions* of things, those that are nowhere in the picture,
    whatever is said of them. It misses what is bound wrongly: "star red" where the star is blue and the ball red.

    Args:
        output: the whole output, rationale and answer, or a caption.
        caption: the figure's true caption, `"kind: fact, fact"`.

    Returns:
        `stated`, `contradicted`, `unread`, `mentioned`, `absent`.
    """
    kind, facts = _facts(caption)
    row = dict.fromkeys(("stated", "contradicted", "unread", "mentioned", "absent"), 0.0)
    for clause in _clauses(output):
        # A caption opens with the kind of its figure, which is a statement too.
        claimed, clause = _claimed_kind(clause)
        if claimed:
            row["stated"] += 1
            row["contradicted"] += claimed != kind
        said = _said(clause, kind)
        things = [pair for pair in said if pair[0] != _NUMBER]
        # Numbers alone say nothing of the picture, and what is derived from facts is no fact.
        if not things or _DERIVED.search(clause):
            continue
        denied = bool(_DENIED.search(clause))
        if not denied:
            row["mentioned"] += len(things)
            for thing in things:
                row["absent"] += not any(thing in fact for fact in facts)
        bound = set(said)
        roles = {role for role, _ in bound}
        # Two things of one sort, as in "the star is left of the house": which word belongs to which is not told.
        if len(roles) < len(bound):
            row["unread"] += 1
            continue
        shown = any(bound <= fact for fact in facts)
        row["stated"] += 1
        # A statement is wrong where nothing shows it, a denial where something does.
        row["contradicted"] += shown == denied
    return row


def hallucination_rates(rows: Sequence[Row]) -> Row:
    """Return rates over all statements, mentions and outputs; NaN where nothing was stated or mentioned.

    Returns:
        `hallucination_rate` (contradicted of stated facts), `hallucinated_outputs` (share of outputs with at least one),
        `chair_i` (absent of mentioned things), `chair_s` (share of outputs that mention one), `stated` (facts an output)
        and `unread` (clauses an output).
    """
    totals = dict.fromkeys(rows[0], 0.0)
    hallucinated = 0
    for row in rows:
        hallucinated += row["contradicted"] > 0
        for name, count in row.items():
            totals[name] += count
    return {
        "hallucination_rate": _ratio(totals["contradicted"], totals["stated"]),
        "hallucinated_outputs": hallucinated / len(rows),
        **chair_rates(rows),
        "stated": totals["stated"] / len(rows),
        "unread": totals["unread"] / len(rows),
    }


def chair(caption: str, objects: Sequence[str], vocabulary: Mapping[str, Sequence[str]] | None = None) -> Row:
    """CHAIR: of the object mentions of a caption, those whose object the picture does not have.

    Words are looked up in lower case, plurals as singulars, longer names before shorter ones ("wine glass" before
    "glass"); every mention counts, as in the paper. The paper's list of MS COCO synonyms is not part of this repo: pass
    yours as `vocabulary`, with the script's pairs ("baby bird" for "bird") among the synonyms. Its one rule on words that
    stand apart, that a toilet's seat is no chair, is left out.

    Source: Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018; `chair.py` of LisaAnne/Hallucination.

    Args:
        caption: any text.
        objects: the picture's objects, by name or synonym; none is a picture without any.
        vocabulary: synonyms by object name; by default the objects, colours and the like of drawn figures.

    Raises:
        ValueError: an object is not in the vocabulary.

    Returns:
        `mentioned`, `absent`.
    """
    if vocabulary is None:
        vocabulary = drawn_vocabulary()
    name_of = _names_by_words(vocabulary)
    shown = set()
    for given in objects:
        name = name_of.get(" ".join(_singulars(given)))
        if name is None:
            raise ValueError(f"object is {given!r}, which the vocabulary lacks; add it, with its synonyms")
        shown.add(name)
    mentions = object_mentions(caption, vocabulary)
    absent = [name for name in mentions if name not in shown]
    return {"mentioned": float(len(mentions)), "absent": float(len(absent))}


def object_mentions(text: str, vocabulary: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the objects that a text mentions, by name, each as often as it does; words are looked up as `chair` says."""
    name_of = _names_by_words(vocabulary)
    longest = max((len(known.split()) for known in name_of), default=1)
    words = _singulars(text)
    mentions = []
    place = 0
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            name = name_of.get(" ".join(words[place : place + length]))
            if name is not None:
                mentions.append(name)
                break
        # Past the name, or past one word that begins none: the loop ends with a length of 1.
        place += length
    return mentions


def _names_by_words(vocabulary: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the name of each object by every way of saying it, in the singular."""
    names = {}
    for name, synonyms in vocabulary.items():
        for known in (name, *synonyms):
            names[" ".join(_singulars(known))] = name
    return names


def chair_rates(rows: Sequence[Row]) -> Row:
    """Return CHAIRi (absent of all mentions; NaN without any) and CHAIRs (captions with at least one of all captions)."""
    absent = mentioned = 0.0
    captions_with_absent = 0
    for row in rows:
        absent += row["absent"]
        mentioned += row["mentioned"]
        captions_with_absent += row["absent"] > 0
    return {"chair_i": _ratio(absent, mentioned), "chair_s": captions_with_absent / len(rows)}


def drawn_vocabulary() -> dict[str, tuple[str, ...]]:
    """Return the objects of drawn scenes and receipts, in the form that `chair` takes."""
    return dict.fromkeys((*OBJECTS, *ITEMS), ())


def _facts(caption: str) -> tuple[str, list[frozenset[tuple[str, str]]]]:
    kind, colon, listed = caption.strip().partition(":")
    if not colon or kind not in _ROLES:
        raise ValueError(
            f"caption is {caption!r}; it must be a drawn figure's, 'kind: fact, fact', of {', '.join(_ROLES)}"
        )
    return kind, [frozenset(_said(fact, kind)) for fact in listed.split(",")]


def _clauses(output: str) -> list[str]:
    for tag in TAGS:
        output = output.replace(tag, "\n")
    return [_RUNNING.sub("", clause) for clause in _CLAUSE.split(output) if clause.strip()]


def _claimed_kind(clause: str) -> tuple[str, str]:
    """Return the kind of figure that a clause opens with, as a caption does, and what follows."""
    kind, colon, rest = clause.strip().partition(":")
    if colon and kind in _ROLES:
        return kind, rest
    return "", clause


def _said(clause: str, kind: str) -> list[tuple[str, str]]:
    """Return the words of a clause that a fact of this kind can have, each with its role."""
    found = []
    words = _WORD.findall(clause)
    for place, word in enumerate(words):
        # "A yellow car" begins with an article, "A 60" with a plate's letter.
        article = word == "A" and place + 1 < len(words) and words[place + 1].islower()
        for role, known in _ROLES[kind].items():
            value = _value(word, role, known)
            if value and not (role == "letter" and article):
                found.append((role, value))
    return found


def _value(word: str, role: str, known: Sequence[str]) -> str | None:
    """Return a word as facts write it, or None where no fact can have it in this role."""
    if role == _NUMBER:
        if not word.isdecimal():
            return None
        return str(int(word))
    forms: tuple[str, ...]
    if role in _CASED:
        forms = (_FULL_MONTHS.get(word, word),)
    else:
        word = word.casefold().replace(" ", "-")
        forms = (word, word.removesuffix("s"))
    for form in forms:
        if form in known:
            return form
    return None


def _singulars(text: str) -> list[str]:
    return [_singular(word) for word in re.findall(r"[^\W_]+", text.casefold())]


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, singular in _ENDINGS.items():
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + singular
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _ratio(part: float, whole: float) -> float:
    if not whole:
        return math.nan
    return part / whole

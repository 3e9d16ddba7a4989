"""Reading a model's output: its rationale, its answer, and the facts that it states."""

import re
from collections import Counter
from dataclasses import dataclass

_THINK = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


@dataclass(frozen=True)
class Parsed:
    """A model's output taken apart; `well_formed` says whether it ran `<think>…</think><answer>…</answer>`."""

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
        closed = all(tag in text for tag in ("<think>", "</think>", "</answer>"))
        return Parsed(rationale, answer.group(1).strip(), closed)
    return Parsed(rationale, "" if think else text, False)


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

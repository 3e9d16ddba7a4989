"""The text that a tiny language model learns the drawn world's words from: more names, and numbers up to a hundred.

As in `text`, keys stand right before their values, and drills of look-ups and of calculations go before conversations.
"""

import re
from random import Random

from siq_vl.data.figures.figure import verdict
from siq_vl.data.figures.rows import CAPTION_PROMPTS, reasoned
from siq_vl.data.world.dataset import rationale, sample
from siq_vl.data.world.figure import NOT_SHOWN
from siq_vl.data.world.lexicon import WORDS
from siq_vl.pretraining.text import READ_FIRST, STEP_BY_STEP, Pieces, TextBatches

LOOK_UP_STEPS = 400  # of phase `world_text`: its first steps hold nothing but look-ups
CALCULATION_STEPS = 600  # the next ones nothing but calculations
LARGEST = 100  # number that a picture shows
_ABSENT_SHARE = 0.1  # of the look-ups whose word is not in the list


def conversation(split: str, index: int, seed: int) -> tuple[str, str]:
    """Return a user turn, a description of a figure and a question about it, and its response."""
    told = sample(split, index, seed=seed)
    rng = Random(f"{told.seed}/text")
    question = rng.choice(told.figure.questions(rng)) if rng.random() < 0.8 else told.question
    way = rng.choice(("direct", "steps", "steps", "read"))
    if way == "direct":
        return f"{told.figure.caption}\n{question.text}", question.answer
    style, instruction = ("terse", STEP_BY_STEP) if way == "steps" else ("structured", READ_FIRST)
    response = reasoned(rationale(told.figure, question, style), question.answer)
    return f"{told.figure.caption}\n{question.text} {instruction}", response


def look_up_drill(split: str, index: int, seed: int) -> Pieces:
    """Return a list of random pairs, and ten times the word that belongs to a known one, or that there is none.

    Any word of the lexicon goes with any other. A row asks for what follows a word, or for what stands before it.
    """
    rng = Random(f"{split}/{seed}/world look up/{index}")
    words = rng.sample(WORDS, 16)
    pairs = list(zip(words[0::2], words[1::2], strict=True))
    pairs, absent = pairs[: rng.randint(2, 7)], pairs[7]
    backwards = rng.random() < 0.5
    pieces: Pieces = [(f"pairs: {', '.join(map(' '.join, pairs))}.", False)]
    for _ in range(10):
        missing = rng.random() < _ABSENT_SHARE
        known, found = absent if missing else rng.choice(pairs)
        if backwards and not missing:
            known, found = found, known
        pieces += [(known, False), (f"{NOT_SHOWN if missing else found}.", True)]
    return pieces


def calculation_drill(split: str, index: int, seed: int) -> Pieces:
    """Return 16 calculations and comparisons as rationales write them, mostly sums and differences."""
    rng = Random(f"{split}/{seed}/world calculate/{index}")
    return [piece for _ in range(16) for piece in _calculation(rng)]


def _calculation(rng: Random) -> Pieces:
    largest = rng.choice((20, 50, LARGEST, LARGEST))
    a, b = rng.sample(range(1, largest + 1), 2)
    kind = rng.choice(("sum", "sum", "sum", "sum", "difference", "difference", "order", "best", "digits", "verdict"))
    if kind == "sum":
        return [(f"{a} + {b} =", False), (f"{a + b}.", True)]
    if kind == "difference":
        return [(f"{max(a, b)} - {min(a, b)} =", False), (f"{abs(a - b)}.", True)]
    if kind == "order":
        return [(f"{a}. {b}. {a}", False), (f"{'>' if a > b else '<'} {b}.", True)]
    if kind == "best":
        word, other = rng.sample(WORDS, 2)
        best = rng.choice((max, min))(a, b)
        way = "highest" if best == max(a, b) else "lowest"
        return [(f"{way}: {word} {a}, {other} {b} so", False), (f"{best}.", True)]
    if kind == "digits":
        tens, ones = divmod(rng.randint(10, 99), 10)
        return [(f"{tens}{ones} is", False), (f"{tens} {ones}.", True)]
    word, other = rng.sample(WORDS, 2)
    *asked, answer = verdict(word, rng.choice((word, other))).split()
    return [(" ".join(asked), False), (f"{answer}.", True)]


class WorldTextBatches(TextBatches):
    """Batches by training step, as `TextBatches`, of the world's text."""

    look_up_drill = staticmethod(look_up_drill)
    calculation_drill = staticmethod(calculation_drill)
    conversation = staticmethod(conversation)


def corpus(rows: int = 60_000) -> list[str]:
    """Return the text that the tokenizer is trained on."""
    texts = ["user\nassistant\n" for _ in range(20)]
    for index in range(rows // 6):
        for drill in (look_up_drill, calculation_drill):
            texts.append(" ".join(text for text, _ in drill("train", index, seed=-1)))
    for split in ("train", "combinations"):  # a language model knows the words of combinations it never sees drawn
        for index in range(rows // 2):
            user, assistant = conversation(split, index, seed=-1)
            texts += [user, re.sub("</?(think|answer)>", "\n", assistant)]
    # Every number that a sum of two can come to is one token.
    texts += [f"{number} {number}" for number in range(2 * LARGEST + 1) for _ in range(20)]
    return [*texts, *CAPTION_PROMPTS * 20]

"""How well a tower reads: characters and words right, by face, and under the disturbances that a reader shrugs off."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from PIL import ImageFilter

from siq_vl.data.world.canvas import RGB, Drawn, Letter, bordered, pixel, turned
from siq_vl.data.world.dataset import DOMAINS, sample
from siq_vl.data.world.fonts import FACES, HELD_OUT_FACES, Face
from siq_vl.data.world.lexicon import WORDS
from siq_vl.data.world.scatter import scattered
from siq_vl.pretraining.reading import PATCH, ReadingTower, label_batch, pixel_batch

_BATCH = 50
Change = Callable[[Drawn], Drawn]


def _moved(pixels: int) -> Change:
    """Move to the right and down; what leaves the picture is lost, and is not asked for."""
    return lambda drawn: bordered(drawn, pixels, pixels, -pixels, -pixels, _corner(drawn))


def _corner(drawn: Drawn) -> RGB:
    return pixel(drawn.image, 0, 0)


def _framed(pixels: int) -> Change:
    return lambda drawn: bordered(drawn, pixels, pixels, pixels, pixels, _corner(drawn))


def _on_twice_the_width(drawn: Drawn) -> Drawn:
    half = drawn.image.width // 2
    return bordered(drawn, half, 0, half, 0, _corner(drawn))


def _blurred(drawn: Drawn) -> Drawn:
    return replace(drawn, image=drawn.image.filter(ImageFilter.GaussianBlur(1)))


def _gray(drawn: Drawn) -> Drawn:
    return replace(drawn, image=drawn.image.convert("L").convert("RGB"))


CHANGES: Mapping[str, Change] = {
    "clean": lambda drawn: drawn,
    "moved by 1 px": _moved(1),
    "moved by 3 px": _moved(3),
    "moved by 6 px": _moved(6),
    "turned by 2 degrees": lambda drawn: turned(drawn, 2, _corner(drawn)),
    "blurred by 1 px": _blurred,
    "border of 12 px": _framed(12),
    "canvas twice as wide": _on_twice_the_width,
    "gray": _gray,
}


def strewn(side: int, count: int, name: str, **options) -> list[Drawn]:
    """Return `count` pictures of words of the lexicon and numbers, strewn as in training but not drawn in it."""
    return [scattered(Random(f"read/{name}/{index}"), side, finished=False, **options) for index in range(count)]


def _logits(module: ReadingTower, pictures: Sequence[Drawn]) -> dict[str, torch.Tensor]:
    """Return the module's logits, in the precision of its training."""
    with torch.autocast("cpu", torch.bfloat16):
        return module(pixel_batch(pictures))


@torch.inference_mode()
def reading_accuracy(module: ReadingTower, pictures: Sequence[Drawn]) -> dict[str, float]:
    """Return the shares of characters and of words read right.

    A character is right if it is the likeliest of its half-patch; a word if all its characters are. Halves into which
    two centres fall count as wrong in both.

    Args:
        module: the tower and its heads, on the CPU.
        pictures: of the tower's size.
    """
    characters = words = right_characters = right_words = 0
    for start in range(0, len(pictures), _BATCH):
        batch = pictures[start : start + _BATCH]
        read = _logits(module, batch)["letters"].argmax(-1)
        labels = label_batch(batch)["letters"]
        for picture, found, wanted in zip(batch, read, labels, strict=True):
            for letters in _words_inside(picture):
                places = [(_patch(letter, module.side), int(letter.x // (PATCH / 2)) % 2) for letter in letters]
                hits = [bool(found[place] == wanted[place]) for place in places]
                if len(set(places)) < len(places):
                    hits = [False] * len(places)
                characters, right_characters = characters + len(hits), right_characters + sum(hits)
                words, right_words = words + 1, right_words + all(hits)
    return {"characters": right_characters / max(1, characters), "words": right_words / max(1, words), "asked": words}


def _words_inside(picture: Drawn) -> list[list[Letter]]:
    """Return the words that lie in the picture with all their centres, each as its letters."""
    words: dict[int, list[Letter]] = defaultdict(list)
    for letter in picture.letters:
        words[letter.word].append(letter)
    width, height = picture.image.size
    return [
        letters
        for letters in words.values()
        if all(0 <= letter.x < width and 0 <= letter.y < height for letter in letters)
    ]


def _patch(letter: Letter, side: int) -> int:
    return int(letter.y // PATCH) * (side // PATCH) + int(letter.x // PATCH)


@torch.inference_mode()
def fact_accuracy(module: ReadingTower, pictures: Sequence[Drawn]) -> dict[str, float]:
    """Return how well the words of facts are read from the cells that belong to any.

    Returns:
        `cells`: the share of them whose set of words is exactly right; `recall` and `precision` of the single words in
        them; `asked`: their number.
    """
    right = asked = hits = named = present = 0
    for start in range(0, len(pictures), _BATCH):
        batch = pictures[start : start + _BATCH]
        read = _logits(module, batch)["facts"] > 0
        wanted = label_batch(batch)["facts"] > 0
        belongs = wanted.any(-1)
        right += int((read == wanted).all(-1)[belongs].sum())
        asked += int(belongs.sum())
        hits += int((read & wanted)[belongs].sum())
        named += int(read[belongs].sum())
        present += int(wanted[belongs].sum())
    return {
        "cells": right / max(1, asked),
        "recall": hits / max(1, present),
        "precision": hits / max(1, named),
        "asked": asked,
    }


def measured(
    module: ReadingTower, count: int = 200, fonts: Sequence[str] = ()
) -> dict[str, dict[str, dict[str, float]]]:
    """Return what a tower reads, on pictures that it was not trained on.

    Args:
        module: the tower and its heads.
        count: pictures for each row.
        fonts: paths of further fonts to read, TrueType.

    Returns:
        By table and row: `faces` and `changes` of strewn words and numbers of the lexicon; `changed facts` of the test
        split's figures under the same changes, and `facts` by domain and look.
    """
    side = module.side
    faces = {}
    for face in (*FACES, *HELD_OUT_FACES):
        name = f"{face.family}, {face.file}" + (" (held out)" if face in HELD_OUT_FACES else "")
        faces[name] = reading_accuracy(module, strewn(side, count, "faces", words=WORDS, faces=(face,)))
    for path in fonts:
        face = Face("foreign", str(Path(path).absolute()))
        faces[Path(path).name] = reading_accuracy(module, strewn(side, count, "faces", words=WORDS, faces=(face,)))
    changes, changed_facts = {}, {}
    pictures = strewn(side, count, "changes", words=WORDS)
    figures = [sample("test", index, seed=-1, hard=False).drawn.resized(side, side) for index in range(count)]
    for name, change in CHANGES.items():
        changes[name] = reading_accuracy(module, [change(picture).resized(side, side) for picture in pictures])
        changed_facts[name] = fact_accuracy(module, [change(picture).resized(side, side) for picture in figures])
    facts = {}
    for look in ("trained", "fonts", "styles", "matplotlib", "matplotlib styles"):
        for domain in DOMAINS if look in ("trained", "fonts") else ("charts",):
            for hard in (False, True) if domain == "charts" else (False,):
                samples = [
                    sample("test", index, seed=-1, domain=domain, hard=hard, look=look) for index in range(count)
                ]
                name = f"{domain}{', values off the axis' if hard else ''}, {look}"
                facts[name] = fact_accuracy(module, [each.drawn.resized(side, side) for each in samples])
    return {"faces": faces, "changes": changes, "changed facts": changed_facts, "facts": facts}

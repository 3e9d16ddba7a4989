"""Pictures of nothing that was ever taught: textures, to which every question is answered with `NOT_SHOWN`."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

import numpy as np
from PIL import Image, ImageFilter

from siq_vl.data.figures.figure import Fact, Question
from siq_vl.data.world.canvas import Drawn
from siq_vl.data.world.figure import NATIVE, Figure, Look, unanswerable

_KINDS = ("noise", "waves", "smear", "blank")


@dataclass(frozen=True)
class Nothing(Figure):
    """A texture, by a number that decides it, and the question that somebody asks about it."""

    number: int
    asked: str

    domain: ClassVar[str] = "nothing"
    kind: ClassVar[str] = "nothing"

    @classmethod
    def sample(cls, rng: Random) -> Self:
        raise NotImplementedError("what is asked about a texture is taken from other figures: see `dataset.sample`")

    @property
    def facts(self) -> tuple[Fact, ...]:
        return ()

    @property
    def caption(self) -> str:
        return "nothing known"

    @property
    def content(self) -> str:
        return f"nothing: {self.number}"

    def questions(self, rng: Random) -> list[Question]:
        return [unanswerable(self.asked, "such thing")]

    def paint(self, look: Look, rng: Random) -> Drawn:
        side = NATIVE * 3 if look.large else NATIVE
        random = np.random.default_rng(self.number)
        kind = _KINDS[self.number % len(_KINDS)]
        if kind == "blank":
            pixels = np.full((side, side, 3), random.integers(0, 256, 3))
        elif kind == "waves":
            # Whole numbers throughout: sines of the platform's own library differ in the last bit.
            steps = np.arange(side)
            across, down = random.integers(2, 9, 2)
            tone = (across * steps[None, :] + down * steps[:, None]) % 256
            pixels = (tone[..., None] * random.integers(40, 256, 3)) // 255
        else:
            coarse = int(random.choice((4, 8, 16, side)))
            pixels = random.integers(0, 256, (coarse, coarse, 3))
        image = Image.fromarray(pixels.astype(np.uint8))
        image = image.resize((side, side), Image.Resampling.BILINEAR if kind == "smear" else Image.Resampling.NEAREST)
        if kind == "noise":
            image = image.filter(ImageFilter.GaussianBlur(int(random.integers(0, 4))))
        return Drawn(image, (), ())

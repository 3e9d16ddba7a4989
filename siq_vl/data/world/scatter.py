"""Words strewn over a picture, with no meaning: what a tower learns its letters from."""

from random import Random

from siq_vl.data.world.canvas import RGB, Box, Canvas, Drawn, finish
from siq_vl.data.world.fonts import CHARACTERS, FACES, Face, text_width
from siq_vl.data.world.lexicon import NUMBERS, WORDS

_READ = tuple(word for word in WORDS if word not in NUMBERS)
_TRIES = 40


def paper_and_ink(rng: Random) -> tuple[RGB, RGB]:
    """Return a background and an ink of another brightness: mostly dark on light, a quarter the other way round."""
    while True:
        paper, ink = _any_color(rng), _any_color(rng)
        if rng.random() < 0.4:
            paper = (rng.randint(235, 255),) * 3
        if rng.random() < 0.4:
            ink = (rng.randint(0, 60),) * 3
        brightness = [0.3 * red + 0.59 * green + 0.11 * blue for red, green, blue in (paper, ink)]
        if abs(brightness[0] - brightness[1]) > 90 and (brightness[0] > brightness[1] or rng.random() < 0.25):
            return paper, ink


def _any_color(rng: Random) -> RGB:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def word(rng: Random) -> str:
    """Return a word of the lexicon in its own, upper or lower case, a number, or random characters."""
    kind = rng.random()
    if kind < 0.45:
        chosen = rng.choice(_READ)
        return chosen if rng.random() < 0.8 else rng.choice((chosen.upper(), chosen.capitalize(), chosen.lower()))
    if kind < 0.75:
        return str(rng.randint(0, 100))
    if kind < 0.82:
        return f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}"
    return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(1, 7)))


def scattered(
    rng: Random, side: int, *, faces: tuple[Face, ...] = FACES, words: tuple[str, ...] = (), finished: bool = True
) -> Drawn:
    """Return a square picture with as many words as find room, none over another.

    Args:
        rng: decides everything.
        side: of the picture the tower sees, in pixels; the drawn one is up to half as large again, with free aspect.
        faces: to choose from, one or two for each picture.
        words: to choose from; by default `word` makes them.
        finished: blur, noise and the like; see `canvas.finish`.
    """
    width, height = (round(side * rng.choice((1, 1, rng.uniform(0.8, 1.6)))) for _ in range(2))
    paper, ink = paper_and_ink(rng)
    canvas = Canvas(width, height, paper)
    _clutter(canvas, rng)
    largest = rng.choice((12, 14, 18, 24, 34))
    scale = (width / side * height / side) ** 0.5  # of the letters, so that they keep their size on average
    chosen = rng.choices(faces, k=rng.choice((1, 1, 2)))
    taken: list[Box] = []
    wanted = rng.randint(1, 12)
    for _ in range(_TRIES):
        text = rng.choice(words) if words else word(rng)
        size = round(scale * rng.uniform(8.5, largest))
        face = rng.choice(chosen)
        wide = text_width(text, face, size)
        if wide > width or size > height:
            continue
        x, y = rng.uniform(0, width - wide), rng.uniform(size / 2, height - size / 2)
        if any(_overlap((x - 2, y - 0.55 * size, x + wide + 2, y + 0.5 * size), other) for other in taken):
            continue
        taken.append(canvas.write(x, y, text, face, size, ink))
        if len(taken) == wanted:
            break
    drawn = canvas.drawn
    return (finish(drawn, rng, paper) if finished else drawn).resized(side, side)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _clutter(canvas: Canvas, rng: Random) -> None:
    """Draw what a reader has to look past: panels and lines in colours near the background's."""
    if rng.random() < 0.6:
        return
    width, height = canvas.image.size
    for _ in range(rng.randint(1, 5)):
        tone = tuple(min(255, max(0, channel + rng.randint(-40, 40))) for channel in canvas.background)
        xs = sorted(rng.randint(0, width) for _ in range(2))
        ys = sorted(rng.randint(0, height) for _ in range(2))
        if rng.random() < 0.4:
            canvas.pen.rectangle((xs[0], ys[0], xs[1], ys[1]), fill=tone)
        else:
            canvas.pen.line((xs[0], ys[0], xs[1], ys[0]), fill=tone, width=rng.randint(1, 2))

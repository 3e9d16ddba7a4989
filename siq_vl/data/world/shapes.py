"""The objects of scenes, as outlines on a square that reaches from -100 to 100 either way, y downwards."""

from PIL import ImageDraw

from siq_vl.data.world.canvas import RGB

Points = tuple[tuple[int, int], ...]

# In the object's own colour, back to front. A polygon is its corners; an ellipse its box, as two corners.
POLYGONS: dict[str, tuple[Points, ...]] = {
    "star": (((0, -100), (24, -32), (95, -31), (38, 12), (59, 81), (0, 40), (-59, 81), (-38, 12), (-95, -31), (-24, -32)),),
    "house": (((-75, -10), (75, -10), (75, 95), (-75, 95)), ((-100, -10), (0, -95), (100, -10))),
    "tree": (((-70, -5), (0, -100), (70, -5)), ((-95, 60), (0, -45), (95, 60))),
    "fish": (((30, 0), (100, -60), (100, 60)),),
    "boat": (((-100, 30), (100, 30), (55, 95), (-55, 95)), ((-8, 20), (-8, -100), (85, 20))),
    "cup": (((-75, -70), (50, -70), (35, 85), (-60, 85)),),
    "kite": (((0, -100), (65, -25), (0, 70), (-65, -25)),),
    "square": (((-78, -78), (78, -78), (78, 78), (-78, 78)),),
    "triangle": (((0, -90), (95, 75), (-95, 75)),),
    "heart": (((0, 90), (-88, -5), (-94, -40), (-75, -72), (-45, -80), (-15, -65), (0, -38), (15, -65), (45, -80), (75, -72), (94, -40), (88, -5)),),
    "moon": (((30, -95), (-30, -85), (-75, -40), (-85, 10), (-65, 60), (-20, 92), (35, 95), (75, 65), (30, 60), (-5, 30), (-20, -15), (-8, -60)),),
    "arrow": (((-95, -28), (15, -28), (15, -80), (98, 0), (15, 80), (15, 28), (-95, 28)),),
    "cross": (((-32, -92), (32, -92), (32, -32), (92, -32), (92, 32), (32, 32), (32, 92), (-32, 92), (-32, 32), (-92, 32), (-92, -32), (-32, -32)),),
    "flag": (((-60, -90), (90, -60), (-60, -10)),),
}  # fmt: skip
ELLIPSES: dict[str, Points] = {"ball": ((-92, -92), (92, 92)), "fish": ((-100, -55), (50, 55))}
# Details in ink or in the background's colour, on top.
_INK_LINES: dict[str, Points] = {
    "tree": ((0, 60), (0, 100)),
    "boat": ((-8, 30), (-8, -100)),
    "kite": ((0, 70), (35, 100)),
    "flag": ((-62, -95), (-62, 100)),
}
_HOLES: dict[str, Points] = {"house": ((-22, 35), (22, 95)), "fish": ((-72, -22), (-56, -6))}
_HOLLOW: dict[str, Points] = {"ring": ((-90, -90), (90, 90)), "cup": ((20, -40), (95, 40))}


def paint(
    pen: ImageDraw.ImageDraw,
    name: str,
    x: float,
    y: float,
    radius: float,
    fill: RGB,
    ink: RGB,
    background: RGB,
    line: int,
) -> None:
    """Paint an object about (x, y).

    Args:
        pen: of the picture.
        name: one of `lexicon.OBJECTS`.
        x: of the middle, in pixels.
        y: of the middle, in pixels.
        radius: half of the object's size, in pixels.
        fill: its colour.
        ink: of outline and details.
        background: seen through its holes.
        line: width of the outline in pixels, 0 for none.
    """

    def at(points: Points) -> list[tuple[float, float]]:
        return [(x + dx * radius / 100, y + dy * radius / 100) for dx, dy in points]

    outline = ink if line else fill
    if name in _HOLLOW:
        band = max(2, round(radius * (0.38 if name == "ring" else 0.16)))
        pen.ellipse(at(_HOLLOW[name]), outline=fill, width=band)
        if line and name == "ring":
            inner = [
                (left + band * sign, top + band * sign)
                for (left, top), sign in zip(at(_HOLLOW[name]), (1, -1), strict=True)
            ]
            pen.ellipse(at(_HOLLOW[name]), outline=ink, width=line)
            pen.ellipse(inner, outline=ink, width=line)
    if name in _INK_LINES:
        pen.line(at(_INK_LINES[name]), fill=ink, width=max(1, round(radius * 0.1)))
    for corners in POLYGONS.get(name, ()):
        pen.polygon(at(corners), fill=fill, outline=outline, width=max(1, line))
    if name in ELLIPSES:
        pen.ellipse(at(ELLIPSES[name]), fill=fill, outline=outline, width=max(1, line))
    if name in _HOLES:
        pen.rectangle(at(_HOLES[name]), fill=background, outline=outline)

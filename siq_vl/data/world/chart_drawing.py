"""How charts are drawn: freely placed, in many styles, two or three of each kind kept out of training."""

import math
from dataclasses import dataclass
from random import Random

from siq_vl.data.world.canvas import RGB, Box, Canvas
from siq_vl.data.world.figure import Look, Page, blank, contrast, ink_on, palette
from siq_vl.data.world.fonts import text_width

Entries = tuple[tuple[str, int], ...]

BAR_STYLES = ("filled", "outlined", "striped", "thin", "joined")
UNSEEN_BAR_STYLES = ("hollow", "lollipop")
LINE_STYLES = ("dots", "squares", "plain")
UNSEEN_LINE_STYLES = ("area", "diamonds")
PIE_STYLES = ("plain", "outlined", "gaps")
UNSEEN_PIE_STYLES = ("ring",)
_SMALLEST = 8.5  # native pixels; letters are never smaller, unless they would not fit


def fitting(texts: list[str], room: float, page: Page, wanted: int) -> int:
    """Return the largest size, at most `wanted`, in which every text is at most `room` pixels wide."""
    smallest = max(6, round(0.75 * _SMALLEST * page.unit))
    size = wanted
    while size > smallest and max(text_width(text, page.face, size) for text in texts) > room:
        size -= 1
    return size


@dataclass
class _Plot:
    """The rectangle between the axes, in pixels, and what is on the value axis."""

    left: float
    top: float
    right: float
    bottom: float


def _letter_size(page: Page, rng: Random) -> int:
    return round(page.unit * rng.choice((9.5, 10, 11, 12, 13)))


def _title(page: Page, title: str, size: int, rng: Random) -> float:
    """Write the title over the area, and return the height where the rest begins."""
    left, top, right, _ = page.area
    if not title:
        return top
    large = min(round(size * rng.uniform(1.0, 1.35)), round(0.9 * (right - left) / max(1, len(title)) / 0.6))
    middle = top + 0.6 * large
    align = rng.choice((0.0, 0.5, 0.5))
    x = left + align * (right - left)
    page.canvas.write(x, middle, title, page.face, large, page.ink, align=align, facts=("title", title))
    return top + 1.25 * large


def _ticks(top: int, rng: Random) -> list[int]:
    """Return the values at which the axis has numbers: four or five equal steps."""
    parts = {10: (2, 5), 20: (4, 5), 40: (4,), 50: (5,), 100: (4, 5)}[top]
    count = rng.choice(parts)
    return [top * index // count for index in range(count + 1)]


def _axis_tone(page: Page) -> RGB:
    """Return a colour for grid lines: a third of the way from the background to the ink."""
    red, green, blue = (
        round(below + 0.25 * (above - below)) for below, above in zip(page.canvas.background, page.ink, strict=True)
    )
    return red, green, blue


def draw_bars(
    entries: Entries, top: int, printed: bool, title: str, look: Look, rng: Random, *, upright: bool
) -> Canvas:
    """Draw bars, upright or lying; see `charts.Chart` for the arguments."""
    page = blank(look, rng)
    size = _letter_size(page, rng)
    left, _, right, bottom = page.area
    start = _title(page, title, size, rng)
    labels = [label for label, _ in entries]
    with_axis = not printed or rng.random() < 0.35
    grid = with_axis and rng.random() < (0.85 if not printed else 0.5)
    where = rng.choice(("end", "end", "end", "inside", "label")) if printed else "none"
    value_size = max(round(0.85 * size), round(_SMALLEST * page.unit))
    if upright:
        axis_room = text_width(str(top), page.face, value_size) + 3 * page.unit if with_axis else 2
        slot = (right - left - axis_room) / len(entries)
        size = fitting(labels, 0.96 * slot, page, size)
        label_room = 1.2 * size * (2 if where == "label" else 1)
        head = 1.15 * value_size if where == "end" else 0.5 * value_size
        plot = _Plot(left + axis_room, start + head, right, bottom - label_room - 2 * page.unit)
    else:
        label_room = max(
            text_width(label, page.face, fitting(labels, 0.42 * (right - left), page, size)) for label in labels
        )
        size = fitting(labels, 0.42 * (right - left), page, size)
        if where == "label":
            label_room += text_width(f" {top}", page.face, size)
        tail = text_width(str(top), page.face, value_size) + 4 * page.unit if where == "end" else 0.5 * value_size
        foot = 1.3 * value_size if with_axis else 2
        plot = _Plot(left + label_room + 4 * page.unit, start + 2, right - tail, bottom - foot)
        slot = (plot.bottom - plot.top) / len(entries)
        size = min(size, max(6, round(0.95 * slot)))
        value_size = min(value_size, size)
    _axis(page, plot, top, value_size, rng, upright=upright, numbers=with_axis, grid=grid)
    styles = UNSEEN_BAR_STYLES if look.charts == "unseen" else BAR_STYLES
    style = rng.choice(styles)
    share = {"thin": 0.3, "joined": 1.0, "lollipop": 0.34}.get(style, rng.uniform(0.45, 0.85))
    if where == "inside":
        share = max(share, 0.75)
    fills = palette(rng, len(entries), page.canvas.background)
    span = (plot.bottom - plot.top) if upright else (plot.right - plot.left)
    for index, ((label, value), fill) in enumerate(zip(entries, fills, strict=True)):
        fact = (label, str(value))
        length = span * value / top
        centre = (plot.left if upright else plot.top) + (index + 0.5) * slot
        half = 0.5 * share * slot
        if upright:
            box = (centre - half, plot.bottom - length, centre + half, plot.bottom)
        else:
            box = (plot.left, centre - half, plot.left + length, centre + half)
        page.canvas.mark(box, facts=fact)
        reached = _bar(page, box, fill, style, upright)
        _label_bar(page, plot, reached, centre, label, value, where, size, value_size, fill, style, upright)
    return page.canvas


def _label_bar(
    page: Page, plot: _Plot, box: Box, centre: float, label: str, value: int, where: str,
    size: int, value_size: int, fill: RGB, style: str, upright: bool,
) -> None:  # fmt: skip
    """Write a bar's label beside the axis, and its value where the chart has it."""
    fact = (label, str(value))
    write, face, ink, text = page.canvas.write, page.face, page.ink, str(value)
    gap = 2.5 * page.unit
    if upright:
        write(centre, plot.bottom + gap + 0.55 * size, label, face, size, ink, align=0.5, facts=fact)
        if where == "label":
            write(centre, plot.bottom + gap + 1.7 * size, text, face, size, ink, align=0.5, facts=fact)
        room = box[3] - box[1] > 1.2 * value_size and style not in ("hollow", "lollipop", "striped")
        if where == "inside" and room and text_width(text, page.face, value_size) < box[2] - box[0]:
            write(centre, box[1] + 0.75 * value_size, text, face, value_size, ink_on(fill), align=0.5, facts=fact)
        elif where in ("end", "inside"):
            write(centre, box[1] - 0.55 * value_size - gap / 2, text, face, value_size, ink, align=0.5, facts=fact)
        return
    described = f"{label} {text}" if where == "label" else label
    write(plot.left - gap, centre, described, face, size, ink, align=1.0, facts=fact)
    wide = text_width(text, page.face, value_size)
    if where == "inside" and box[2] - box[0] > wide + gap and style not in ("hollow", "lollipop", "striped"):
        write(box[2] - gap / 2, centre, text, face, value_size, ink_on(fill), align=1.0, facts=fact)
    elif where in ("end", "inside"):
        write(box[2] + gap, centre, text, face, value_size, ink, facts=fact)


def _axis(
    page: Page, plot: _Plot, top: int, size: int, rng: Random, *, upright: bool, numbers: bool, grid: bool
) -> None:
    """Draw the axes: the base line, and where wanted the value axis with its numbers and grid lines."""
    pen, gap = page.canvas.pen, 2.5 * page.unit
    tone = _axis_tone(page)
    small_ticks = rng.random() < 0.5
    ticks = _ticks(top, rng) if numbers else []
    if not upright and len(ticks) * 1.3 * text_width(str(top), page.face, size) > plot.right - plot.left:
        ticks = [0, top]  # the others would not fit beside each other
    for tick in ticks:
        if upright:
            y = plot.bottom - (plot.bottom - plot.top) * tick / top
            if grid:
                pen.line((plot.left, y, plot.right, y), fill=tone, width=max(1, page.line // 2))
            if small_ticks:
                pen.line((plot.left - gap, y, plot.left, y), fill=page.ink, width=page.line)
            page.canvas.write(plot.left - gap - 1, y, str(tick), page.face, size, page.ink, align=1.0)
        else:
            x = plot.left + (plot.right - plot.left) * tick / top
            if grid:
                pen.line((x, plot.top, x, plot.bottom), fill=tone, width=max(1, page.line // 2))
            if small_ticks:
                pen.line((x, plot.bottom, x, plot.bottom + gap), fill=page.ink, width=page.line)
            page.canvas.write(x, plot.bottom + gap + 0.6 * size, str(tick), page.face, size, page.ink, align=0.5)
    frame = rng.random()
    if frame < 0.15:
        pen.rectangle((plot.left, plot.top, plot.right, plot.bottom), outline=page.ink, width=page.line)
        return
    if upright or frame < 0.4:
        pen.line((plot.left, plot.bottom, plot.right, plot.bottom), fill=page.ink, width=page.line)
    if not upright or frame < 0.6:
        pen.line((plot.left, plot.top, plot.left, plot.bottom), fill=page.ink, width=page.line)


def _bar(page: Page, box: Box, fill: RGB, style: str, upright: bool) -> Box:
    """Draw a bar in the box, and return the box of what was drawn: a knob at the end reaches further."""
    pen, ink, line = page.canvas.pen, page.ink, page.line
    left, top, right, bottom = box
    if style == "lollipop":
        across, down = (left + right) / 2, (top + bottom) / 2
        radius = max(2.5 * page.unit, 0.5 * min(right - left, bottom - top, 8 * page.unit))
        x, y = (across, top) if upright else (right, down)
        start = (across, bottom) if upright else (left, down)
        pen.line((*start, x, y), fill=fill, width=2 * line)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return (left, y - radius, right, bottom) if upright else (left, top, x + radius, bottom)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    if style == "hollow":
        pen.rectangle((left, top, right, bottom), outline=fill, width=line + 1)
        return box
    pen.rectangle((left, top, right, bottom), fill=fill, outline=ink if style == "outlined" else None, width=line)
    if style == "striped":
        step = max(3, round(4 * page.unit))
        tone = ink_on(fill)
        for y in range(round(top) + step, round(bottom), step) if upright else ():
            pen.line((left, y, right, y), fill=tone)
        for x in range(round(left) + step, round(right), step) if not upright else ():
            pen.line((x, top, x, bottom), fill=tone)
    return box


def draw_line(entries: Entries, top: int, printed: bool, title: str, look: Look, rng: Random) -> Canvas:
    """Draw points joined by a line; see `charts.Chart` for the arguments."""
    page = blank(look, rng)
    size = _letter_size(page, rng)
    left, _, right, bottom = page.area
    start = _title(page, title, size, rng)
    labels = [label for label, _ in entries]
    with_axis = not printed or rng.random() < 0.5
    value_size = max(round(0.85 * size), round(_SMALLEST * page.unit))
    axis_room = text_width(str(top), page.face, value_size) + 4 * page.unit if with_axis else 2
    slot = (right - left - axis_room) / len(entries)
    size = fitting(labels, 0.96 * slot, page, size)
    plot = _Plot(left + axis_room, start + 1.3 * value_size, right, bottom - 1.3 * size - 2 * page.unit)
    _axis(page, plot, top, value_size, rng, upright=True, numbers=with_axis, grid=with_axis and rng.random() < 0.7)
    style = rng.choice(UNSEEN_LINE_STYLES if look.charts == "unseen" else LINE_STYLES)
    fill = palette(rng, 1, page.canvas.background)[0]
    points = []
    for index, (_, value) in enumerate(entries):
        x = plot.left + (index + 0.5) * slot
        points.append((x, plot.bottom - (plot.bottom - plot.top) * value / top))
    if style == "area":
        feet = [(points[-1][0], plot.bottom), (points[0][0], plot.bottom)]
        page.canvas.pen.polygon([*points, *feet], fill=_axis_tone(page))
    page.canvas.pen.line(points, fill=fill, width=page.line + round(rng.choice((0, 0, 1)) * page.unit), joint="curve")
    radius = page.unit * rng.uniform(1.5, 3.2)
    for index, ((x, y), (label, value)) in enumerate(zip(points, entries, strict=True)):
        fact = (label, str(value))
        _marker(page, x, y, radius, fill, style)
        page.canvas.mark((x - radius, y - radius, x + radius, y + radius), facts=fact)
        page.canvas.write(
            x, plot.bottom + 2.5 * page.unit + 0.55 * size, label, page.face, size, page.ink, align=0.5, facts=fact
        )
        if printed:
            # Above the point, or below it where the line comes down from above on both sides.
            around = [points[other][1] for other in (index - 1, index + 1) if 0 <= other < len(points)]
            below = all(other < y for other in around) and y + 1.4 * value_size + radius < plot.bottom
            offset = (0.6 * value_size + radius + 1) * (1 if below else -1)
            page.canvas.write(x, y + offset, str(value), page.face, value_size, page.ink, align=0.5, facts=fact)
    return page.canvas


def _marker(page: Page, x: float, y: float, radius: float, fill: RGB, style: str) -> None:
    pen = page.canvas.pen
    if style == "dots":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif style == "squares":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif style == "diamonds":
        reach = 1.5 * radius
        pen.polygon([(x, y - reach), (x + reach, y), (x, y + reach), (x - reach, y)], fill=fill)


def draw_pie(entries: Entries, title: str, look: Look, rng: Random) -> Canvas:
    """Draw slices; see `charts.Chart` for the arguments."""
    page = blank(look, rng)
    canvas, size = page.canvas, _letter_size(page, rng)
    left, _, right, bottom = page.area
    start = _title(page, title, size, rng)
    percent = "%" if sum(value for _, value in entries) == 100 and rng.random() < 0.8 else ""
    described = [f"{label} {value}{percent}" for label, value in entries]
    layout = rng.choice(("around", "legend", "legend"))
    width, height = right - left, bottom - start
    if layout == "around":
        # Label over value, beside the slice's middle.
        texts = [label for label, _ in entries]
        size = fitting(texts, 0.28 * width, page, size)
        wide = max(text_width(text, page.face, size) for text in texts)
        radius = max(0.18 * min(width, height), min(0.5 * width - wide - 2 * page.unit, 0.5 * height - 2.2 * size))
        x, y = (left + right) / 2, (start + bottom) / 2
    elif width > 0.9 * height:
        size = min(fitting(described, 0.5 * width, page, size), max(6, round(0.9 * height / len(entries))))
        wide = max(text_width(text, page.face, size) for text in described) + 1.2 * size
        radius = max(0.14 * width, min(0.5 * height, 0.5 * (width - wide) - 2 * page.unit))
        x, y = (left + radius, (start + bottom) / 2)
    else:
        size = fitting(described, 0.8 * width, page, size)
        high = 1.25 * size * len(entries)
        radius = max(0.14 * height, min(0.5 * width, 0.5 * (height - high) - 2 * page.unit))
        x, y = (left + right) / 2, start + radius
    fills = _slice_fills(page, len(entries), rng)
    style = rng.choice(UNSEEN_PIE_STYLES if look.charts == "unseen" else PIE_STYLES)
    angle = rng.uniform(0, 360)
    whole = sum(value for _, value in entries)
    box = (x - radius, y - radius, x + radius, y + radius)
    taken: list[Box] = []
    for (label, value), fill in zip(entries, fills, strict=True):
        fact = (label, str(value))
        turn = 360 * value / whole
        edge = {"plain": None, "ring": None, "outlined": page.ink, "gaps": canvas.background}[style]
        canvas.pen.pieslice(box, angle, angle + turn, fill=fill, outline=edge, width=page.line)
        middle = math.radians(angle + turn / 2)
        dx, dy = math.cos(middle), math.sin(middle)
        inner = (x + 0.6 * radius * dx, y + 0.6 * radius * dy)
        canvas.mark((inner[0] - 1, inner[1] - 1, inner[0] + 1, inner[1] + 1), facts=fact)
        if layout == "around":
            _write_around(page, (x, y), radius, (dx, dy), label, f"{value}{percent}", size, taken)
        angle += turn
    if style == "ring":
        hole = 0.5 * radius
        canvas.pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=canvas.background)
    if layout == "legend":
        top = (
            start + max(0, (height - 1.25 * size * len(entries)) / 2)
            if width > 0.9 * height
            else y + radius + 0.3 * size
        )
        edge = x + radius + 4 * page.unit if width > 0.9 * height else left
        _legend(page, edge, top, [(text, fact, fill) for text, fact, fill in zip(described, ((label, str(value)) for label, value in entries), fills, strict=True)], size)  # fmt: skip
    return canvas


def _write_around(
    page: Page, centre: tuple[float, float], radius: float, way: tuple[float, float], label: str, value: str, size: int,
    taken: list[Box],
) -> None:  # fmt: skip
    """Write a slice's label over its value outside the slice, moved outwards and along where there is writing."""
    dx, dy = way
    half = max(text_width(text, page.face, size) for text in (label, value)) / 2
    x = centre[0] + (radius + half + 2 * page.unit) * dx
    y = centre[1] + (radius + 1.1 * size) * dy
    width, height = page.canvas.image.size
    x, y = min(max(x, half + 1), width - half - 1), min(max(y, 1.2 * size), height - 1.2 * size)
    for shift in (0, 1, -1, 2, -2, 3, -3):
        moved = y + 0.8 * size * shift
        box = (x - half, moved - 1.15 * size, x + half, moved + 1.1 * size)
        if box[1] >= 0 and box[3] <= height and not any(_overlap(box, other) for other in taken):
            y = moved
            break
    taken.append((x - half, y - 1.15 * size, x + half, y + 1.1 * size))
    fact = (label, value.rstrip("%"))
    page.canvas.write(x, y - 0.55 * size, label, page.face, size, page.ink, align=0.5, facts=fact)
    page.canvas.write(x, y + 0.55 * size, value, page.face, size, page.ink, align=0.5, facts=fact)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _slice_fills(page: Page, count: int, rng: Random) -> list[RGB]:
    """Return fills that can be told apart from each other, as slices and parts need them."""
    while True:
        fills = palette(rng, count, page.canvas.background)
        if all(contrast(one, other) > 60 for index, one in enumerate(fills) for other in fills[:index]):
            return fills


def _legend(page: Page, left: float, top: float, rows: list[tuple[str, tuple[str, ...], RGB]], size: int) -> None:
    """Write one line for each row, behind a swatch of its colour."""
    swatch = 0.7 * size
    for index, (text, fact, fill) in enumerate(rows):
        y = top + (index + 0.5) * 1.25 * size
        page.canvas.pen.rectangle((left, y - swatch / 2, left + swatch, y + swatch / 2), fill=fill)
        page.canvas.write(left + 1.4 * swatch, y, text, page.face, size, page.ink, facts=fact)


def draw_stack(
    columns: tuple[str, ...],
    parts: tuple[str, str],
    values: tuple[tuple[int, int], ...],
    top: int,
    look: Look,
    rng: Random,
) -> Canvas:
    """Draw stacked columns with printed values; see `charts.StackedChart`."""
    page = blank(look, rng)
    size = _letter_size(page, rng)
    left, start, right, bottom = page.area
    fills = _slice_fills(page, 2, rng)
    size = fitting([f"{parts[0]} {parts[1]}"], 0.7 * (right - left), page, size)
    edge = left
    for part, fill in zip(parts, fills, strict=True):
        _legend(page, edge, start, [(part, (part,), fill)], size)
        edge += text_width(part, page.face, size) + 2 * size
    plot = _Plot(left + 1, start + 1.8 * size, right, bottom - 1.4 * size)
    slot = (plot.right - plot.left) / len(columns)
    _axis(page, plot, top, size, rng, upright=True, numbers=False, grid=False)
    half = slot * rng.uniform(0.25, 0.45)
    for index, (column, pair) in enumerate(zip(columns, values, strict=True)):
        centre, foot = plot.left + (index + 0.5) * slot, plot.bottom
        facts: list[str] = [column]
        for part, value, fill in zip(parts, pair, fills, strict=True):
            fact = (column, part, str(value))
            facts += fact[1:]
            length = (plot.bottom - plot.top) * value / top
            box = (centre - half, foot - length, centre + half, foot)
            page.canvas.pen.rectangle(box, fill=fill, outline=page.ink if rng.random() < 0.3 else None)
            page.canvas.mark(box, facts=fact)
            fits = min(size, max(6, round(0.95 * length)))
            page.canvas.write(
                centre, foot - length / 2, str(value), page.face, fits, ink_on(fill), align=0.5, facts=fact
            )
            foot -= length
        below = plot.bottom + 2.5 * page.unit + 0.5 * size
        page.canvas.write(centre, below, column, page.face, size, page.ink, align=0.5, facts=tuple(facts))
    return page.canvas

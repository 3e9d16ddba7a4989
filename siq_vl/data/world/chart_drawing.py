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


@dataclass
class _Bars:
    """A chart of bars before its bars are drawn.

    Attributes:
        page: what it is drawn on.
        upright: columns, or else rows.
        where: the values are written: at the bars' `"end"`, `"inside"`, beside the `"label"`, or `"none"`.
        plot: room between the axes.
        slot: width of one bar and its gap, in pixels.
        size: of the labels' letters, in pixels.
        value_size: of the values' and the axis's.
        style: one of `BAR_STYLES` or `UNSEEN_BAR_STYLES`.
    """

    page: Page
    upright: bool
    where: str
    plot: _Plot
    slot: float
    size: int
    value_size: int
    style: str = ""


def draw_bars(
    entries: Entries, top: int, printed: bool, title: str, look: Look, rng: Random, *, upright: bool
) -> Canvas:
    """Draw bars, upright or lying; see `charts.Chart` for the arguments."""
    page = blank(look, rng)
    size = _letter_size(page, rng)
    start = _title(page, title, size, rng)
    with_axis = not printed or rng.random() < 0.35
    grid = with_axis and rng.random() < (0.85 if not printed else 0.5)
    where = rng.choice(("end", "end", "end", "inside", "label")) if printed else "none"
    lay_out = _columns if upright else _rows
    bars = lay_out(page, start, [label for label, _ in entries], top, where, with_axis, size)
    plot = bars.plot
    _axis(page, plot, top, bars.value_size, rng, upright=upright, numbers=with_axis, grid=grid)
    bars.style = rng.choice(UNSEEN_BAR_STYLES if look.charts == "unseen" else BAR_STYLES)
    share = {"thin": 0.3, "joined": 1.0, "lollipop": 0.34}.get(bars.style, rng.uniform(0.45, 0.85))
    if where == "inside":
        share = max(share, 0.75)
    fills = palette(rng, len(entries), page.canvas.background)
    half = 0.5 * share * bars.slot
    for index, ((label, value), fill) in enumerate(zip(entries, fills, strict=True)):
        centre = (plot.left if upright else plot.top) + (index + 0.5) * bars.slot
        if upright:
            box = (centre - half, plot.bottom - (plot.bottom - plot.top) * value / top, centre + half, plot.bottom)
        else:
            box = (plot.left, centre - half, plot.left + (plot.right - plot.left) * value / top, centre + half)
        page.canvas.mark(box, facts=(label, str(value)))
        reached = _bar(page, box, fill, bars.style, upright)
        _write_label(bars, centre, label, value)
        if where in ("end", "inside"):
            _write_value(bars, reached, centre, label, value, fill)
    return page.canvas


def _columns(page: Page, start: float, labels: list[str], top: int, where: str, with_axis: bool, size: int) -> _Bars:
    """Share out the room below `start` among upright bars, the axis left of them and the labels under them."""
    left, _, right, bottom = page.area
    value_size = max(round(0.85 * size), round(_SMALLEST * page.unit))
    axis_room = text_width(str(top), page.face, value_size) + 3 * page.unit if with_axis else 2
    slot = (right - left - axis_room) / len(labels)
    size = fitting(labels, 0.96 * slot, page, size)
    label_room = 1.2 * size * (2 if where == "label" else 1)
    head = 1.15 * value_size if where == "end" else 0.5 * value_size
    plot = _Plot(left + axis_room, start + head, right, bottom - label_room - 2 * page.unit)
    return _Bars(page, True, where, plot, slot, size, value_size)


def _rows(page: Page, start: float, labels: list[str], top: int, where: str, with_axis: bool, size: int) -> _Bars:
    """Share out the room below `start` among lying bars, the labels left of them and the axis under them."""
    left, _, right, bottom = page.area
    value_size = max(round(0.85 * size), round(_SMALLEST * page.unit))
    size = fitting(labels, 0.42 * (right - left), page, size)
    label_room = max(text_width(label, page.face, size) for label in labels)
    if where == "label":
        label_room += text_width(f" {top}", page.face, size)
    tail = text_width(str(top), page.face, value_size) + 4 * page.unit if where == "end" else 0.5 * value_size
    foot = 1.3 * value_size if with_axis else 2
    plot = _Plot(left + label_room + 4 * page.unit, start + 2, right - tail, bottom - foot)
    slot = (plot.bottom - plot.top) / len(labels)
    size = min(size, max(6, round(0.95 * slot)))
    return _Bars(page, False, where, plot, slot, size, min(value_size, size))


def _write_label(bars: _Bars, centre: float, label: str, value: int) -> None:
    """Write a bar's label at the axis, and the value beside it where the chart has it there."""
    page, size, fact = bars.page, bars.size, (label, str(value))
    gap = 2.5 * page.unit
    if not bars.upright:
        described = f"{label} {value}" if bars.where == "label" else label
        page.canvas.write(bars.plot.left - gap, centre, described, page.face, size, page.ink, align=1.0, facts=fact)
        return
    y = bars.plot.bottom + gap + 0.55 * size
    page.canvas.write(centre, y, label, page.face, size, page.ink, align=0.5, facts=fact)
    if bars.where == "label":
        y = bars.plot.bottom + gap + 1.7 * size
        page.canvas.write(centre, y, str(value), page.face, size, page.ink, align=0.5, facts=fact)


def _write_value(bars: _Bars, box: Box, centre: float, label: str, value: int, fill: RGB) -> None:
    """Write a value inside its bar, where the chart has it there and the bar is wide enough, or else past its end."""
    page, size, text, fact = bars.page, bars.value_size, str(value), (label, str(value))
    gap = 2.5 * page.unit
    wide, high = text_width(text, page.face, size), 1.2 * size
    inside = bars.where == "inside" and bars.style not in ("hollow", "lollipop", "striped")
    if bars.upright:
        inside = inside and box[3] - box[1] > high and wide < box[2] - box[0]
        y = box[1] + 0.75 * size if inside else box[1] - 0.55 * size - gap / 2
        ink = ink_on(fill) if inside else page.ink
        page.canvas.write(centre, y, text, page.face, size, ink, align=0.5, facts=fact)
    elif inside and box[2] - box[0] > wide + gap:
        page.canvas.write(box[2] - gap / 2, centre, text, page.face, size, ink_on(fill), align=1.0, facts=fact)
    else:
        page.canvas.write(box[2] + gap, centre, text, page.face, size, page.ink, facts=fact)


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


@dataclass
class _Pie:
    """Where a pie lies, in pixels, how large its letters are, and the corner of its legend where it has one."""

    x: float
    y: float
    radius: float
    size: int
    legend: tuple[float, float] | None


def draw_pie(entries: Entries, title: str, look: Look, rng: Random) -> Canvas:
    """Draw slices; see `charts.Chart` for the arguments."""
    page = blank(look, rng)
    canvas, size = page.canvas, _letter_size(page, rng)
    start = _title(page, title, size, rng)
    whole = sum(value for _, value in entries)
    percent = "%" if whole == 100 and rng.random() < 0.8 else ""
    described = [f"{label} {value}{percent}" for label, value in entries]
    if rng.choice(("around", "legend", "legend")) == "around":
        pie = _pie_with_labels_around(page, start, [label for label, _ in entries], size)
    else:
        pie = _pie_with_legend(page, start, described, size)
    fills = _slice_fills(page, len(entries), rng)
    style = rng.choice(UNSEEN_PIE_STYLES if look.charts == "unseen" else PIE_STYLES)
    edge = {"plain": None, "ring": None, "outlined": page.ink, "gaps": canvas.background}[style]
    box = (pie.x - pie.radius, pie.y - pie.radius, pie.x + pie.radius, pie.y + pie.radius)
    angle = rng.uniform(0, 360)
    taken: list[Box] = []
    for (label, value), fill in zip(entries, fills, strict=True):
        turn = 360 * value / whole
        canvas.pen.pieslice(box, angle, angle + turn, fill=fill, outline=edge, width=page.line)
        middle = math.radians(angle + turn / 2)
        way = (math.cos(middle), math.sin(middle))
        x, y = (pie.x + 0.6 * pie.radius * way[0], pie.y + 0.6 * pie.radius * way[1])
        canvas.mark((x - 1, y - 1, x + 1, y + 1), facts=(label, str(value)))
        if pie.legend is None:
            _write_around(page, pie, way, label, f"{value}{percent}", taken)
        angle += turn
    if style == "ring":
        hole = 0.5 * pie.radius
        canvas.pen.ellipse((pie.x - hole, pie.y - hole, pie.x + hole, pie.y + hole), fill=canvas.background)
    if pie.legend is not None:
        facts = [(label, str(value)) for label, value in entries]
        _legend(page, *pie.legend, list(zip(described, facts, fills, strict=True)), pie.size)
    return canvas


def _pie_with_labels_around(page: Page, start: float, labels: list[str], size: int) -> _Pie:
    """Return a pie in the middle of the room below `start`, with room for labels over values on all sides."""
    left, _, right, bottom = page.area
    width, height = right - left, bottom - start
    size = fitting(labels, 0.28 * width, page, size)
    wide = max(text_width(label, page.face, size) for label in labels)
    radius = max(0.18 * min(width, height), min(0.5 * width - wide - 2 * page.unit, 0.5 * height - 2.2 * size))
    return _Pie((left + right) / 2, (start + bottom) / 2, radius, size, None)


def _pie_with_legend(page: Page, start: float, rows: list[str], size: int) -> _Pie:
    """Return a pie with its legend on the right, or below where the room is high."""
    left, _, right, bottom = page.area
    width, height = right - left, bottom - start
    if width > 0.9 * height:
        size = min(fitting(rows, 0.5 * width, page, size), max(6, round(0.9 * height / len(rows))))
        wide = max(text_width(row, page.face, size) for row in rows) + 1.2 * size
        radius = max(0.14 * width, min(0.5 * height, 0.5 * (width - wide) - 2 * page.unit))
        top = start + max(0, (height - 1.25 * size * len(rows)) / 2)
        return _Pie(left + radius, (start + bottom) / 2, radius, size, (left + 2 * radius + 4 * page.unit, top))
    size = fitting(rows, 0.8 * width, page, size)
    high = 1.25 * size * len(rows)
    radius = max(0.14 * height, min(0.5 * width, 0.5 * (height - high) - 2 * page.unit))
    return _Pie((left + right) / 2, start + radius, radius, size, (left, start + 2 * radius + 0.3 * size))


def _write_around(page: Page, pie: _Pie, way: tuple[float, float], label: str, value: str, taken: list[Box]) -> None:
    """Write a slice's label over its value outside the slice, moved outwards and along where there is writing."""
    (dx, dy), size = way, pie.size
    half = max(text_width(text, page.face, size) for text in (label, value)) / 2
    x = pie.x + (pie.radius + half + 2 * page.unit) * dx
    y = pie.y + (pie.radius + 1.1 * size) * dy
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
